"""`python -m fl_adapters` is `fl-adapters`."""

from fl_adapters.cli import main

main()
