"""`fl-adapters bundle`: hands over to the MONAI adapter, which stands above this and is reached by its name alone."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

from fl_adapters.cli.output import report_errors, show_error
from fl_runtime.errors import ConfigError

_ADAPTER = "fl_adapters.monai"


def run(arguments: Sequence[str]) -> int:
    """Run the adapter's own command in this process. Exit status 1 where MONAI is not installed."""
    sys.argv = ["fl-adapters bundle", *arguments]
    with report_errors(False):
        try:
            runpy.run_module(_ADAPTER, run_name="__main__", alter_sys=True)
        except ImportError as error:
            if not str(error).startswith("MONAI"):
                raise  # from within the bundle's own run
            show_error(ConfigError(str(error), where="bundle", fix="pip install 'fl-adapters[monai]'"), False)
            return 1
    return 0
