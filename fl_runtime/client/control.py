"""The client's side of the calls about jobs: JSON objects over the transport."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConnectionLostError, ProtocolError
from fl_runtime.text import parse_json
from fl_runtime.transport.base import Call, Transport
from fl_runtime.transport.waiting import Reminders, duration_text

_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 2.0

log = logging.getLogger(__name__)
_MAX_CHARS = 2**26
_FIX = "run the same version of fl-adapters here and at the server, or ask who runs the server"


class ControlClient:
    """An admin's or a site's connection to the server of its federation, for calls about jobs.

    Example:
        ```python
        client = ControlClient.of_kit(Path("admin-kit"), "federation.example.org:8443")
        print(client.ask("Status")["running"])
        client.close()
        ```
    """

    def __init__(self, transport: Transport) -> None:
        """Make a client.

        Args:
            transport: How to reach the server. The client closes it.
        """
        self._transport = transport
        self._under_way: Call | None = None
        self._last_answer = 0.0  # when the server has last answered, in monotonic seconds

    @classmethod
    def of_kit(cls, folder: Path, addresses: str | Sequence[str]) -> ControlClient:
        """A client that connects over mutual TLS, with the credentials of a kit.

        Args:
            folder: Folder of the kit.
            addresses: Addresses at which the server may be, each as "host:port"; one may be given as text.

        Returns:
            The client; it connects at the first call.
        """
        from fl_runtime.client.kit_transport import KitTransport

        return cls(KitTransport(folder, addresses))

    def ask(self, method: str, *, patience_s: float = 0.0, **fields: Any) -> dict[str, Any]:
        """Make a call, and wait for its answer.

        Args:
            method: Name of the call, such as "Status".
            patience_s: How long the server may be out of reach, in seconds.
            **fields: The request's fields; JSON values.

        Returns:
            The answer's fields.

        Raises:
            ConnectionLostError: The server is out of reach.
            FederationError: The server refused the call.
        """
        began, reminders, pause_s = time.monotonic(), Reminders(), _PAUSE_S
        while True:
            try:
                return self._final_answer(method, fields)
            except ConnectionLostError as error:
                if not self._is_patient(began, patience_s, reminders, error.what):
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def answers(self, method: str, **fields: Any) -> Iterator[dict[str, Any]]:
        """Make a call once, and yield every answer, among them the signs of life while the server waits.

        Args:
            method: Name of the call, such as "Assignment".
            **fields: The request's fields; JSON values.

        Yields:
            The fields of each answer.

        Raises:
            ConnectionLostError: The server is out of reach, or the call was interrupted.
            FederationError: The server refused the call.
        """
        yield from self._answers(method, fields)

    def interrupt(self) -> None:
        """End the call under way, if any. May be called by any thread."""
        call = self._under_way
        if call is not None:
            call.cancel()

    def follow(self, job: str, *, patience_s: float = 30.0, steps: bool = False) -> Iterator[Mapping[str, Any]]:
        """Follow a job's events until it has ended. Lost connections are made again.

        Args:
            job: Name of the job.
            patience_s: How long the server may be out of reach, in seconds.
            steps: Yield events of the kind "steps", too: how far the sites' local training is.

        Yields:
            `{"number": ..., "event": ...}` for every event from the first one on, then `{"ended": ...}`.

        Raises:
            ConnectionLostError: The server is out of reach.
            FederationError: The server refused the call.
        """
        next_number, began, reminders, pause_s = 0, time.monotonic(), Reminders(), _PAUSE_S
        while True:
            try:
                for answer in self._answers("Watch", {"job": job, "from": next_number, "steps": steps}):
                    reminders, pause_s = Reminders(), _PAUSE_S
                    if "event" in answer:
                        next_number = answer["number"] + 1
                    if "waiting" not in answer:
                        yield answer
                    if "ended" in answer:
                        return
            except ConnectionLostError as error:
                if not self._is_patient(began, patience_s, reminders, error.what):
                    raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _is_patient(self, began: float, patience_s: float, reminders: Reminders, why: str) -> bool:
        """Whether to call again. Logs now and then for how long the server has not answered, and why."""
        away_s = time.monotonic() - max(began, self._last_answer)
        if away_s > patience_s:
            return False
        if reminders.due(away_s):
            text = "the server has not answered for %s; waiting up to %s (%s)"
            log.warning(text, duration_text(away_s), duration_text(patience_s), why)
        return True

    def stream(self, method: str, **fields: Any) -> Iterator[bytes]:
        """Make a call that is answered with bytes in place of JSON, such as "Download".

        Args:
            method: Name of the call.
            **fields: The request's fields; JSON values.

        Yields:
            The pieces of the answer.

        Raises:
            ConnectionLostError: The connection broke.
            FederationError: The server refused the call.
        """
        for message in self._transport.call(method, json.dumps(fields).encode()):
            self._last_answer = time.monotonic()
            yield message

    def close(self) -> None:
        """Close the connection to the server."""
        self._transport.close()

    def _final_answer(self, method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        answers = list(self._answers(method, fields))
        if not answers or "waiting" in answers[-1]:
            raise ConnectionLostError("the server ended the call without an answer")
        return answers[-1]

    def _answers(self, method: str, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self._under_way = self._transport.call(method, json.dumps(fields).encode())
        for message in self._under_way:
            answer = _answer(method, message)
            self._last_answer = time.monotonic()
            yield answer


_ERROR = (None, {"what": str})
_JOB = {"job": str, "submitted_by": str, "phase": str, "round": int, "rounds": (None, int), "sites": {"*": str}}
_ROUND = {"round": int, "sites": [str], "missing": [str], "metrics": dict}
_OUTCOME = {"error": _ERROR, "rounds": [_ROUND], "folder": str}
_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "Assignment": {"job": str, "app": str, "submitted_by": str, "index": int, "count": int},
    "Status": {"federation": str, "version": str, "time": (int, float), "sites": [str], "running": (None, _JOB)}
    | {"ended": {"*": {"error": _ERROR, "rounds": list}}},
    "SubmitJob": {"job": str},
    "AbortJob": {"job": str},
    "Revoke": {"ended": [str]},
    "ReadAudit": {"lines": [dict], "begin": int, "end": int},
}
_EVENT = {"number": int, "event": {"kind": str, "time": (int, float), "round": int, "site": str, "data": dict}}
_ENDED = {"ended": _OUTCOME}


def _answer(method: str, message: bytes) -> dict[str, Any]:
    """Read an answer. Raises ProtocolError if it does not have the fields that its readers need."""
    try:
        answer = parse_json(message, limit_chars=_MAX_CHARS)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ProtocolError(f"the server's answer to {method} is not a JSON object", fix=_FIX)
    shape = (_ENDED if "ended" in answer else _EVENT) if method == "Watch" else _SHAPES.get(method, {})
    if "waiting" not in answer and not _fits(answer, shape):
        raise ProtocolError(f"the server's answer to {method} does not have the fields that it should have", fix=_FIX)
    return answer


def _fits(value: object, shape: Any) -> bool:
    """Whether a value has a shape: a type, None, a tuple of alternatives, [shape of the items], or shapes of fields.

    The field "*" stands for all fields.
    """
    if isinstance(shape, tuple):
        return any(_fits(value, alternative) for alternative in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(item, shape[0]) for item in value)
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return False
        if "*" in shape:
            return all(_fits(item, shape["*"]) for item in value.values())
        return all(_fits(value.get(name), part) for name, part in shape.items())
    return value is None if shape is None else type(value) is shape
