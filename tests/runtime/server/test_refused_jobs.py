"""A site that says that it takes no part in a job, for whom it speaks, and who is not harmed by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from federation_bench import started
from study import Study

from fl_runtime.errors import AbortedError

W = {"w": np.zeros(3, np.float32)}


def refuse(study: Study, **fields: Any) -> bool:
    return bool(study.admin("north").ask("RefuseJob", job="job", reason="no data here", **fields)["refused"])


def test_a_refused_job_goes_on_or_ends_by_its_quorum(study: Study) -> None:
    study.job()
    assert refuse(study)
    assert study.server.wait_for_job("job", 30)
    assert "it refuses the job: no data here" in study.server.outcome("job")["error"]["where"]


def test_a_refusal_speaks_for_the_process_that_it_names(study: Study) -> None:
    study.job()
    sites = [study.site(name) for name in study.sites]
    started(sites, W)
    older = sites[0].welcome.attempt
    again = study.site("north")
    again.join()
    assert again.welcome.attempt == older + 1

    with pytest.raises(AbortedError, match="has taken over"):
        sites[0].client.next_task()
    assert not sites[0].client.leave("its script has ended", early=True)
    assert not refuse(study), "of a site that has started no process, while one takes part"
    assert not refuse(study, training=1, attempt=older)
    assert not study.server.wait_for_job("job", 0), "the job goes on"

    assert refuse(study, training=1, attempt=again.welcome.attempt)
    assert study.server.wait_for_job("job", 30)


def test_a_leave_can_speak_for_a_process_that_has_ended(study: Study) -> None:
    study.job()
    sites = [study.site(name) for name in study.sites]
    started(sites, W)
    messenger = study.site("north").client
    messenger.speak_for("job", sites[0].welcome.attempt - 1)
    assert not messenger.leave("killed", early=True)
    messenger.speak_for("job", sites[0].welcome.attempt)
    assert messenger.leave("killed", early=True)
    assert study.server.wait_for_job("job", 30)
    assert "north: killed" in study.server.outcome("job")["error"]["where"]


def test_a_refusal_lets_a_job_start_that_waits_for_the_site(study: Study) -> None:
    study.job(min_sites=1)
    study.job("next", sites=["north"])
    queue = study.server.queue
    assert queue.record("next").state == "queued"
    assert refuse(study)
    assert queue.record("next").state == "running"
    assert queue.record("job").state == "running", "south has not refused it"
