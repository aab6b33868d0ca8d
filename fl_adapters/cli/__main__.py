"""Command line as `python -m fl_adapters.cli`, for when the script `fl-adapters` is not on the path."""

from fl_adapters.cli.app import main

main()
