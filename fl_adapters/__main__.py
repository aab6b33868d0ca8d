"""Run the command line: `python -m fl_adapters` does the same as `fl-adapters`."""

from fl_adapters.cli import main

main()
