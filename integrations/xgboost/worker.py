"""Run as a process of its own by `engine.py`: grows trees with the other sites' workers, in XGBoost's own collective.

A process of its own because XGBoost ends the whole process when another worker has failed. It uses the standard
library, NumPy and XGBoost alone. Where the system lets it, it moves into a network namespace with nothing but a
loopback, so that the ports that XGBoost opens on all interfaces can be reached by nobody.

It is given two sockets: commands (a JSON line, then arrays) and a helper that makes sockets within the namespace.
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
    commands, helper = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    if sys.argv[3] == "isolated":
        isolate()
    threading.Thread(target=make_sockets, args=(helper,), daemon=True).start()
    channel = Channel(commands)
    channel.send({"network": network()})
    try:
        Worker(channel).run()
    except Exception as error:
        channel.send({"error": f"{type(error).__name__}: {error}".split("\nStack trace")[0]})
        os._exit(1)  # not through the collective's end, which would wait for the others


def isolate() -> None:
    """Leave the machine's network for a loopback of one's own, where that is allowed."""
    if sys.platform != "linux" or ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        return
    import fcntl

    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP_RUNNING))
        # A route to everywhere that leads nowhere: XGBoost 2 looks for the address it would use to reach others.
        device, anywhere = ctypes.create_string_buffer(b"lo"), struct.pack("H14x", socket.AF_INET)
        place = (anywhere, bytes(16), anywhere, _ROUTE_UP, ctypes.addressof(device))
        fcntl.ioctl(
            any_socket, _SIOCADDRT, struct.pack("@L16s16s16sHhLPhPLLH", 0, *place[:4], 0, 0, 0, 0, place[4], 0, 0, 0)
        )


def network() -> str:
    """The network that this process is in: another name for every one, on every machine."""
    if sys.platform != "linux":
        return socket.gethostname()
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{os.readlink('/proc/self/ns/net')} of {file.read().strip()}"


def make_sockets(helper: socket.socket) -> None:
    """Answer requests {"listen": [host, port]} or {"from": host} with a socket, or with why there is none."""
    while line := helper.recv(4096):
        wanted = json.loads(line)
        made = socket.socket()
        try:
            if "listen" in wanted:
                made.bind(tuple(wanted["listen"]))
                made.listen(_BACKLOG)
            else:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                made.bind((wanted["from"], 0))
            socket.send_fds(helper, [json.dumps({"port": made.getsockname()[1]}).encode()], [made.fileno()])
        except OSError as error:
            helper.send(json.dumps({"error": str(error), "errno": error.errno}).encode())
        finally:
            made.close()


class Channel:
    """Messages: a JSON object and arrays, both ways over one stream socket."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._lock = threading.Lock()

    def send(self, fields: dict[str, Any], arrays: dict[str, Any] | None = None) -> None:
        """arrays: name -> NumPy array or bytes."""
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
        """EOFError when the other side has gone."""
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
                taken = self._line.recv_into(view)
            except OSError:
                taken = 0
            if not taken:
                raise EOFError
            view = view[taken:]
        return data


def drops_trees(booster: Any) -> bool:
    """Whether a new tree changes the weights of those before it: dart, which is in the usual booster since 3.3."""
    found = json.loads(booster.save_config())["learner"]["gradient_booster"]
    dropout = found.get("dart_train_param", {})
    return found["name"] == "dart" or any(float(dropout.get(name, 0)) > 0 for name in ("rate_drop", "one_drop"))


class Worker:
    """One generation: data, the collective, and boosting rounds on command."""

    def __init__(self, channel: Channel) -> None:
        # XGBoost's adapters for these take two thirds of the time of its import; this process does not need them.
        sys.modules.update(dict.fromkeys(("sklearn", "pandas")))  # type: ignore[arg-type]
        import xgboost  # after isolate(): a process with threads may not leave its network

        self._xgboost, self._channel = xgboost, channel
        self._tracker: Any = None
        self._with_gradients = False

    def run(self) -> None:
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
        """Commands {"boost": [iterations]} until {"end": true}; each is answered with the model, or its new rounds."""
        while "boost" in (command := self._channel.receive()[0]):
            before = booster.num_boosted_rounds()
            booster.set_param(command["params"])
            for iteration in command["boost"]:
                booster.update(data, iteration, fobj=self._ask if gradients else None)
            whole = before == booster.num_boosted_rounds() or drops_trees(booster)
            grown = booster if whole else booster[before:]
            self._channel.send({"grown": True}, {"model": grown.save_raw("ubj")})

    def _ask(self, margins: Any, data: Any) -> Any:
        """The gradients, which the site's own function gives in the site's own process."""
        import numpy

        flat = numpy.ascontiguousarray(margins, numpy.float32)
        self._channel.send({"margins": list(flat.shape)}, {"margins": flat.reshape(-1)})
        fields, arrays = self._channel.receive()
        return tuple(arrays[name].reshape(fields["shape"]) for name in ("gradient", "hessian"))

    def _reference(self, fields: dict[str, Any], arrays: dict[str, Any]) -> Any:
        """A matrix of few rows whose bins are the agreed ones: the next one takes them over."""
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
