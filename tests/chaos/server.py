"""The server of one run in its own process, as `fl-adapters simulate` embeds it.

usage: server.py FOLDER PORT SETTINGS (JSON)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fl_runtime.errors import FederationError
from fl_runtime.server import Server
from fl_runtime.server.records.history import History
from fl_runtime.types import RunSettings


def main() -> None:
    folder, port, fields = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    run = RunSettings(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})
    try:
        history = History(folder)
        server = Server(run, folder, {name: f"secret of {name}" for name in run.sites}, port=port, listeners=[history])
        server.start()
        server.wait()
        error = server.result().error
        if error is None:
            server.export(folder / "model")
        server.close()
        history.close()
        if error is not None:
            raise error
    except FederationError as error:
        sys.exit(json.dumps(error.to_wire()))


if __name__ == "__main__":
    main()
