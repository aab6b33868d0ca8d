"""Records what admins and site daemons of this version say to a federation's server, for later versions to replay.

Before a release: `PYTHONPATH=.:tests/_support python tests/_support/record_calls.py tests/fixtures/VERSION`.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from federation_bench import at_once
from study import Study

from fl_runtime.wire.software import OWN

W = {"w": np.zeros(3, np.float32)}
ROOM = {"slots": 1, "gpus": 0, "memory_bytes": 2**30}
FILE = "history.csv"


class Say(Protocol):
    """Makes a call in somebody's name, and returns all of its answers but signs of life: objects, or bytes."""

    def __call__(self, by: str, method: str, **fields: Any) -> list[Any]: ...


def scene(study: Study, say: Say) -> None:
    """A job that ends, and one that a site refuses, as an admin and two site daemons see them."""
    software = OWN.to_json()
    say("mina", "Status")
    say("lena", "SubmitJob", job={"app": "train", "name": "first", "rounds": 1, "min_sites": 2})
    for site in study.sites:
        say(site, "Assignment", running=[], resources=ROOM, software=software)
    say("north", "TellLog", job="first", text="its command runs", level="info")
    say("lena", "Watch", **{"job": "first", "from": 0})
    at_once([study.site(name) for name in study.sites], lambda site: site.take_part(W, lambda task: W, job="first"))
    assert study.server.wait_for_job("first", 30)
    say("north", "Status", software=software)
    say("lena", "ShowJob", job="first")
    say("lena", "Watch", **{"job": "first", "from": 0})
    say("lena", "Download", **{"job": "first", "file": FILE, "from": 0})
    say("lena", "SubmitJob", job={"app": "train", "name": "second", "rounds": 1, "min_sites": 1})
    say("north", "Assignment", running=[], resources=ROOM, software=software)
    say("north", "RefuseJob", job="second", reason="no ethics vote")
    say("lena", "AbortJob", job="second")
    say("lena", "ResumeJob", job="second")
    say("lena", "AbortJob", job="second")
    say("lena", "Status")
    say("lena", "DeleteJob", job="second")


def answers_to(study: Study, by: str, method: str, fields: Mapping[str, Any]) -> list[Any]:
    """Make one call of the scene, and return its answers."""
    if method == "Download":
        return list(study.admin(by).stream(method, **fields))
    found: list[Any] = []
    for answer in study.admin(by).answers(method, **fields):
        if "waiting" not in answer:
            found.append(answer)
            if method == "Assignment" or "event" in answer:  # the first one; more would depend on the moment
                break
    return found


def record(folder: Path) -> list[dict[str, Any]]:
    """Play the scene, and return its calls: who, method, fields and answers."""
    calls: list[dict[str, Any]] = []
    with Study(folder) as study:

        def say(by: str, method: str, **fields: Any) -> Sequence[Any]:
            answers = answers_to(study, by, method, fields)
            shown = [base64.b64encode(a).decode() if isinstance(a, bytes) else a for a in answers]
            told = json.loads(json.dumps(shown).replace(str(folder), "FOLDER"))
            calls.append({"by": by, "method": method, "fields": fields, "answers": told})
            return answers

        scene(study, say)
    return calls


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (out / "calls.json").write_text(json.dumps(record(Path(folder)), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
