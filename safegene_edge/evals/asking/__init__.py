"""Prompts and whoever answers them.

chat      a chat and its reply
suites    prompts with their hashes, built in or from the field's files
attacks   ways of asking the same so that a model may not refuse it
journal   what a run has found so far, on disk
local     a model asked through the batched engine; endpoint: an OpenAI-compatible server
"""
