"""Command `fl-adapters bundle`: runs the MONAI adapter's own command.

The adapter is an integration, which this package may not import. It is found by its name.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from fl_adapters.cli.output import report_errors, show_error
from fl_runtime.errors import ConfigError

_ADAPTER = "fl_adapters.monai"


def run(arguments: Sequence[str]) -> int:
    """Run the adapter's command in this process. Exits with status 1 if MONAI is not installed."""
    sys.argv = ["fl-adapters bundle", *arguments]
    with report_errors(False):
        try:
            runpy.run_module(_ADAPTER, run_name="__main__", alter_sys=True)
        except ImportError as error:
            if not str(error).startswith("MONAI"):
                raise  # an error of the bundle itself
            show_error(ConfigError(str(error), where="bundle", fix="pip install 'fl-adapters[monai]'"), False)
            return 1
    return 0
