"""`late: carry`: a late update is the site's change, applied to the newer model, however it travels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Bench, ended, serving

import fl_adapters as fl
from fl_adapters import Job
from fl_runtime.errors import ConfigError
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.site import SiteFilters
from fl_runtime.types import Settings, Task, Update

START = {"w": np.zeros(2, np.float32)}


class Filtered:
    """A site whose updates pass the filters of its gate."""

    def __init__(self, bench: Bench, name: str, filters: tuple[Settings, ...]) -> None:
        self.site, self.filters = bench.site(name), SiteFilters(filters, (), FilterHost(name))
        self.site.join()
        self.filters.agree(START, differences=True)

    def receive(self) -> Task:
        return self.filters.received(self.site.client.next_task())

    def submit(self, task: Task, value: float) -> str:
        attempt, arrays = self.site.welcome.attempt, {"w": np.full(2, value, np.float32)}
        update = Update(task.job, task.round, task.stage, self.site.name, attempt, task.version, arrays, 1)
        return self.site.client.submit(update if task.kind == "initial" else self.filters.outgoing(update, task))


@pytest.mark.parametrize(
    "filters",
    [(), ({"name": "Quantize", "to": "fp16"},), ({"name": "PercentilePrivacy", "percentile": 0, "gamma": 1e4},)],
    ids=["plain", "encoded", "limited"],
)
def test_a_carried_update_is_the_sites_change(tmp_path: Path, filters: tuple[Settings, ...]) -> None:
    with serving(
        tmp_path, 2, sockets=False, rounds=2, min_sites=1, deadline_s=1.0, late="carry", filters=filters
    ) as bench:
        fast, slow = (Filtered(bench, name, filters) for name in bench.names)
        threads = [threading.Thread(target=site.site.register, args=(START,)) for site in (fast, slow)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        initial = fast.site.client.next_task()
        fast.submit(initial, 0.0)
        first, late = fast.receive(), slow.receive()
        fast.submit(first, 8.0)  # the deadline closes round 1 with this update alone
        second = fast.receive()
        assert (second.round, second.arrays["w"].tolist()) == (2, [8.0, 8.0])
        assert slow.submit(late, 2.0) == "carried"  # a change of 2 from 0, on top of 8
        fast.submit(second, 16.0)
        final = fast.site.client.next_task()
        assert final.arrays["w"].tolist() == [(10.0 + 16.0) / 2] * 2
        for site in (fast, slow):
            site.site.client.leave("done", early=False)
        ended(bench.server)


def test_sites_of_such_jobs_send_differences_and_end_with_the_mean() -> None:
    def work(place: Any) -> Any:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial=START):
                task.submit({"w": task.arrays["w"] + place.index}, num_examples=place.index + 1)
            return site.arrays

    from fl_adapters.testing import LocalFederation

    with LocalFederation(sites=3, rounds=2, late="carry") as federation:
        finals = federation.run(work)
        federation.result()
    for final in finals.values():
        np.testing.assert_allclose(final["w"], 2 * 8 / 6, rtol=1e-6)


@pytest.mark.parametrize(
    ("job", "what"),
    [
        (lambda: Job(app="train.py", late="carry", cross_site=True), "cross_site needs whole weights"),
        (lambda: Job(app="train.py", late="carry", filters=({"name": "HomomorphicCKKS"},)), "HomomorphicCKKS needs"),
    ],
)
def test_what_needs_whole_weights_is_refused_when_the_job_is_made(job: Callable[[], Job], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        job()
