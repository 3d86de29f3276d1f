"""Does a model refuse what it should, and answer what it should?

suites: prompts with their hashes.  normalise, phrases, judge: one verdict for a prompt
and its completion.  statistics: counts with intervals.  report, evaluate: before and
after a gene.
"""
