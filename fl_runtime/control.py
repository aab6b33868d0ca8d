"""The client's side of the calls about jobs: JSON objects over the transport."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConnectionLostError, ProtocolError
from fl_runtime.transport.base import Transport

_PAUSE_S = 0.2


class ControlClient:
    """An admin's, or a site's, line to the server of its federation."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._heard = 0.0  # when the server has last said something, monotonic seconds

    @classmethod
    def of_kit(cls, folder: Path, address: str) -> ControlClient:
        """Over mutual TLS, with the credentials in a kit's folder."""
        from fl_runtime.transport.grpc import GrpcTransport
        from fl_runtime.transport.tls import FileCredentials

        return cls(GrpcTransport(address, credentials=FileCredentials(folder)))

    def ask(self, method: str, *, patience_s: float = 0.0, **fields: Any) -> dict[str, Any]:
        """The answer to a request. patience_s: how long a server that does not answer is waited for.

        Raises the server's error, or ConnectionLostError.
        """
        began = time.monotonic()
        while True:
            try:
                return self._last(method, fields)
            except ConnectionLostError:
                if time.monotonic() > max(began, self._heard) + patience_s:
                    raise
            time.sleep(_PAUSE_S)

    def follow(self, job: str, *, patience_s: float = 30.0) -> Iterator[Mapping[str, Any]]:
        """A job's events as the server tells them ({"event": ...}), then {"ended": ...}. Lost connections are made
        anew while the server does not stay away for longer than `patience_s`."""
        seen, began = 0, time.monotonic()
        while True:
            try:
                for answer in self._answers("Watch", {"job": job, "from": seen}):
                    if "event" in answer:
                        seen = answer["number"] + 1
                    if "waiting" not in answer:
                        yield answer
                    if "ended" in answer:
                        return
            except ConnectionLostError:
                if time.monotonic() > max(began, self._heard) + patience_s:
                    raise
            time.sleep(_PAUSE_S)

    def close(self) -> None:
        self._transport.close()

    def _last(self, method: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        answers = list(self._answers(method, fields))
        if not answers or "waiting" in answers[-1]:
            raise ConnectionLostError("the server ended the call without an answer")
        return answers[-1]

    def _answers(self, method: str, fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for message in self._transport.call(method, json.dumps(fields).encode()):
            try:
                answer = json.loads(message)
                assert isinstance(answer, dict)
            except (ValueError, AssertionError):
                raise ProtocolError(f"the server's answer to {method} is no JSON object") from None
            self._heard = time.monotonic()
            yield answer
