"""Strategies that change local training, seen from the job, the handshake and the site's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fl_adapters
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.local_work.control_variate import FILE, ControlVariate
from fl_adapters.participant.options import Options
from fl_adapters.participant.outputs import SiteHome
from fl_adapters.participant.registry import open_session
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.aggregation.corrections.local_terms import LocalTerms, control_of
from fl_runtime.capabilities import GRADIENT_CORRECTION
from fl_runtime.errors import ConfigError, HandshakeError, ProtocolError
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Array, Arrays

F32 = np.dtype(np.float32)
STEPS, RATE, ROUNDS = 5, 0.1, 4


@pytest.mark.parametrize("spec", ["fedprox:mu=-0.1", "fedprox:mu=nan", "ditto:lam=-1", "scaffold:lr=0", "fedprox:nu=1"])
def test_bad_arguments_are_refused_when_the_job_is_made(spec: str) -> None:
    argument = spec.partition(":")[2].partition("=")[0]
    with pytest.raises(ConfigError, match=argument):
        fl_adapters.Job(app="train.py", strategy=spec)


def test_a_strategy_object_is_its_text() -> None:
    job = fl_adapters.Job(app="train.py", strategy=fl_adapters.FedProx(mu=0.1, weights="equal"))
    assert job.strategy == "fedprox:weights=equal,mu=0.1"


@pytest.mark.parametrize(
    ("strategy", "capability"),
    [("fedprox", "gradient-correction"), ("scaffold", "gradient-correction"), ("ditto", "personal-model")],
)
def test_a_site_that_cannot_is_refused_before_round_1(strategy: str, capability: str) -> None:
    """A user's own loop declares no capability, and neither does XGBoost, whose updates are not weights."""
    with LocalFederation(sites=["north", "south"], rounds=1, strategy=strategy) as federation:

        def site(place: Place) -> None:
            with fl_adapters.connect(kit=place.kit) as own:
                for task in own.tasks(initial={"w": np.zeros(2, np.float32)}):
                    task.submit(task.arrays, num_examples=1)

        outcomes = federation.outcomes(dict.fromkeys(("north", "south"), site), check=False)
    for outcome in outcomes.values():
        assert isinstance(outcome.error, HandshakeError)
        assert capability in str(outcome.error) and "north" in str(outcome.error)
    assert not [event for event in federation.events if event.kind == "round_started"]


@pytest.mark.parametrize("mu", [-1.0, float("nan"), "0.1", True])
def test_a_task_with_a_bad_term_is_refused(mu: Any) -> None:
    with pytest.raises(ProtocolError, match="mu="):
        LocalTerms.from_config({"proximal_mu": mu})


def target(site: int) -> Array:
    """Return the point that a site pulls to; it differs from site to site."""
    return np.random.default_rng(site).normal(size=6).astype(np.float32)


def gradient(site: int, w: Array) -> Array:
    return np.asarray((1 + site) * (w - target(site)))


def quadratic(place: Place) -> Array:
    """Run plain SGD on one site's quadratic loss, with corrected gradients."""
    session = open_session(Options(kit=place.kit), framework="NumPy")
    assert session is not None
    w = np.zeros(6, np.float32)
    capabilities = frozenset({GRADIENT_CORRECTION})
    session.register({"w": w}, agreement={}, rounds=None, evaluates=False, capabilities=capabilities)
    control = ControlVariate(session.home, {"w": F32})
    task = session.start(lambda: {"w": w})
    while task.kind == "train":
        offset = control.begin(task.arrays, task.extras)["w"]
        w = np.array(task.arrays["w"])
        for _ in range(STEPS):
            w = w - RATE * (gradient(place.index, w) + offset)
        extras = control.end_by_rates({"w": w}, {"w": STEPS * RATE})
        status = session.submit({"w": w}, LocalResult(1, STEPS, {}), extras=extras)
        control.submitted(status)
        task = session.next_task()
    session.finish()
    return np.array(task.arrays["w"])


def by_hand(sites: int, lr: float) -> Array:
    """Run Karimireddy et al. 2020, Algorithm 1, option II, in float64."""
    x, c, own = np.zeros(6), np.zeros(6), [np.zeros(6) for _ in range(sites)]
    for _ in range(ROUNDS):
        moves, changes = [], []
        for i in range(sites):
            y = x.copy()
            for _ in range(STEPS):
                y = y - RATE * (gradient(i, y) - own[i] + c)
            after = own[i] - c + (x - y) / (STEPS * RATE)
            moves.append(y - x)
            changes.append(after - own[i])
            own[i] = after
        x, c = x + lr * sum(moves) / sites, c + sum(changes) / sites
    return x


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_scaffold_is_algorithm_1(lr: float) -> None:
    with LocalFederation(sites=3, rounds=ROUNDS, strategy=f"scaffold:lr={lr}") as federation:
        finals = federation.run(quadratic)
        kept = [read_tensors(federation.folder / "sites" / name / FILE) for name in finals]
    for final in finals.values():
        np.testing.assert_allclose(final, by_hand(3, lr), rtol=1e-5, atol=1e-5)
    assert len(kept) == 3 and all(list(own) == ["w"] for own in kept)


def ended(control: ControlVariate, weights: Arrays, status: str) -> Array:
    control.begin({"w": np.ones(2, np.float32)}, {})
    share = control_of(control.end_by_rates(weights, {"w": 0.5}))["w"]
    control.submitted(status)
    return share


def test_another_process_goes_on_with_the_control_variate(tmp_path: Path) -> None:
    names, half = {"w": F32}, {"w": np.full(2, 0.5, np.float32)}
    first = ControlVariate(SiteHome(tmp_path, 4, fresh=True), names)
    assert ended(first, half, "used").tolist() == [0.25, 0.25]  # c_i = (1 - 0.5) / 0.5, of four sites
    again = ControlVariate(SiteHome(tmp_path, 4, fresh=False), names)
    assert again.begin(half, {})["w"].tolist() == [-1.0, -1.0]


def test_an_update_that_came_too_late_leaves_the_control_variate(tmp_path: Path) -> None:
    control = ControlVariate(SiteHome(tmp_path, 1, fresh=True), {"w": F32})
    ended(control, {"w": np.zeros(2, np.float32)}, "late")
    assert control.begin({"w": np.ones(2, np.float32)}, {})["w"].tolist() == [0.0, 0.0]
    assert not (tmp_path / FILE).exists()


def test_the_first_process_of_a_run_takes_nothing_from_another(tmp_path: Path) -> None:
    names, weights = {"w": F32}, {"w": np.zeros(2, np.float32)}
    ended(ControlVariate(SiteHome(tmp_path, 1, fresh=True), names), weights, "used")
    assert ControlVariate(SiteHome(tmp_path, 1, fresh=True), names).begin(weights, {})["w"].tolist() == [0.0, 0.0]


def test_a_round_seen_in_part_leaves_the_control_variate(tmp_path: Path) -> None:
    control = ControlVariate(SiteHome(tmp_path, 1, fresh=True), {"w": F32})
    control.begin({"w": np.ones(2, np.float32)}, {})
    assert control_of(control.end_unchanged())["w"].tolist() == [0.0, 0.0]
