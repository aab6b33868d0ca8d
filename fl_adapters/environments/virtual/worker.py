"""Worker process of virtual sites: reads orders from a socket, one JSON line each, and answers with one JSON line.

    python -m fl_adapters.environments.virtual.worker DESCRIPTOR APP [ARGS...]     (started by launch.py)

Tensors do not travel in these lines. They lie in files that both processes map into memory.
"""

from __future__ import annotations

import json
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from fl_adapters.environments.virtual.function import (
    InitialWeights,
    OrderRunner,
    RunInfo,
    SiteFunction,
    initial_weights,
    load,
)
from fl_runtime.errors import FederationError, SiteFailedError
from fl_runtime.store.tensorfile import write_tensors
from fl_runtime.transport.shared import SharedFolder


def serve(line: socket.socket, function: SiteFunction, initial: InitialWeights | None) -> None:
    """Answer orders until the other side closes the socket."""
    worker: OrderRunner | None = None
    folders: dict[str, SharedFolder] = {}

    def mapped(path: str, nbytes: int) -> Any:
        folder, _, name = path.rpartition("/")
        return folders.setdefault(folder, SharedFolder(Path(folder))).payload(name, nbytes)

    with line, line.makefile("rwb", buffering=0) as pipe:
        _say(pipe, {"ready": True})
        for text in pipe:
            message = json.loads(text)
            try:
                if "initial" in message:
                    write_tensors(Path(message["initial"]), initial_weights(initial))
                    answer: dict[str, Any] = {"written": True}
                elif "run" in message:
                    worker = OrderRunner(function, RunInfo(**message["run"]))
                    continue
                else:
                    assert worker is not None
                    nbytes = message["nbytes"]
                    answer = worker.work(message, mapped(message["model"], nbytes), mapped(message["update"], nbytes))
            except FederationError as error:
                traceback.print_exc()  # into the worker's log
                answer = {"failed": error.to_wire()}
            except Exception as error:
                traceback.print_exc()
                answer = {"failed": _explained(error, "gave no initial weights").to_wire()}
            _say(pipe, answer)


def _say(pipe: Any, answer: dict[str, Any]) -> None:
    sys.stdout.flush()
    pipe.write(json.dumps(answer).encode() + b"\n")


def _explained(error: Exception, what: str) -> SiteFailedError:
    frames = "".join(traceback.format_exception(error)[-4:]).rstrip().splitlines()
    return SiteFailedError(
        f"the virtual sites' module {what}: {type(error).__name__}: {error}",
        where="\n".join(["in a worker:", *(f"    | {frame}" for frame in frames)]),
        fix="correct the module",
    )


def main() -> None:
    line, app = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    sys.argv[:] = sys.argv[2:]  # the module sees its own arguments only
    try:
        function, initial = load(app)
    except FederationError as error:
        line.sendall(json.dumps({"broken": error.to_wire()}).encode() + b"\n")
    except Exception as error:
        traceback.print_exc()
        line.sendall(json.dumps({"broken": _explained(error, "cannot be imported").to_wire()}).encode() + b"\n")
    else:
        serve(line, function, initial)


if __name__ == "__main__":
    main()
