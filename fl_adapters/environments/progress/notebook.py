"""The screen of a run in a notebook: one output of the cell, which is updated in place."""

from __future__ import annotations

import io
import sys
import threading
import time
from typing import Any

from fl_adapters.environments.progress.lines import ProgressLines
from fl_adapters.environments.progress.text import waiting_text
from fl_adapters.environments.progress.view import RunView
from fl_runtime.types import Event, Listener

_COLUMNS = 100
_PAUSE_S = 0.5
_SAID_KEPT = 20


def progress_listener() -> Listener:
    """Return a listener that shows a run to whoever has started it in Python.

    Returns:
        In a notebook an output of the cell that is updated in place, else lines on stderr.
    """
    return NotebookScreen() if _in_notebook() else ProgressLines(sys.stderr)


class NotebookScreen:
    """Listener that shows the screen of a run below the cell that runs, at most twice a second.

    Make it in the thread that runs the cell. It may be called by any.

    Attributes:
        view: The state of the run.
    """

    def __init__(self) -> None:
        self.view = RunView()
        self._said: list[str] = []  # warnings, which stay below the bars
        self._shown_at = 0.0
        self._lock = threading.Lock()
        self._output = self._display()

    def __call__(self, event: Event) -> None:
        self.view(event)
        if event.kind == "warning":
            self._said.append(f"warning: {event.data['text']}")
        elif event.kind == "waiting":
            self._said.append(waiting_text(event.data))
        elif event.kind == "left" and event.data["early"]:
            self._said.append(f"{event.site} dropped out: {event.data['reason']}")
        del self._said[:-_SAID_KEPT]
        with self._lock:
            now = time.monotonic()
            if now - self._shown_at >= _PAUSE_S or event.kind in ("starting", "finished", "failed", "exited"):
                self._shown_at = now
                self._output.update(self._page())

    def _display(self) -> Any:
        from IPython.display import display

        show: Any = display  # it has no annotations
        return show(self._page(), display_id=True)

    def _page(self) -> Any:
        from IPython.display import HTML

        page: Any = HTML
        return page(self._html())

    def _html(self) -> str:
        """The screen as HTML. All text is escaped by rich."""
        from rich.console import Console
        from rich.text import Text

        from fl_adapters.environments.progress.screen import run_screen

        console = Console(
            file=io.StringIO(), width=_COLUMNS, record=True, force_terminal=True, force_jupyter=False, markup=False
        )
        console.print(run_screen(self.view, _COLUMNS))
        for text in self._said:
            console.print(Text(text, style="yellow"))
        code = '<pre style="line-height:normal;font-family:monospace;background:none;color:inherit">{code}</pre>'
        return console.export_html(inline_styles=True, code_format=code)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, and not a terminal of IPython."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "ZMQInteractiveShell" in (kind.__name__ for kind in type(shell).__mro__)
