"""What an evaluation found, and every form that shows it.

results   the data                    json      the data as JSON values
findings  the JSON in counts and words, which text, html and markdown show
summary   what stands first: the verdict, and what to beware of
plots, markup  for the page           pictures  the plots as files, for --plot
schema    reading a report's JSON
record    hashes, and holding files against them    compare  two reports
report    `Report`, which knows all forms
"""
