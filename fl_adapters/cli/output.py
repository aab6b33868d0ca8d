"""How commands speak: errors as a short panel, results as JSON."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from fl_runtime.errors import AbortedError, FederationError

if TYPE_CHECKING:
    from rich.console import Console

INTERRUPTED = 130


def console_for(as_json: bool) -> Console:
    """A terminal that shows every text as it is: brackets in an error, a path or a name are no markup. On stderr where
    stdout is for JSON."""
    from rich.console import Console

    return Console(stderr=as_json, markup=False, emoji=False)


@contextmanager
def report_errors(as_json: bool) -> Iterator[None]:
    """Turns our errors and Ctrl-C into a message on stderr, with `as_json` also a JSON object, and an exit status."""
    try:
        yield
    except FederationError as error:
        show_error(error, as_json)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stopped = AbortedError("stopped by Ctrl-C", fix="start it again; what the run has left can be inspected")
        show_error(stopped, as_json)
        raise typer.Exit(INTERRUPTED) from None


def show_error(error: FederationError, as_json: bool) -> None:
    if sys.stderr.isatty():
        from rich.panel import Panel
        from rich.text import Text

        console_for(as_json=True).print(Panel(Text(str(error)), title="error", title_align="left", border_style="red"))
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if as_json:
        show_json({"error": error.to_wire()})


def show_json(fields: Mapping[str, Any]) -> None:
    print(json.dumps(_plain(fields), allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    """NaN and infinities, which JSON does not have, become null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
