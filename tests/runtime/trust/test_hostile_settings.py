"""Settings of absurd value from a server that turns on its sites, over mutual TLS: refused by name, before any work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, errors_together
from hostile_server import Hostile as HostileServer
from study import Study

from fl_adapters import FederationError, ProtocolError
from fl_runtime.wire import frames
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest

W = {"w": np.zeros(4, np.float32)}
DEEP = "[" * 900 + "]" * 900
HUGE = 2**63
LONG = "x" * 100_000

SETTINGS: dict[str, list[Any]] = {
    "sites": [[], ["x"] * 100_001],
    "min_sites": [0, -1, HUGE],
    "rounds": [0, -1, 2**33, HUGE],
    "strategy": [LONG],
    "deadline_s": [0, -1.0, 1e308, HUGE],
    "every": [0, -1, HUGE, LONG],
    "exchange": [LONG],
    "keep_local": [[LONG]],
    "best_metric": [LONG],
    "seed": [-1, 2**64],
    "rejoin_s": [0, 1e308],
    "patience_s": [0, 1e308],
    "join_s": [-1, 1e308],
    "app": [LONG],
    "submitted_by": [LONG],
    "fraction": [0, -1, 1.5],
    "max_share": [0, 2],
    "site_weights": [{"north": -1}, {"north": 1e308}],
    "patience": [0, 2**33],
    "min_delta": [-1, 1e308],
    "trainings": [0, 2**33],
}
CONFIG: dict[str, list[Any]] = {
    "to": [7, None, LONG],
    "sites": [7, ["north"], [["north", 1]], [["north", -1, 1.0]], [["north", 1, -1.0]], [["north", 1, "x"]]],
    "members": [7, [], [7], "north"],
    "turn": [7, LONG],
    "model": [7, []],
    "lora_frozen": [7, {}],
    "held_version": [-1, "x", 1.5, HUGE, True],
    "proximal_mu": [-1, "x", [], 1e308],
    "personal_mu": [-1, "x"],
    "control_variates": ["yes", 7],
    "metrics": [7, [], {"loss": "x"}, {"loss": None}],
}


class Hostile(HostileServer):
    """A server that sends other settings than those of its jobs."""

    def join(self, change: Callable[[pb.JoinReply], None]) -> None:
        def work(method: str, message: bytes) -> bytes:
            if method != "Join":
                return message
            reply = pb.JoinReply.FromString(message)
            change(reply)
            return reply.SerializeToString()

        self._change = work

    def setting(self, **values: Any) -> None:
        self.join(lambda reply: _set(reply, json.dumps({**json.loads(reply.settings_json), **values})))

    def task(self, config: str, kind: str = "") -> None:
        def work(method: str, message: bytes) -> bytes:
            if method != "Next" or frames.is_frame(message):
                return message
            part = pb.TaskPart.FromString(message)
            part.task.config_json = config
            part.task.kind = kind or part.task.kind
            return part.SerializeToString()

        self._change = work


def _set(reply: pb.JoinReply, text: str) -> None:
    reply.settings_json = text


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    folder: Path = tmp_path_factory.mktemp("study")
    with Study(folder, ("north",)) as study:
        study.job()
        yield study


@pytest.fixture(scope="module")
def hostile(study: Study) -> Hostile:
    return Hostile(study, lambda method, message: message)


def refused(work: Callable[[], object], what: object) -> ProtocolError:
    (error,) = errors_together(work)
    assert isinstance(error, ProtocolError), (what, error)
    return error


def test_every_setting_of_absurd_value_is_refused_by_name(study: Study, hostile: Hostile) -> None:
    site = study.site("north")
    for name, values in SETTINGS.items():
        for value in values:
            hostile.setting(**{name: value})
            error = refused(site.join, (name, value))
            assert f"settings of the job that cannot be right: {name} is" in error.what, (name, value, error.what)
            assert len(error.what) < 300
    hostile.setting(a_field_of_the_future=[1])
    assert site.join().settings["a_field_of_the_future"] == [1]


@pytest.mark.parametrize("text", ["", "7", "[]", "{", DEEP, '{"name": ' + DEEP + "}", '{"name": "\\ud800"}'], ids=repr)
def test_settings_that_are_none_are_refused(study: Study, hostile: Hostile, text: str) -> None:
    hostile.join(lambda reply: _set(reply, text))
    refused(study.site("north").join, text)


@pytest.mark.parametrize(("field", "value"), [("index", 7), ("count", 0), ("count", 2**31), ("attempt", 0)])
def test_a_place_in_the_run_that_cannot_be_is_refused(study: Study, hostile: Hostile, field: str, value: int) -> None:
    hostile.join(lambda reply: setattr(reply, field, value))
    assert "the server calls this site number" in refused(study.site("north").join, field).what


def joined(study: Study, hostile: Hostile) -> Site:
    hostile._change = lambda method, message: message
    site = study.site("north")
    site.join()
    site.register(W)
    return site


def test_every_setting_in_a_task_of_absurd_value_is_refused_by_name(study: Study, hostile: Hostile) -> None:
    site = joined(study, hostile)
    for name, values in CONFIG.items():
        for value in values:
            hostile.task(json.dumps({name: value}))
            error = refused(site.client.next_task, (name, value))
            assert f"that cannot be right: {name} is" in error.what, (name, value, error.what)
    for text in ("7", "[]", "{", DEEP, '{"to": ' + DEEP + "}"):
        hostile.task(text)
        assert "not a JSON object" in refused(site.client.next_task, text).what
    for kind, needed in (("share", "to"), ("aggregate", "sites")):
        hostile.task("{}", kind)
        assert f"do not have {needed!r}" in refused(site.client.next_task, kind).what
    hostile.task('{"a_field_of_the_future": [1]}')
    assert site.client.next_task().config == {"a_field_of_the_future": [1]}


# -- what a hostile site sends -------------------------------------------------------------------------------------

TERMS = [DEEP, "7", "[]", "{", '{"patience": 0}', '{"patience": "3"}', '{"patience": true}', '{"patience": 1e400}']
TERMS += ['{"patience": 4294967296}', '{"min_delta": -1}', '{"min_delta": "1"}', '{"min_delta": 1e400}']
TERMS += ['{"min_delta": NaN}', '{"strategy": "\\ud800"}', '{"content": []}', '{"best_mode": 7}']
METRICS = [DEEP, '{"loss": ' + DEEP + "}", "[]", "7", "{", '{"loss": "\\ud800"}', '{"\\ud800": 1}']


def test_terms_and_metrics_that_are_none_are_refused(study: Study, hostile: Hostile) -> None:
    site = joined(study, hostile)
    session = pb.Session(job="job", attempt=site.welcome.attempt)
    manifest = Manifest.of(W).to_proto()
    for text in TERMS:
        request = pb.RegisterRequest(session=session, terms_json=text, manifest=manifest)
        assert "terms" in _refusal(site, "Register", request, text).what
    for text in METRICS:
        request = pb.ScoreRequest(session=session, version=0, num_examples=1, metrics_json=text)
        assert isinstance(_refusal(site, "Score", request, text), ProtocolError)


def _refusal(site: Site, method: str, request: Any, what: str) -> FederationError:
    (error,) = errors_together(lambda: list(site.transport.call(method, request.SerializeToString())))
    assert isinstance(error, FederationError), (what, error)
    return error
