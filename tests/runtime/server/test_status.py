"""What `status` tells: who is connected at this moment, who trains, who waits, and how jobs ended."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from federation_bench import at_once, started
from study import Study, until

W = {"w": np.zeros(3, np.float32)}


def status(study: Study) -> Any:
    return study.admin("mina").ask("Status")


def states_in(study: Study, job: str) -> dict[str, str]:
    (found,) = [item for item in status(study)["jobs"] if item["job"] == job]
    return dict(found["site_states"])


def test_who_is_absent_waits_or_trains_is_told_as_it_is(study: Study) -> None:
    assert status(study)["site_states"] == {"north": "absent", "south": "absent"}
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(study.admin("north").ask("Assignment", patience_s=30)))
    asking.start()
    until(lambda: status(study)["site_states"]["north"] == "connected; waits for a job", "north to wait")
    assert status(study)["site_states"]["south"] == "absent"

    study.job()
    asking.join(30)
    assert answers[0]["job"] == "job"
    assert states_in(study, "job") == {"north": "awaited", "south": "awaited"}
    assert status(study)["site_states"] == {"north": "absent", "south": "absent"}, "its script has not joined yet"

    sites = {name: study.site(name) for name in study.sites}
    tasks = started(sites.values(), W)
    trains = {"north": "connected; trains round 1", "south": "connected; trains round 1"}
    until(lambda: states_in(study, "job") == trains, "both to train")
    assert status(study)["site_states"] == dict.fromkeys(study.sites, "connected; in job")
    sites["north"].submit(tasks["north"], W)
    assert states_in(study, "job") == {**trains, "north": "connected; waits for the others"}
    sites["south"].vanish()
    until(lambda: states_in(study, "job")["south"].startswith("absent for "), "south to be missed")
    assert status(study)["site_states"] == {"north": "connected; in job", "south": "absent"}


def test_jobs_that_have_ended_are_told_after_a_restart(study: Study) -> None:
    study.job("done", rounds=1)
    at_once([study.site(name) for name in study.sites], lambda site: site.take_part(W, lambda task: W))
    study.job("stopped")
    study.admin("lena").ask("AbortJob", job="stopped")
    assert study.server.wait_for_job("done", 30)
    study.server.close()
    study.start()
    told = {item["job"]: item for item in status(study)["jobs"]}
    assert {name: item["state"] for name, item in told.items()} == {"done": "finished", "stopped": "aborted"}
    assert told["done"]["rounds_done"] == 1
    assert "lena" in told["stopped"]["error"]["what"]
