"""Process that imports once what the scripts of all sites import first, and forks a process for each site.

`ForkedProcesses` runs this file as a script, and talks to it through a socket, in lines of JSON. The first line holds
the imports; the answer to it says that they are done. Each further line asks for a process, and is answered with its
number; when a process has ended, a line says how. At the end of the socket, this process ends too, and it ends at once
if the imports have loaded what does not bear a fork.

It has one thread of Python, no connection and no GPU when it forks. Imports alone make no state that two sites would
share, but for NumPy's global random numbers, which every site seeds anew as a new interpreter does.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import types
import warnings
from contextlib import suppress
from importlib import import_module
from importlib.machinery import SourceFileLoader
from typing import Any, BinaryIO

_CHUNK_BYTES = 2**16
_WITH_THREADS = ("jax", "tensorflow")
_OURS = (__file__, "<frozen importlib", "<frozen runpy")  # files of the first lines of a traceback


def main() -> None:
    """Serve until the socket ends. In a forked process, return once its script has ended."""
    link = socket.socket(fileno=int(sys.argv[1]))
    lines = link.makefile("rb")
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        _import(json.loads(lines.readline()))
        signal.signal(signal.SIGCHLD, lambda *_: _tell_ends(link))
        if not sys.modules.keys().isdisjoint(_WITH_THREADS):
            return
        _tell(link, {"ready": True})
        for line in lines:
            order = json.loads(line)
            if _fork(link):
                break
        else:
            return
        lines.close()
        _become(order, printed)
    _run(order["script"], order["module"])


def _import(first: dict[str, Any]) -> None:
    """Import modules and names as a script in that folder would. The script itself meets, and reports, what fails."""
    if not sys.flags.safe_path:
        sys.path[0] = first["path"]
    with suppress(Exception, SystemExit):
        for module, names in first["imports"]:
            loaded = import_module(module)
            for name in names:
                if not hasattr(loaded, name):  # packages such as transformers load a name when it is asked for
                    import_module(f"{module}.{name}")
    gc.collect()
    gc.freeze()  # else the first collection of each site would write to, and so copy, every page of these modules


def _fork(link: socket.socket) -> bool:
    """Fork a process and tell its number. Returns whether this is the new process."""
    sys.stdout.flush()
    sys.stderr.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # the end of a process is told after its number
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads; those of OpenBLAS and jemalloc know forks
            number = os.fork()
        if number:
            _tell(link, {"started": number})
            return False
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        link.close()
        return True
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _tell_ends(link: socket.socket) -> None:
    while True:
        try:
            number, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not number:
            return
        _tell(link, {"ended": number, "status": os.waitstatus_to_exitcode(status)})


def _tell(link: socket.socket, message: dict[str, Any]) -> None:
    try:
        link.sendall(json.dumps(message).encode() + b"\n")
    except OSError:  # whoever asked is gone; the processes that it knew of are ended by its own helper
        if number := message.get("started"):
            os.kill(number, signal.SIGKILL)


def _become(order: dict[str, Any], printed: BinaryIO) -> None:
    """Give this forked process the session, environment and output of the ordered one."""
    os.setsid()
    os.environ.clear()
    os.environ.update(order["environment"])
    with open(order["log"], "ab") as log:
        printed.seek(0)
        while chunk := printed.read(_CHUNK_BYTES):  # what the imports printed, such as warnings
            log.write(chunk)
        log.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if random := sys.modules.get("numpy.random"):
        random.seed()


class _Script(SourceFileLoader):
    """Loads a file as `python FILE` does, without leaving its code in a cache."""

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        """Write no file of compiled code."""


def _run(command: list[str], module: bool) -> None:
    """Run a script or a module as `python` does. An error is printed without the lines of this file."""
    try:
        if module:
            sys.argv = ["-m", *command[1:]]
            runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            path = os.path.abspath(command[0])
            script = types.ModuleType("__main__")
            loader = _Script("__main__", path)
            script.__dict__.update(__file__=path, __loader__=loader, __cached__=None)
            sys.modules["__main__"] = script
            loader.exec_module(script)
    except Exception as error:
        trace = _of_script(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        sys.exit(1)


def _of_script(trace: types.TracebackType | None) -> types.TracebackType | None:
    """The part of a traceback that begins in the script."""
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(_OURS):
        trace = trace.tb_next
    return trace


if __name__ == "__main__":
    main()
