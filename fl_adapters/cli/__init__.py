"""The command line `fl-adapters`. The module of a command is imported when the command runs."""

from fl_adapters.cli.app import main

__all__ = ["main"]
