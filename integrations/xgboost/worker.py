"""The child process, started by `engine.py`, that grows trees with other sites' workers in XGBoost's collective.

It is a separate process because XGBoost ends the whole process when another worker fails. It imports the standard
library, NumPy, SciPy and XGBoost only. If the system allows it, it moves into a network namespace with nothing but a
loopback interface, so that nobody can reach the ports that XGBoost opens on all interfaces.

It inherits two sockets: one for commands (a JSON line, then arrays), and one on which it hands out sockets that it
makes within the namespace.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import sys
import threading
from typing import Any

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8914, 0x41
_SIOCADDRT, _ROUTE_UP = 0x890B, 1
_BACKLOG = 64


def main() -> None:
    """Run the worker on the two sockets named by the command line."""
    commands, helper = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    if sys.argv[3] == "isolated":
        isolate()
    threading.Thread(target=make_sockets, args=(helper,), daemon=True).start()
    channel = Channel(commands)
    channel.send({"network": network()})
    try:
        CollectiveWorker(channel).run()
    except Exception as error:
        channel.send({"error": f"{type(error).__name__}: {error}".split("\nStack trace")[0]})
        os._exit(1)  # without the collective's own end, which would wait for other workers


def isolate() -> None:
    """Move into a network namespace with a loopback interface only, if the system allows it."""
    if sys.platform != "linux" or ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        return
    import fcntl

    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP_RUNNING))
        # A default route through the loopback: XGBoost looks up the address that it would use to reach other machines.
        device, anywhere = ctypes.create_string_buffer(b"lo"), struct.pack("H14x", socket.AF_INET)
        route = (anywhere, bytes(16), anywhere, _ROUTE_UP, ctypes.addressof(device))
        fcntl.ioctl(
            any_socket, _SIOCADDRT, struct.pack("@L16s16s16sHhLPhPLLH", 0, *route[:4], 0, 0, 0, 0, route[4], 0, 0, 0)
        )


def network() -> str:
    """Name of the network that this process is in, different for every namespace of every machine."""
    if sys.platform != "linux":
        return socket.gethostname()
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{os.readlink('/proc/self/ns/net')} of {file.read().strip()}"


def make_sockets(helper: socket.socket) -> None:
    """Answer each request {"listen": [host, port]} or {"from": host} with a socket, or with the reason for none."""
    while line := helper.recv(4096):
        request = json.loads(line)
        new = socket.socket()
        try:
            if "listen" in request:
                new.bind(tuple(request["listen"]))
                new.listen(_BACKLOG)
            else:
                new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                new.bind((request["from"], 0))
            socket.send_fds(helper, [json.dumps({"port": new.getsockname()[1]}).encode()], [new.fileno()])
        except OSError as error:
            helper.send(json.dumps({"error": str(error), "errno": error.errno}).encode())
        finally:
            new.close()


class Channel:
    """Carries messages, each a JSON object and arrays, both ways over one stream socket."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._lock = threading.Lock()

    def send(self, fields: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
        """Send a message to the other side.

        Args:
            fields: JSON values by name.
            arrays: NumPy arrays or bytes by name.
        """
        kinds, parts = [], []
        for name, value in (arrays or {}).items():
            data = memoryview(value).cast("B") if len(value) else memoryview(b"")
            kinds.append([name, getattr(value, "dtype", None) and value.dtype.str, len(data)])
            parts.append(data)
        head = json.dumps({**fields, "arrays": kinds}).encode()
        with self._lock:
            self._line.sendall(struct.pack("<I", len(head)) + head)
            for data in parts:
                self._line.sendall(data)

    def receive(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Wait for a message and return (fields, arrays). Raises EOFError when the other side is gone."""
        (length,) = struct.unpack("<I", self._exactly(4))
        fields = json.loads(bytes(self._exactly(length)))
        arrays: dict[str, Any] = {}
        for name, kind, size in fields.pop("arrays"):
            data = self._exactly(size)
            if kind:
                import numpy

                arrays[name] = numpy.frombuffer(data, kind)
            else:
                arrays[name] = data
        return fields, arrays

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            try:
                count_read = self._line.recv_into(view)
            except OSError:
                count_read = 0
            if not count_read:
                raise EOFError
            view = view[count_read:]
        return data


def drops_trees(booster: Any) -> bool:
    """Whether a new tree changes the weights of earlier trees: dart, part of the usual booster since XGBoost 3.3."""
    config = json.loads(booster.save_config())["learner"]["gradient_booster"]
    dropout = config.get("dart_train_param", {})
    return config["name"] == "dart" or any(float(dropout.get(name, 0)) > 0 for name in ("rate_drop", "one_drop"))


class CollectiveWorker:
    """Takes data, joins the collective, and boosts on command: one generation of the engine."""

    def __init__(self, channel: Channel) -> None:
        # Importing these takes two thirds of the time of XGBoost's import, and this process does not need them.
        sys.modules.update(dict.fromkeys(("sklearn", "pandas")))  # type: ignore[arg-type]
        import xgboost  # after isolate(): a process with threads may not leave its network

        self._xgboost, self._channel = xgboost, channel
        self._tracker: Any = None
        self._with_gradients = False

    def run(self) -> None:
        """Work until the command to end."""
        fields, arrays = self._channel.receive()
        if fields["track"]:
            self._channel.send({"tracker": self._track(fields["workers"], fields["timeout_s"])})
        reference = self._reference(fields, arrays)
        joining, _ = self._channel.receive()
        from xgboost import collective

        arguments = {
            "dmlc_communicator": "rabit",
            "dmlc_tracker_uri": joining["host"],
            "dmlc_tracker_port": joining["port"],
            "dmlc_task_id": f"{joining['index']:06d}",
            "dmlc_timeout": fields["timeout_s"],
            "dmlc_retry": 3,
        }
        collective.init(**arguments)
        data = self._matrix(fields, arrays, reference)
        del reference
        booster = self._xgboost.Booster(fields["params"], [data], model_file=arrays["model"])
        self._channel.send({"joined": collective.get_rank()})
        self._boost(booster, data, fields["gradients"])
        collective.finalize()
        if self._tracker is not None:
            self._tracker.wait_for(fields["timeout_s"])

    def _track(self, workers: int, timeout_s: int) -> int:
        from xgboost.tracker import RabitTracker

        self._tracker = RabitTracker(workers, host_ip="127.0.0.1", port=0, sortby="task", timeout=timeout_s)
        self._tracker.start()
        return int(self._tracker.worker_args()["dmlc_tracker_port"])

    def _boost(self, booster: Any, data: Any, gradients: bool) -> None:
        """Answer each command {"boost": [iterations]} with the model or its new rounds, until {"end": true}.

        After each iteration {"done": number of those done} is sent.
        """
        while "boost" in (command := self._channel.receive()[0]):
            before = booster.num_boosted_rounds()
            booster.set_param(command["params"])
            for done, iteration in enumerate(command["boost"], 1):
                booster.update(data, iteration, fobj=self._ask if gradients else None)
                self._channel.send({"done": done})
            sends_all = before == booster.num_boosted_rounds() or drops_trees(booster)
            grown = booster if sends_all else booster[before:]
            self._channel.send({"grown": True}, {"model": grown.save_raw("ubj")})

    def _ask(self, margins: Any, data: Any) -> Any:
        """Ask the site's process for the gradients of its custom objective."""
        import numpy

        flat = numpy.ascontiguousarray(margins, numpy.float32)
        self._channel.send({"margins": list(flat.shape)}, {"margins": flat.reshape(-1)})
        fields, arrays = self._channel.receive()
        return tuple(arrays[name].reshape(fields["shape"]) for name in ("gradient", "hessian"))

    def _reference(self, fields: dict[str, Any], arrays: dict[str, Any]) -> Any:
        """A matrix of few rows that has the agreed bins; the training matrix takes them over."""
        return self._xgboost.QuantileDMatrix(
            arrays["reference"].reshape(fields["reference"]),
            feature_types=fields["types"],
            enable_categorical=True,
            max_bin=fields["max_bin"],
            nthread=fields["threads"],
        )

    def _matrix(self, fields: dict[str, Any], arrays: dict[str, Any], reference: Any) -> Any:
        from scipy.sparse import csr_matrix

        rows = csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=fields["shape"])
        count = fields["shape"][0]
        plain = ("weight", "group", "feature_weights", "label_lower_bound", "label_upper_bound")
        columns: dict[str, Any] = {name: arrays[name] for name in plain if name in arrays}
        for name in ("label", "base_margin"):
            if name in arrays:
                wide = arrays[name].reshape(count, -1) if count else arrays[name]
                columns[name] = wide[:, 0] if count and wide.shape[1] == 1 else wide
        return self._xgboost.QuantileDMatrix(
            rows,
            ref=reference,
            feature_names=fields["names"],
            feature_types=fields["types"],
            enable_categorical=True,
            max_bin=fields["max_bin"],
            nthread=fields["threads"],
            **columns,
        )


if __name__ == "__main__":
    main()
