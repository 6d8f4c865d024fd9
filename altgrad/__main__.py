"""`python -m altgrad` is the command line."""

from altgrad.cli import main

main()
