"""Answers of a hostile server to calls about jobs, over mutual TLS: errors of our own, whatever they hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from federation_bench import errors_together
from study import Study

from fl_runtime.errors import FederationError, ProtocolError
from fl_runtime.text import parse_json
from fl_runtime.transport.base import Peer
from fl_runtime.transport.integrity import error_of

DEEP = "[" * 900 + "]" * 900


class Answering:
    """A guard that is replaced by one answer to every call."""

    def __init__(self, study: Study) -> None:
        self.answer = b""
        study.server._guard.handle = self.handle  # type: ignore[method-assign]

    def handle(self, method: str, peer: Peer, requests: Iterator[bytes]) -> Iterator[bytes]:
        yield self.answer


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    folder: Path = tmp_path_factory.mktemp("study")
    with Study(folder, ("north",)) as study:
        yield study


@pytest.mark.parametrize("method", ["Assignment", "Status", "SubmitJob", "AbortJob"])
@pytest.mark.parametrize(
    "answer",
    [b"\xff", b"[", b"7", b"{}", DEEP.encode(), b'{"job": ' + DEEP.encode() + b"}", b'{"job": 7, "running": []}'],
    ids=lambda answer: repr(answer)[:30],
)
def test_an_answer_without_the_fields_of_its_call_is_refused(study: Study, method: str, answer: bytes) -> None:
    Answering(study).answer = answer
    with pytest.raises(ProtocolError, match=f"the server's answer to {method}"):
        study.admin("ada").ask(method)


@pytest.mark.parametrize(
    "answer", [{"number": "1", "event": {}}, {"number": 1, "event": 7}, {"ended": 7}, {"ended": {"error": 7}}], ids=str
)
def test_events_that_are_none_end_following_with_an_error(study: Study, answer: dict[str, Any]) -> None:
    Answering(study).answer = json.dumps(answer).encode()
    (error,) = errors_together(lambda: list(study.admin("ada").follow("job")))
    assert isinstance(error, ProtocolError)


@pytest.mark.parametrize("data", [b"", b"7", b"[]", b"\xff", DEEP.encode(), b'{"what": "\\ud800"}'], ids=repr)
def test_an_error_that_is_none_becomes_one_of_ours(data: bytes) -> None:
    assert isinstance(error_of(data), ProtocolError)
    assert isinstance(error_of(b'{"code": 7, "what": []}'), FederationError)


@pytest.mark.parametrize(
    "text", [DEEP, "[" * 10**6, b"\xff", "{", '"\\udc00"', "9" * 5000, ""], ids=lambda x: repr(x)[:20]
)
def test_json_beyond_its_bounds_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


def test_json_within_its_bounds_is_what_json_says() -> None:
    value = {"a": [[[1.5, None, "\U0001f600"]]], "b": {str(n): [n] for n in range(100)}}
    assert parse_json(json.dumps(value)) == value
    with pytest.raises(ValueError, match="limit is 3"):
        parse_json("1234", limit_chars=3)
