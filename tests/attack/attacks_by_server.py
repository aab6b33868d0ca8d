"""Hostile variants: a server that turns on a site."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from attack_server import MODEL, HostileServer, Script
from attack_table import Attack
from attacks_joining import ESCAPES

from fl_runtime.wire.fl.v1 import federation_pb2 as pb


def scripted(**fields: Any) -> Callable[[HostileServer], object]:
    return lambda server: server.besiege(Script(**fields))


def with_model(**arrays: Any) -> Callable[[HostileServer], object]:
    """Send a model to train that has these tensors, or lacks those that are None."""
    model = {name: array for name, array in {**MODEL, **arrays}.items() if array is not None}
    return scripted(model=model)


def changed(change: Callable[[pb.TaskHeader], object]) -> Callable[[HostileServer], object]:
    return scripted(task_change=change)


def set_payload(**fields: Any) -> Callable[[HostileServer], object]:
    def change(task: pb.TaskHeader) -> None:
        for name, value in fields.items():
            setattr(task.payload, name, value)

    return changed(change)


def huge(task: pb.TaskHeader) -> None:
    task.payload.manifest.tensors[0].shape[:] = [2**43]
    task.payload.inline = b""


_A = partial(Attack, "server", phase="apart")
_BODY = MODEL["body"]
_NAME = "does not accept as a name"
_SETTINGS = "settings|cannot be read"

ATTACKS = (
    _A("a job outside the folder", "server", scripted(settings={"name": "../../x"}), _NAME),
    _A("a job with an absolute name", "server", scripted(settings={"name": "/tmp/x"}), _NAME),
    _A("a job without a name", "server", scripted(settings={"name": ""}), _NAME),
    _A("a job whose name is a number", "server", scripted(settings={"name": 7}), _NAME),
    _A("a site outside the folder", "server", scripted(join={"site": "../x"}), _NAME),
    _A("settings nested 100,000 deep", "server", scripted(join={"settings_json": "[" * 10**5}), _NAME),
    _A("settings that are a list", "server", scripted(join={"settings_json": "[]"}), _NAME),
    _A(
        "a strategy that does not exist",
        "server",
        scripted(settings={"strategy": "os.system"}),
        "unknown strategy|strategy",
    ),
    _A("a strategy of another type", "server", scripted(settings={"strategy": [1]}), _SETTINGS),
    _A("filters of another type", "server", scripted(settings={"filters": 7}), _SETTINGS),
    _A(
        "a filter that does not exist", "server", scripted(settings={"filters": [{"name": "__import__"}]}), "__import__"
    ),
    _A("a budget of another type", "server", scripted(settings={"every": {"x": 1}}), "every|" + _SETTINGS),
    _A("a protocol of the future", "server", scripted(join={"protocol": 99}), "protocol"),
    _A(
        "raw garbage as a welcome", "server", scripted(raw={"Join": (b"\xff" * 100,)}), "JoinReply|cannot be read|not a"
    ),
    _A(
        "raw garbage as the number of rounds",
        "server",
        scripted(raw={"Register": (b"\xff" * 100,)}),
        "RegisterReply|not a",
    ),
    _A(
        "a question about names that it must not ask",
        "server",
        scripted(
            raw={"Register": (pb.RegisterReply(question=pb.NameQuestion(name="x", stop=2**31)).SerializeToString(),)}
        ),
        "x|names",
    ),
    _A("raw garbage as a task", "server", scripted(raw={"Next": (b"\xff" * 100,)}), "TaskPart|not a"),
    _A("a task of an unknown kind", "server", scripted(task={"kind": "run_this"}), "run_this"),
    _A(
        "the initial model in round 1",
        "server",
        scripted(task={"kind": "initial"}, policy="initial: false\n"),
        "'initial' in round 1",
    ),
    _A("the initial model, which the policy keeps", "server", scripted(policy="initial: false\n"), "initial: false"),
    _A("settings of a task that are a list", "server", scripted(task={"config_json": "[1]"}), "settings|config|task"),
    _A(
        "settings of a task nested 100,000 deep",
        "server",
        scripted(task={"config_json": "[" * 10**5}),
        "settings|config|task",
    ),
    _A("NaN", "server", with_model(body=np.full((4, 3), np.nan, np.float32)), "NaN or infinite values in body"),
    _A("infinity", "server", with_model(body=np.full((4, 3), np.inf, np.float32)), "NaN or infinite values in body"),
    _A("a tensor that was not registered", "server", with_model(secret=_BODY), "secret differs"),
    _A("a tensor less", "server", with_model(head=None), "head differs"),
    _A("another dtype", "server", with_model(body=_BODY.astype(np.float64)), "body differs"),
    _A("another shape", "server", with_model(body=_BODY.T.copy()), "body differs"),
    _A("a tensor of 32 TiB", "server", changed(huge), "announces a model of"),
    _A("a total of 2**63 bytes", "server", set_payload(total_bytes=2**63), "the site has trained"),
    _A("digests that are wrong", "server", set_payload(digests=b"d" * 16), "damaged"),
    _A("a file of the site", "server", set_payload(file="../secret.txt", inline=b""), "file|bytes|ended|shared"),
    _A("a folder of the site", "server", scripted(join={"shared_folder": "/etc"}), "the site has trained"),
    _A("a task of another job", "server", scripted(task={"job": "another"}), "a task of the job 'another'"),
    _A(
        "a stage that steers a terminal",
        "server",
        scripted(task={"stage": ESCAPES}),
        "stage|printable|the site has trained",
    ),
)
