"""Does a model refuse what it should, and answer what it should?

asking      prompts, and whoever answers them
judge       one verdict for a prompt and its completion
report      counts, documents, records
statistics  counts with intervals    costs  what a gene costs
plan        what is asked            evaluate  the whole of it
"""
