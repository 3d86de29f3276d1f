"""`python -m safegene_edge` is `safegene-edge`."""

from .cli import main

main()
