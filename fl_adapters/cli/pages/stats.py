"""Command `fl-adapters stats`: runs the command of `fl_adapters.statistics`.

That is an integration, which this package may not import. It is found by its name.
"""

from __future__ import annotations

import runpy
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from importlib import import_module

from fl_adapters.cli.output import report_errors, show_error
from fl_runtime.errors import ConfigError

_INTEGRATION = "fl_adapters.statistics"


def command_parser() -> ArgumentParser | None:
    """Return the parser of the command's options, or None if narwhals, which it needs, is not installed."""
    try:
        found = import_module(f"{_INTEGRATION}.__main__").command_parser()
    except ImportError:
        return None
    assert isinstance(found, ArgumentParser)
    return found


def run(arguments: Sequence[str]) -> int:
    """Run the command in this process. Exits with status 1 if narwhals is not installed."""
    sys.argv = ["fl-adapters stats", *arguments]
    with report_errors("--json" in arguments):
        try:
            runpy.run_module(_INTEGRATION, run_name="__main__", alter_sys=True)
        except ImportError as error:
            if not str(error).startswith("narwhals"):
                raise  # an error of the user's own function
            show_error(
                ConfigError(str(error), where="stats", fix="pip install 'fl-adapters[statistics]'"),
                "--json" in arguments,
            )
            return 1
    return 0
