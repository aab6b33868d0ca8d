"""Starts and watches this site's worker in XGBoost's collective: one child process per generation.

A generation is a set of member sites whose workers grow trees together. A new one starts from the global model when
the members change or the last generation has broken.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xgboost

from fl_adapters.participant.session import Session
from fl_runtime.aggregation.trees.document import TreeModel
from fl_runtime.errors import ConnectionLostError, FederationError
from fl_runtime.transport.tunnel import Stream, Tunnel
from fl_runtime.types import Array, Arrays

from .call import TrainCall
from .data import rows_of
from .model import SEEDING, without_categories
from .ring import Ring, Sockets
from .worker import Channel

_GRACEFUL_EXIT_S = 10.0
_NAME_CHARS = 20
_ABOVE_ALL = 1e38  # twice this, which XGBoost makes the last cut, is still a float32
ISOLATED = True
"""Whether workers try to leave the machine's network. If not, they listen on all addresses, so sites on one machine
connect directly instead of through the relay."""
# words in XGBoost's error texts that mean a lost peer, not a wrong parameter
_CONNECTION_WORDS = (
    "collective",
    "rabit",
    "socket",
    "connect",
    "tracker",
    "timeout",
    "timed out",
    "broken pipe",
    "reset by",
)


Gradients = Callable[[Any, xgboost.DMatrix], Any]
"""Custom objective: (margins, data) -> (gradient, hessian)."""


class BrokenError(Exception):
    """A generation ended because a worker, a connection or a site failed. It can be tried again."""


class WorkerError(FederationError):
    """Raised if this site's worker failed for a reason of its own, such as wrong parameters."""

    code = "xgboost"


class Engine:
    """Runs the generations of one training, one at a time."""

    def __init__(self, session: Session, call: TrainCall, timeout_s: int) -> None:
        self._session, self._call, self._timeout_s = session, call, timeout_s
        self._lock = threading.Lock()
        self._tunnel: Tunnel | None = None
        self._generation: _Generation | None = None
        self._early_streams: list[Stream] = []  # streams of a generation that this site has not started yet
        self._last_ended = (0, 0)  # (round, stage) of the newest generation that has ended here
        self._closed_tunnel_bytes = (0, 0)

    @property
    def bytes_up(self) -> int:
        """Bytes sent through tunnels so far."""
        return self._closed_tunnel_bytes[0] + (self._tunnel.bytes_up if self._tunnel else 0)

    @property
    def bytes_down(self) -> int:
        """Bytes received through tunnels so far."""
        return self._closed_tunnel_bytes[1] + (self._tunnel.bytes_down if self._tunnel else 0)

    def fits(self, members: Sequence[str]) -> bool:
        """Whether the running generation has exactly these members, in this order."""
        return self._generation is not None and self._generation.members == list(members)

    def begin(self, name: str, members: Sequence[str], model: TreeModel, cuts: Arrays) -> None:
        """Start a generation, which all members do at the same time.

        Args:
            name: Name of the generation, "<round>.<stage>", the same at all members.
            members: Names of the sites, in the same order at all members.
            model: The global model to continue from.
            cuts: The agreed bins.

        Raises:
            BrokenError: If the workers cannot connect to each other.
            WorkerError: If this site's worker refuses the data or the parameters.
        """
        self.end(gently=False)
        try:
            tunnel = self._open_tunnel()
            worker = _WorkerProcess(ISOLATED)
        except OSError as error:
            raise BrokenError(f"the tunnel cannot be opened, or the worker cannot be started: {error}") from None
        generation = _Generation(name, list(members), worker)
        try:
            worker.prepare(self._call, model, cuts, members, self._session.name, self._timeout_s)
            generation.ring = Ring(
                self._session.name,
                members,
                name,
                worker.sockets,
                tunnel.open,
                self._session.seal,
                worker.network,
                worker.tracker_port,
            )
            host, port = generation.ring.begin()
            with self._lock:
                self._generation, early, self._early_streams = generation, self._early_streams, []
            for stream in early:
                self._accept(stream)
            worker.join(host, port, generation.ring.index)
        except (ConnectionLostError, BrokenError) as error:
            self._give_up(generation)
            raise BrokenError(str(error)) from None
        except BaseException:
            self._give_up(generation)
            raise

    def boost(
        self,
        iterations: Sequence[int],
        learning_rate: str,
        gradients: Gradients | None,
        done: Callable[[int], None],
    ) -> TreeModel:
        """Grow the trees of some iterations together with the other members.

        Args:
            iterations: Numbers of the iterations, the same at all members.
            learning_rate: Learning rate as XGBoost writes it.
            gradients: Custom objective, f(margins, data); None for XGBoost's own.
            done: Called after each iteration with the number of those that are done.

        Returns:
            The new trees.

        Raises:
            BrokenError: If the generation breaks.
            WorkerError: If this site's worker fails for a reason of its own.
        """
        assert self._generation is not None
        try:
            return self._generation.worker.boost(iterations, {"learning_rate": learning_rate}, gradients, done)
        except BrokenError:
            self.end(gently=False)
            raise

    def end(self, *, gently: bool) -> None:
        """End the running generation, if any.

        Args:
            gently: Whether all members end it together, after the last round.
        """
        with self._lock:
            generation = self._generation
        if generation is not None:
            # others may still connect while they shut down, so streams stay open until this returns
            generation.close(gently=gently)
            self._give_up(generation)

    def _give_up(self, generation: _Generation) -> None:
        """Leave a generation. Members that still connect to it are refused at once, so that they do not wait."""
        with self._lock:
            self._last_ended, self._generation = _round_and_stage(generation.name), None
            early, self._early_streams = self._early_streams, []
        generation.close(gently=False)
        for stream in early:
            self._accept(stream)

    def close(self) -> None:
        """End the running generation and close the tunnel. May be called again."""
        self.end(gently=False)
        if self._tunnel is not None:
            self._tunnel.close()

    def _open_tunnel(self) -> Tunnel:
        if self._tunnel is None:
            self._tunnel = self._session.tunnel(self._accept, self._tunnel_lost)
        return self._tunnel

    def _accept(self, stream: Stream) -> None:
        name = stream.name.partition("|")[0]
        with self._lock:
            generation = self._generation
            if generation is None or generation.name != name:
                early = _round_and_stage(name) > (_round_and_stage(generation.name) if generation else self._last_ended)
                if early:
                    self._early_streams = [*(item for item in self._early_streams if not item.is_over), stream]
                    return
                generation = None
        if generation is None or generation.ring is None:
            stream.close()
        else:
            generation.ring.incoming(stream)

    def _tunnel_lost(self) -> None:
        with self._lock:
            generation, tunnel, self._tunnel = self._generation, self._tunnel, None
        if tunnel is not None:
            self._closed_tunnel_bytes = (
                self._closed_tunnel_bytes[0] + tunnel.bytes_up,
                self._closed_tunnel_bytes[1] + tunnel.bytes_down,
            )
        if generation is not None and generation.ring is not None:
            generation.ring.close()  # the worker fails, and boost() raises BrokenError


class _Generation:
    def __init__(self, name: str, members: list[str], worker: _WorkerProcess) -> None:
        self.name, self.members, self.worker = name, members, worker
        self.ring: Ring | None = None

    def close(self, *, gently: bool) -> None:
        self.worker.close(gently=gently)
        if self.ring is not None:
            self.ring.close()


class _WorkerProcess:
    """The child process with the worker. All methods may raise BrokenError."""

    def __init__(self, isolated: bool) -> None:
        own_end, worker_end = socket.socketpair()
        helper, worker_helper_end = socket.socketpair()
        spec = importlib.util.find_spec(f"{__package__}.worker")
        assert spec is not None and spec.origin is not None
        command = [sys.executable, "-P", spec.origin, str(worker_end.fileno()), str(worker_helper_end.fileno())]
        with worker_end, worker_helper_end:
            self._process = subprocess.Popen(
                [*command, "isolated" if isolated else "shared"],
                pass_fds=(worker_end.fileno(), worker_helper_end.fileno()),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        self._commands, self._helper = own_end, helper
        self._channel = Channel(own_end)
        self.sockets = Sockets(helper)
        self.network = ""
        self.tracker_port: int | None = None

    def prepare(
        self, call: TrainCall, model: TreeModel, cuts: Arrays, members: Sequence[str], me: str, timeout_s: int
    ) -> None:
        """Send the data, the agreed bins and the model to continue from."""
        self.network = str(self._receive()[0]["network"])
        reference = reference_rows(cuts)
        params = {**call.params, **SEEDING, "max_bin": len(reference)}
        for name in ("eval_metric", "disable_default_eval_metric"):
            params.pop(name, None)
        threads = int(params.get("nthread") or params.get("n_jobs") or 0)
        fields = {
            "track": members[0] == me,
            "workers": len(members),
            "timeout_s": timeout_s,
            "params": json.loads(json.dumps(params, default=_jsonable)),
            "gradients": call.obj is not None,
            "max_bin": len(reference),
            "threads": threads or None,
            "names": call.dtrain.feature_names,
            "types": call.dtrain.feature_types,
            "reference": list(reference.shape),
        }
        rows = rows_of(call.dtrain)
        fields["shape"] = rows.pop("shape").tolist()
        model_bytes = np.frombuffer(without_categories(model).document(), np.uint8)
        self._send(fields, {**rows, "reference": reference.reshape(-1), "model": bytearray(model_bytes)})
        if fields["track"]:
            self.tracker_port = int(self._receive()[0]["tracker"])

    def join(self, host: str, port: int, index: int) -> None:
        """Join the collective; returns when all members have."""
        self._send({"host": host, "port": port, "index": index}, {})
        self._receive()

    def boost(
        self,
        iterations: Sequence[int],
        params: Mapping[str, str],
        gradients: Gradients | None,
        done: Callable[[int], None],
    ) -> TreeModel:
        self._send({"boost": list(iterations), "params": dict(params)}, {})
        while True:
            fields, arrays = self._receive()
            if "grown" in fields:
                new_trees = TreeModel.from_document(arrays["model"])
                return new_trees.iterations(new_trees.rounds - len(iterations))
            if "done" in fields:
                done(int(fields["done"]))
                continue
            assert gradients is not None
            gradient, hessian = gradients(arrays["margins"].reshape(fields["margins"]), None)
            answer = {"gradient": np.asarray(gradient, np.float32), "hessian": np.asarray(hessian, np.float32)}
            self._send(
                {"shape": list(answer["gradient"].shape)},
                {name: np.ascontiguousarray(value).reshape(-1) for name, value in answer.items()},
            )

    def close(self, *, gently: bool) -> None:
        if gently:
            try:
                self._send({"end": True}, {})
                self._process.wait(_GRACEFUL_EXIT_S)
            except (BrokenError, subprocess.TimeoutExpired):
                pass
        self._process.kill()  # from here on, a second call does no harm
        self._process.wait()
        self._commands.close()
        self._helper.close()

    def _send(self, fields: dict[str, Any], arrays: dict[str, Any]) -> None:
        try:
            self._channel.send(fields, arrays)
        except OSError as error:
            raise BrokenError(f"the worker has ended: {error}") from None

    def _receive(self) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            fields, arrays = self._channel.receive()
        except EOFError:
            raise BrokenError(f"the worker has ended (exit status {self._process.wait()})") from None
        if "error" in fields:
            text = str(fields["error"])
            if any(word in text.lower() for word in _CONNECTION_WORDS):
                raise BrokenError(text[:500])
            raise WorkerError(text[:2000], where="XGBoost, in this site's worker")
        return fields, arrays


def reference_rows(cuts: Arrays) -> Array:
    """Make rows from which XGBoost derives exactly the agreed bins.

    XGBoost cuts at each distinct value but the lowest, if `max_bin` is as large as their number. So the rows list a
    lowest value and then every cut. A highest value follows that no data reaches: XGBoost takes every row to lie below
    the last cut, and splits present from missing values there, while a prediction compares with the cut.

    Args:
        cuts: The agreed bins: "cuts" float32, "cut_ends" and "levels" int64 with an entry per feature.

    Returns:
        float32 [rows, features]. Their number is the `max_bin` that XGBoost must use, at least 2.
    """
    ends = [0, *cuts["cut_ends"].tolist()]
    columns = []
    for feature, levels in enumerate(cuts["levels"].tolist()):
        bounds = cuts["cuts"][ends[feature] : ends[feature + 1]].astype(np.float32)
        if levels:
            columns.append(np.arange(levels, dtype=np.float32))
        elif len(bounds):
            below = bounds[0] - max(abs(bounds[0]), np.float32(1))
            columns.append(np.concatenate([[below], bounds, [_ABOVE_ALL]]).astype(np.float32))
        else:
            columns.append(np.array([0, _ABOVE_ALL], np.float32))
    height = max(2, *(len(column) for column in columns))
    return np.stack([np.resize(column, height) for column in columns], axis=1)


def _round_and_stage(generation: str) -> tuple[int, int]:
    """Return the round and stage in a generation's name; for any other text a pair that comes before all rounds."""
    number, _, stage = generation.partition(".")
    if len(generation) > _NAME_CHARS or not (number.isdecimal() and (stage.isdecimal() or not stage)):
        return -1, 0
    return int(number), int(stage or 1)


def _jsonable(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
