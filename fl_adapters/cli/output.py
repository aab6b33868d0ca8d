"""Output of the commands: errors as a short panel on stderr, results as JSON on stdout."""

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
    """Console for human-readable output: stdout, or stderr if stdout is reserved for JSON.

    It shows text as it is. Brackets in an error, a path or a name are not markup.
    """
    from rich.console import Console

    return Console(stderr=as_json, markup=False, emoji=False)


@contextmanager
def report_errors(as_json: bool) -> Iterator[None]:
    """Turn a FederationError or Ctrl-C in this block into a message (with `as_json` also JSON) and an exit status."""
    try:
        yield
    except FederationError as error:
        show_error(error, as_json)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stopped = AbortedError("stopped by Ctrl-C", fix="start it again, or inspect the files that the run has written")
        show_error(stopped, as_json)
        raise typer.Exit(INTERRUPTED) from None


def show_error(error: FederationError, as_json: bool) -> None:
    """Print an error to stderr, as a panel on a terminal; with `as_json` also as JSON to stdout."""
    if sys.stderr.isatty():
        from rich.panel import Panel
        from rich.text import Text

        console_for(as_json=True).print(Panel(Text(str(error)), title="error", title_align="left", border_style="red"))
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if as_json:
        show_json({"error": error.to_wire()})


def show_json(fields: Mapping[str, Any]) -> None:
    """Print one JSON object as one line on stdout."""
    print(json.dumps(_plain(fields), allow_nan=False), flush=True)


def _plain(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by null."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
