"""SCAFFOLD's control variate c is a part of the committed model, so a killed server continues with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from federation_bench import Site, at_once, registered, together
from server_process import ServerProcess, server_process

from fl_runtime.aggregation.corrections.local_terms import control_extras, control_of
from fl_runtime.capabilities import GRADIENT_CORRECTION
from fl_runtime.errors import UpdateRefusedError
from fl_runtime.server.courses.sampling import sample_sites
from fl_runtime.types import Array, RunSettings, Task

SIZE, ROUNDS = 5, 3
START = {"w": np.zeros(SIZE, np.float32)}
CORRECTING = frozenset({GRADIENT_CORRECTION})


def sites_of(server: ServerProcess) -> list[Site]:
    sites = [server.site(name) for name in ("site-1", "site-2")]
    registered(sites, START, capabilities=CORRECTING)
    return sites


def answer(site: Site, task: Task) -> str:
    """Return weights and a share of c that differ for each site and round."""
    draw = np.random.default_rng([int(site.name[-1]), task.round])
    weights = {name: array + draw.normal(size=SIZE).astype(np.float32) for name, array in task.arrays.items()}
    return site.submit(task, weights, extras=control_extras({"w": draw.normal(size=SIZE).astype(np.float32)}))


def run(folder: Path, between: Callable[[ServerProcess], None]) -> list[bytes]:
    """Return what each round begins with, c included; `between` is called after one site's update of each round."""
    states = []
    with server_process(folder, 2, rounds=ROUNDS, strategy="scaffold") as server:
        first, second = sites_of(server)
        tasks = [first.start(START), second.start(START)]
        while tasks[0].kind == "train":
            states.append(tasks[0].arrays["w"].tobytes() + control_of(tasks[0].extras).get("w", np.empty(0)).tobytes())
            answer(first, tasks[0])
            between(server)
            answer(second, tasks[1])
            tasks = together(first.client.next_task, second.client.next_task)
        states.append(tasks[0].arrays["w"].tobytes())
        for site in (first, second):
            site.client.leave("done", early=False)
            site.vanish()
    return states


def test_killed_in_every_round_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    def killed(server: ServerProcess) -> None:
        server.kill()
        server.start()

    expected = run(tmp_path / "oracle", lambda server: None)
    assert run(tmp_path / "run", killed) == expected
    assert len(expected) == ROUNDS + 1 and len({len(bits) for bits in expected[1:ROUNDS]}) == 1  # c has travelled


def test_c_gets_the_sum_of_the_shares(tmp_path: Path) -> None:
    shares = [np.random.default_rng([site, 1]).normal(size=(2, SIZE))[1].astype(np.float32) for site in (1, 2)]
    states = run(tmp_path, lambda server: None)
    c = np.frombuffer(states[1], np.float32)[SIZE:]
    np.testing.assert_allclose(c, shares[0] + shares[1], rtol=1e-6)


def test_c_follows_the_shares_of_all_sites_when_the_server_is_killed_and_sites_sit_out(tmp_path: Path) -> None:
    names, rounds, examples = ("site-1", "site-2", "site-3"), 8, {"site-1": 10, "site-2": 300, "site-3": 45}
    settings = RunSettings("test", names, 2, rounds=rounds, fraction=0.5, seed=4)
    chosen = {number: sample_sites(settings, number, names) for number in range(1, rounds + 1)}
    seen: dict[int, Array] = {}

    def share(name: str, number: int) -> Array:
        return np.random.default_rng([int(name[-1]), number]).normal(size=SIZE).astype(np.float32)

    with server_process(tmp_path, 3, min_sites=2, rounds=rounds, fraction=0.5, seed=4, strategy="scaffold") as server:
        sites = [server.site(name) for name in names]
        registered(sites, START, capabilities=CORRECTING)

        def train(site: Site) -> None:
            task = site.start(START)
            while task.kind == "train":
                number = task.round
                if site.name == chosen[number][0]:
                    seen[number] = control_of(task.extras).get("w", np.zeros(SIZE)).copy()
                    server.kill()
                    server.start()
                extras = control_extras({"w": share(site.name, number)})
                site.submit(task, task.arrays, examples[site.name], extras=extras)
                task = site.client.next_task()
            site.client.leave("done", early=False)
            site.vanish()

        at_once(sites, train)
    changes, known = np.zeros(SIZE), set[str]()
    for number in range(1, rounds):
        for name in chosen[number]:
            changes += examples[name] * 3.0 * share(name, number)
            known.add(name)
        if len(known) == 3:
            np.testing.assert_allclose(seen[number + 1], changes / sum(examples.values()), rtol=2e-5, atol=1e-6)
    assert len(known) == 3 and set(seen) == set(chosen)


def test_an_update_without_control_variates_is_refused(tmp_path: Path) -> None:
    with server_process(tmp_path, 2, rounds=1, strategy="scaffold") as server:
        first, second = sites_of(server)
        task = first.start(START)
        with pytest.raises(UpdateRefusedError, match="control variates"):
            first.submit(task, START)
        for site in (first, second):
            site.vanish()
