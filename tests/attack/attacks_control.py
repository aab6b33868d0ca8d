"""Hostile variants: calls about jobs, from those who may not make them and from a careless lead."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from attack_client import Attacker
from attack_table import Attack
from attacks_joining import ESCAPES

_NUMBERS = itertools.count()


def asks(method: str, **fields: Any) -> Callable[[Attacker], object]:
    return lambda attacker: attacker.ask(method, fields)


def raw(method: str, message: bytes) -> Callable[[Attacker], object]:
    return lambda attacker: attacker.call(method, message)


def submits(**fields: Any) -> Callable[[Attacker], object]:
    """Submit a job with these fields. One that is taken is aborted, so that the next one can begin."""

    number = next(_NUMBERS)

    def send(attacker: Attacker) -> object:
        name = attacker.ask("SubmitJob", {"job": {"name": f"idle-{number}", "app": "x", "rounds": 1, **fields}})["job"]
        return f"runs, and was aborted: {attacker.ask('AbortJob', {'job': name})['ended']}"

    return send


def crl(attacker: Attacker) -> object:
    """Send the revocation list of before, with "gone" in it cut off."""
    lines = attacker.federation.crl.splitlines()
    return attacker.ask("Revoke", {"crl": "\n".join([lines[0], *lines[2:]])})


_A = partial(Attack, "control")
_JOB = {"app": "x", "rounds": 1, "name": "intruder"}
_DENIED = "may not"

CALLS = (
    _A("a job by a site", "evil", asks("SubmitJob", job=_JOB), _DENIED),
    _A("a job by an observer", "mina", asks("SubmitJob", job=_JOB), _DENIED),
    _A("an abort by a site", "evil", asks("AbortJob", job="siege"), _DENIED),
    _A("an abort by an observer", "mina", asks("AbortJob", job="siege"), _DENIED),
    _A("an abort by another organisation's lead", "lars", asks("AbortJob", job="siege"), "only its own jobs"),
    _A("the events by a site", "evil", asks("Watch", job="siege"), _DENIED),
    _A("a revocation by a site", "evil", asks("Revoke", crl=""), _DENIED),
    _A("a revocation by an observer", "mina", asks("Revoke", crl=""), _DENIED),
    _A("a revocation by a lead", "lena", asks("Revoke", crl=""), _DENIED),
    _A("a revocation list that is none", "ada", asks("Revoke", crl="x" * 1000), "not a revocation list"),
    _A("a revocation list that was changed", "ada", crl, "not a revocation list"),
    _A("a revocation list of another type", "ada", asks("Revoke", crl=["x"]), "no 'crl' of type str"),
    _A("the task of an admin", "ada", asks("Assignment"), _DENIED),
    _A("a job that would pass all others", "lena", asks("SubmitJob", job=_JOB, priority=10**9), "is not possible"),
    _A("a priority that is no number", "lena", asks("SubmitJob", job=_JOB, priority="high"), "not a whole number"),
    _A(
        "the files of the server's journal",
        "mina",
        asks("Download", job="siege", file="server/journal.sqlite"),
        "no file",
    ),
    _A("a file outside the job", "mina", asks("Download", job="siege", file="../../kits/server/key.pem"), "no file"),
    _A("the deletion of a job of another admin", "lars", asks("DeleteJob", job="siege"), "only its own jobs"),
    _A("the deletion of a job that runs", "lena", asks("DeleteJob", job="siege"), "has not ended"),
    _A("a job that is no object", "lena", asks("SubmitJob", job="x"), "no 'job' of type dict"),
    _A("the events of a job outside the folder", "mina", asks("Watch", job="../../etc"), "there is no job"),
    _A("the events of a job with an absolute name", "mina", asks("Watch", job="/etc/passwd"), "there is no job"),
    _A("the events of a job of 4,000 characters", "mina", asks("Watch", job="a" * 4000), "there is no job"),
    _A("the abort of a job that steers a terminal", "lena", asks("AbortJob", job=ESCAPES), "there is no job"),
    _A("a request of 1 MB", "mina", asks("Status", x="y" * 10**6), "not a JSON object of at most"),
    _A("a request nested 100,000 deep", "mina", raw("Status", b"[" * 10**5), "not a JSON object"),
    _A("a request that is a list", "mina", raw("Status", b"[]"), "not a JSON object"),
    _A("raw garbage", "mina", raw("Status", b"\xff" * 1000), "not a JSON object"),
    _A("a request of 7 MB", "mina", raw("Status", b" " * 7 * 10**6), "not a JSON object of at most"),
    _A("a call that does not exist", "evil", lambda a: a.call("Join", b"\x0a\xff"), "not a JoinRequest"),
)

_J = partial(Attack, "jobs", phase="idle")
_NAME = "name|cannot be called"

JOBS = (
    _J("a name outside the folder", "lena", submits(name="../x"), _NAME),
    _J("an absolute name", "lena", submits(name="/tmp/x"), _NAME),
    _J("a name of 4,000 characters", "lena", submits(name="a" * 4000), _NAME),
    _J("a name that steers a terminal", "lena", submits(name=ESCAPES), _NAME),
    _J("an empty name", "lena", submits(name=""), _NAME),
    _J("a name that begins with a dot", "lena", submits(name=".current.json"), _NAME),
    _J("the name of a file of the server", "lena", submits(name="current.json"), "runs, and was aborted: True"),
    _J("a name of another type", "lena", submits(name=["x"]), _NAME),
    _J("rounds of another type", "lena", submits(rounds="3"), "rounds"),
    _J("negative rounds", "lena", submits(rounds=-1), "rounds"),
    _J("8 billion rounds", "lena", submits(rounds=2**33), "rounds"),
    _J("an infinite deadline", "lena", submits(deadline_s=float("inf")), "deadline_s"),
    _J("a deadline of NaN", "lena", submits(deadline_s=float("nan")), "deadline_s"),
    _J("an infinite patience", "lena", submits(patience=float("inf")), "patience"),
    _J("a strategy that does not exist", "lena", submits(strategy="os.system"), "strategy"),
    _J("a strategy with NaN", "lena", submits(strategy="fedadam:lr=nan"), "lr"),
    _J("a strategy with 1e400", "lena", submits(strategy="fedadam:lr=1e400"), "lr"),
    _J("a strategy with code", "lena", submits(strategy="fedadam:lr=__import__('os')"), "lr"),
    _J("a site outside the folder", "lena", submits(sites=["../north"]), "sites"),
    _J("a billion sites", "lena", submits(sites=10**9), "sites"),
    _J("a site twice", "lena", submits(sites=["north", "north"]), "sites"),
    _J("a site called global", "lena", submits(sites=["global"]), "sites"),
    _J("no site", "lena", submits(sites=[]), "sites"),
    _J("a quorum of a billion", "lena", submits(min_sites=10**9), "min_sites"),
    _J("a negative weight of a site", "lena", submits(site_weights={"north": -1.0}), "site_weights"),
    _J("an infinite weight of a site", "lena", submits(site_weights={"north": float("inf")}), "site_weights"),
    _J("a filter that does not exist", "lena", submits(filters=[{"name": "__import__"}]), "filter"),
    _J("a filter of another type", "lena", submits(filters=["x"]), "filters"),
    _J("a file of the server as the first model", "lena", submits(initial="/etc/passwd"), "initial"),
    _J("an app that steers a terminal", "lena", submits(app=ESCAPES), "app"),
    _J("a metric that steers a terminal", "lena", submits(best_metric=ESCAPES), "metric"),
    _J("a metric that is a formula", "lena", submits(best_metric="=1+1"), "metric"),
    _J("a field that does not exist", "lena", submits(run_this="rm -rf /"), "run_this"),
    _J("the field of another job's submitter", "lena", submits(submitted_by="ada"), "submitted_by"),
    _J("a seed of 2**70", "lena", submits(seed=2**70), "seed"),
    _J("a negative seed", "lena", submits(seed=-1), "seed"),
    _J("a budget of 10**30 epochs", "lena", submits(every=f"{10**30} epochs"), "every"),
    _J("a budget of no steps", "lena", submits(every=0), "every"),
    _J("100,000 patterns", "lena", submits(keep_local=["*" * 100] * 10**5), "at most|keep_local"),
    _J("a fraction of NaN", "lena", submits(fraction=float("nan")), "fraction"),
    _J("2**40 trainings", "lena", submits(trainings=2**40), "trainings"),
    _J("a rejoin time of 1e300 s", "lena", submits(rejoin_s=1e300), "rejoin_s"),
)

ATTACKS = (*JOBS, *CALLS)
