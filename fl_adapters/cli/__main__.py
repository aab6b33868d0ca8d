"""`python -m fl_adapters.cli`: the command line where its script is not on the path."""

from fl_adapters.cli.app import main

main()
