"""The command line, `fl-adapters`. Each command's module is imported when the command is run."""

from fl_adapters.cli.app import main

__all__ = ["main"]
