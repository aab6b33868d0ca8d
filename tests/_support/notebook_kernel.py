"""A real kernel of Jupyter: runs cells, keeps what they show, and knows the processes that they start."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import KernelManager

WAIT_S = 60.0


@dataclass
class Shown:
    """What one cell has shown.

    Attributes:
        texts: Text of stdout and stderr.
        displays: Data of each display, by mime type, in order; an update replaces what it updates.
        updates: Number of updates of displays.
        error: Lines of the error that ended the cell; empty without one.
    """

    texts: dict[str, str] = field(default_factory=lambda: {"stdout": "", "stderr": ""})
    displays: dict[str, dict[str, Any]] = field(default_factory=dict)
    updates: int = 0
    error: list[str] = field(default_factory=list)

    def __call__(self, message: dict[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            self.texts[content["name"]] += content["text"]
        elif kind in ("display_data", "execute_result", "update_display_data"):
            name = content.get("transient", {}).get("display_id", f"display {len(self.displays)}")
            self.updates += kind == "update_display_data"
            self.displays[name] = content["data"]
        elif kind == "error":
            self.error = [content["ename"], content["evalue"]]


class Kernel:
    """A kernel whose working directory is a folder."""

    def __init__(self, folder: Path) -> None:
        self._manager = KernelManager()
        self._manager.start_kernel(cwd=str(folder))
        self._connect()

    def _connect(self) -> None:
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=WAIT_S)

    def run(self, cell: str, *, fails: bool = False) -> Shown:
        """Run a cell to its end."""
        shown = Shown()
        self._client.execute_interactive(cell, timeout=WAIT_S, output_hook=shown, allow_stdin=False)
        assert fails or not shown.error, "\n".join([*shown.error, shown.texts["stderr"]])
        return shown

    def begin(self, cell: str) -> str:
        """Start a cell, and return at once."""
        return str(self._client.execute(cell, allow_stdin=False))

    def reply(self, cell: str) -> dict[str, Any]:
        """Wait for the end of a cell that was begun, and return its reply."""
        while True:
            message = self._client.get_shell_msg(timeout=WAIT_S)
            if message["parent_header"].get("msg_id") == cell:
                return dict(message["content"])

    def interrupt(self) -> None:
        """Interrupt the cell that runs, as the button of the notebook does."""
        self._manager.interrupt_kernel()

    def kill(self) -> None:
        """Kill the kernel's process alone, as a lack of memory does."""
        os.kill(self._manager.provisioner.pid, signal.SIGKILL)  # type: ignore[union-attr]

    def restart(self) -> None:
        """Restart the kernel at once, as the notebook does at the press of a button, or if the kernel has died."""
        self._client.stop_channels()
        self._manager.restart_kernel(now=True)
        self._connect()

    def processes(self) -> list[psutil.Process]:
        """Processes below the kernel's own."""
        return psutil.Process(self._manager.provisioner.pid).children(recursive=True)  # type: ignore[union-attr]

    def close(self) -> None:
        """End the kernel."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def wait_until(met: Callable[[], bool], what: str) -> None:
    """Wait for a condition; TimeoutError with `what` was waited for."""
    deadline = time.monotonic() + WAIT_S
    while not met():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {WAIT_S:g} s for {what}")
        time.sleep(0.05)


def run_cells(folder: Path, cells: Iterable[str]) -> None:
    """Run cells in a kernel of their own, and check that no process is left that they have started."""
    kernel = Kernel(folder)
    try:
        for cell in cells:
            kernel.run(cell)
        assert kernel.processes() == []
    finally:
        kernel.close()
