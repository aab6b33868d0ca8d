"""A site whose adapter lacks what the job needs, over mutual TLS: that site leaves, and the others begin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_bench import Site, errors_at_once, together
from study import Study

from fl_runtime.capabilities import CROSS_EVALUATION, EXACT_RESTART, GRADIENT_CORRECTION
from fl_runtime.errors import HandshakeError
from fl_runtime.types import Task

W = {"w": np.zeros(4, np.float32)}
NEEDS: dict[str, tuple[dict[str, Any], str]] = {
    "strategy": ({"strategy": "fedprox:mu=0.1"}, GRADIENT_CORRECTION),
    "exact_restart": ({"exact_restart": True}, EXACT_RESTART),
    "cross_site": ({"cross_site": True}, CROSS_EVALUATION),
}


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    with Study(tmp_path, ("north", "south", "west")) as study:
        yield study


def trained(site: Site) -> Any:
    """Answer every task of a site that has registered; return its final weights."""
    task = site.start(W)
    while task.kind == "train":
        site.submit(task, {"w": task.arrays["w"] + 1})
        task = site.client.next_task()
    final = np.copy(task.arrays["w"])
    site.client.leave("done", early=False)
    return final


def joined(study: Study) -> dict[str, Site]:
    sites = {name: study.site(name) for name in study.sites}
    for site in sites.values():
        site.join()
    return sites


@pytest.mark.parametrize("setting", NEEDS)
@pytest.mark.parametrize("odd", ["north", "west"])
def test_a_site_that_lacks_a_capability_leaves_and_the_others_begin(study: Study, setting: str, odd: str) -> None:
    fields, capability = NEEDS[setting]
    job = study.job(min_sites=2, **fields)
    sites = joined(study)

    def take_part(site: Site) -> Any:
        able = site.name != odd
        # the odd one alone scores models, so its proposals hold until it has left
        site.register(W, evaluates=not able, capabilities=frozenset({capability} if able else ()))
        return trained(site)

    errors, finals = {}, {}

    def attempt(site: Site) -> None:
        try:
            finals[site.name] = take_part(site)
        except HandshakeError as error:
            errors[site.name] = error

    together(*(lambda site=site: attempt(site) for site in sites.values()))  # type: ignore[misc]
    assert list(errors) == [odd]
    assert capability in str(errors[odd]) and f"handshake of {odd}, before round 1" in str(errors[odd])
    assert {name: final.tolist() for name, final in finals.items()} == dict.fromkeys(
        [name for name in study.sites if name != odd], [2.0] * 4
    )
    assert study.server.wait_for_job(job, 30)
    assert study.server.outcome(job)["error"] is None
    left = [line for line in (study.runs / job / "events.jsonl").read_text().splitlines() if '"left"' in line]
    assert sum(capability in line and odd in line for line in left) == 1


def test_without_a_quorum_of_able_sites_all_are_told_who_lacks_what(study: Study) -> None:
    study.job(min_sites=2, strategy="fedprox:mu=0.1")
    sites = joined(study)
    able = {"south": frozenset({GRADIENT_CORRECTION})}
    errors = errors_at_once(
        sites.values(), lambda site: site.register(W, capabilities=able.get(site.name, frozenset()))
    )
    for error in errors:
        assert isinstance(error, HandshakeError)
        assert "needs the capability gradient-correction, which the adapter of north does not have" in str(error)


def test_a_latecomer_without_the_capability_is_refused_alone(study: Study) -> None:
    study.job(min_sites=2, rounds=1, strategy="fedprox:mu=0.1")
    sites = joined(study)
    able = frozenset({GRADIENT_CORRECTION})
    together(*(lambda site=site: site.register(W, capabilities=able) for site in sites.values()))  # type: ignore[misc]
    again = study.site("west")
    again.join()
    with pytest.raises(HandshakeError, match="handshake of west, during the run"):
        again.register(W)
    again.client.leave("it does not fit", early=True)
    finals = together(*(lambda site=sites[name]: trained(site) for name in ("north", "south")))  # type: ignore[misc]
    assert all(final.tolist() == [1.0] * 4 for final in finals)


def test_a_task_is_never_given_to_a_site_that_was_left_out(study: Study) -> None:
    study.job(min_sites=2, strategy="fedprox:mu=0.1")
    sites = joined(study)
    able = frozenset({GRADIENT_CORRECTION})

    def insist(site: Site) -> Task | Any:
        if site.name != "west":
            site.register(W, capabilities=able)
            return trained(site)
        errors_at_once([site], lambda site: site.register(W))
        return errors_at_once([site], lambda site: site.client.next_task())[0]

    *_, error = together(*(lambda site=site: insist(site) for site in sites.values()))  # type: ignore[misc]
    assert isinstance(error, HandshakeError)
