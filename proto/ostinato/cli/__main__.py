"""`python -m ostinato.cli`, where the entry point is not installed."""

from ostinato.cli import main

main()
