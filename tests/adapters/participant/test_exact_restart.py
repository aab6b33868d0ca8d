"""`exact_restart` in a user's own loop: a site that is killed and started again ends with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import restarted_loop
from killed_sites import WarmProcess, run_sites

import fl_adapters as fl
from fl_adapters.participant.restart import FunctionSnapshot, RestartPoints, SiteRestart
from fl_adapters.participant.state_file import read_state, write_state
from fl_adapters.testing import Death, LocalFederation, Place, RestartCase, Trained, failing, restart_cases
from fl_runtime.errors import ConfigError, HandshakeError, ProtocolError, StoreError
from fl_runtime.types import Arrays, Task

SCRIPT = Path(restarted_loop.__file__)


class Example:
    """The loop as an example for the conformance suite."""

    steps_per_epoch = restarted_loop.ROWS // restarted_loop.BATCH
    personal = "head"
    states = ()

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        class Failing(restarted_loop.Training):
            def epoch(self) -> None:
                super().epoch()
                if fail_at and self.steps >= fail_at:
                    failing()

        made, restarted_loop.Training = restarted_loop.Training, Failing  # type: ignore[misc]
        try:
            return Trained(restarted_loop.run(site, **arguments), 0)
        finally:
            restarted_loop.Training = made  # type: ignore[misc]

    def plain(self, site: int, *, total_steps: int) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("case", restart_cases(), ids=lambda case: case.name)
def test_a_loop_of_its_own_conforms(case: RestartCase) -> None:
    case(Example())


# -- real processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"filters": ({"name": "TopK", "ratio": 0.5, "small": 1},), "strategy": "fedadam:lr=0.1"},
        {"filters": ({"name": "Quantize", "to": "int4", "at": "server_out"},), "strategy": "fedavgm"},
    ],
    ids=["plain", "error feedback, and moments at the server", "models as differences"],
)
def test_killed_at_random_instants(tmp_path: Path, settings: dict[str, Any]) -> None:
    with WarmProcess("numpy", "fl_adapters.loop") as warm:
        wanted = run_sites(tmp_path / "undisturbed", SCRIPT, warm=warm, rounds=12, **settings)
        assert run_sites(tmp_path / "disturbed", SCRIPT, warm=warm, kills=8, seed=1, rounds=12, **settings) == wanted


def test_killed_with_nothing_warm(tmp_path: Path) -> None:
    """The same command in a fresh Python."""
    wanted = run_sites(tmp_path / "undisturbed", SCRIPT, rounds=4)
    assert run_sites(tmp_path / "disturbed", SCRIPT, kills=1, seed=1, rounds=4) == wanted


# -- what is promised, and what is not ---------------------------------------------------------------------------------


def finals(seed: int | None, name: str = "test", exact: bool = True) -> Arrays:
    with LocalFederation(sites=2, states=(), rounds=2, seed=seed, name=name, exact_restart=exact) as federation:
        federation.run(lambda place: restarted_loop.run(place.index, kit=place.kit))
        return federation.model()


def test_the_seed_decides_and_not_the_name_of_the_job() -> None:
    np.random.seed(1)
    one = finals(7, "one")
    np.random.seed(2)
    assert {n: a.tobytes() for n, a in finals(7, "two").items()} == {n: a.tobytes() for n, a in one.items()}
    assert any(array.tobytes() != one[name].tobytes() for name, array in finals(8).items())


def test_random_states_are_the_scripts_own_without_it() -> None:
    np.random.seed(1)
    one = finals(7, exact=False)
    np.random.seed(2)
    assert any(array.tobytes() != one[name].tobytes() for name, array in finals(7, exact=False).items())


def test_a_loop_that_says_nothing_of_its_state_is_refused_before_round_1() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros(2)}, save=dict if place.index == 0 else None):
                task.submit(task.arrays, num_examples=1)

    with LocalFederation(sites=2, rounds=1, exact_restart=True) as federation:
        outcomes = federation.outcomes(dict.fromkeys(("site-1", "site-2"), work), check=False)
    for outcome in outcomes.values():
        assert isinstance(outcome.error, HandshakeError)
        assert "exact_restart needs the capability exact-restart, which the adapter of site-2" in str(outcome.error)
        assert "docs/restart.md" in outcome.error.fix
    assert not [event for event in federation.events if event.kind == "round_started"]


def test_a_state_that_cannot_be_kept_is_refused_before_round_1() -> None:
    def work(place: Place) -> None:
        with fl.connect(kit=place.kit) as site:
            for task in site.tasks(initial={"w": np.zeros(2)}, save=lambda: {"rng": [np.random.default_rng()]}):
                task.submit(task.arrays, num_examples=1)

    with LocalFederation(sites=1, rounds=1, exact_restart=True) as federation:
        error = federation.outcomes({"site-1": work}, check=False)["site-1"].error
    assert isinstance(error, ConfigError) and "a Generator cannot be saved for a restart" in str(error)
    assert error.where.endswith("['rng'][0]")


def test_a_round_that_is_done_twice_and_rounds_that_are_not_drawn(tmp_path: Path) -> None:
    """With `fraction`, a site is sampled in some rounds only; its state is that of the last of those."""

    def run(deaths: list[Death], folder: str) -> Arrays:
        left = {death.site: 1 for death in deaths}

        def work(place: Place) -> None:
            try:
                restarted_loop.run(place.index, kit=place.kit, keep_local=["head"])
            except fl.SiteFailedError:
                left[place.name] -= 1
                restarted_loop.run(place.index, kit=place.kit, keep_local=["head"])

        settings: dict[str, Any] = {"fraction": 0.5, "min_sites": 1, "rounds": 8, "seed": 3, "exact_restart": True}
        with LocalFederation(sites=2, states=(), folder=tmp_path / folder, deaths=deaths, **settings) as federation:
            federation.run(work)
            assert not any(left.values())
            return federation.model()

    wanted = run([], "undisturbed")
    for heard in (False, True):
        found = run([Death("site-2", "Submit", 2, heard=heard)], f"disturbed-{heard}")
        assert {n: a.tobytes() for n, a in found.items()} == {n: a.tobytes() for n, a in wanted.items()}


# -- the files -------------------------------------------------------------------------------------------------------


def task(round: int, stage: str = "") -> Task:
    return Task("job", round, stage, "train", round - 1, {})


def points_of(folder: Path) -> RestartPoints:
    """Return the restart points of a process that comes back."""
    return RestartPoints(folder, fresh=False)


def test_the_point_behind_a_task_and_the_one_before_it_are_kept(tmp_path: Path) -> None:
    points = RestartPoints(tmp_path, fresh=True)
    assert points.empty and points.before(task(1)) is None
    points.save(None, "start")
    for number in range(1, 5):
        assert points_of(tmp_path).before(task(number)) == (number - 1 or "start")
        points.save(task(number), number)
    assert points_of(tmp_path).before(task(5)) == 4
    assert points_of(tmp_path).before(task(4)) == 3  # the update of round 4 was not accepted
    points.save(task(4), 4)
    assert points_of(tmp_path).before(task(4)) == 3  # again
    assert points_of(tmp_path).before(task(4, "2")) == 3
    points.save(task(4), 4)
    assert points_of(tmp_path).before(replace(task(4), kind="final")) == 4
    assert len(list(tmp_path.iterdir())) <= 2
    assert RestartPoints(tmp_path, fresh=True).empty


def test_a_round_that_is_opened_again_begins_from_the_work_for_its_first_try(tmp_path: Path) -> None:
    points = RestartPoints(tmp_path, fresh=True)
    points.save(None, 0)
    points.save(task(1), 1)
    assert points_of(tmp_path).before(task(1, "2")) == 1


def test_points_of_rounds_that_a_restored_server_has_lost_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = RestartPoints(tmp_path, fresh=True)
    for number in range(1, 5):
        points.save(task(number), number)
    assert points_of(tmp_path).before(task(4)) == 3
    assert points_of(tmp_path).before(task(2)) is None
    assert "all newer than round 2" in caplog.text


def test_a_point_within_a_round_is_of_that_round_and_run_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points = RestartPoints(tmp_path, fresh=True)
    points.save(None, "start")
    points.save_within(task(1), "in the middle of 1")
    assert points_of(tmp_path).within(task(1)) == "in the middle of 1"
    assert points_of(tmp_path).within(task(1)) == "in the middle of 1", "also when the process dies again"
    assert not caplog.text
    assert points_of(tmp_path).within(task(1, "2")) is None, "of the first try of a round that is opened again"
    assert points_of(tmp_path).within(task(3)) is None
    assert "within-1-" in caplog.text and "the federation is in round 3" in caplog.text
    points.save(task(3), 3)
    assert points_of(tmp_path).within(task(1)) is None, "a round that a restored server opens again"
    points.save_within(task(4), "of the run before")
    assert RestartPoints(tmp_path, fresh=True).within(task(4)) is None


def test_state_survives_in_full(tmp_path: Path) -> None:
    import ml_dtypes

    state = {
        "plain": [None, True, 3, -0.0, float("inf"), "text", b"\x00\xff", (1, [2])],
        7: {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(0.1), "empty": np.zeros((0, 3), np.int16)},
        "narrow": np.array([1.5, -2], ml_dtypes.bfloat16),
        "same": np.arange(10)[::2],
    }
    size = write_state(tmp_path / "x" / "state", state)
    assert size == (tmp_path / "x" / "state").stat().st_size
    found = read_state(tmp_path / "x" / "state")
    assert found["plain"] == state["plain"] and str(found["plain"][3]) == "-0.0"
    for inner, wanted in (
        (found[7]["a"], state[7]["a"]),
        (found["narrow"], state["narrow"]),
        (found["same"], state["same"]),
    ):
        assert (inner.dtype, inner.shape, inner.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    assert type(found[7]["b"]) is np.float32 and found[7]["empty"].shape == (0, 3)
    smaller = write_state(tmp_path / "y", {"a": 1}, recycled=tmp_path / "x" / "state")
    assert smaller < size and read_state(tmp_path / "y") == {"a": 1}


@pytest.mark.parametrize("bad", [{1.5: 1}, {"f": Callable}, np.array(["text"]), {1, 2}])
def test_what_cannot_be_kept_is_named(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be saved for a restart"):
        write_state(tmp_path / "state", bad)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_state(tmp_path / "file" / "state", 1)
    (tmp_path / "00000001.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match="not a usable safetensors file"):
        points_of(tmp_path).before(task(1))


def test_a_server_that_asks_for_the_initial_model_again_gets_no_trained_weights(tmp_path: Path) -> None:
    """The restart point holds what the site has trained; as an initial model it would pass by every filter."""
    loaded: list[Any] = []
    snapshot = FunctionSnapshot(lambda: {"w": 1.0}, loaded.append)
    first = SiteRestart(tmp_path, fresh=True)
    first.begin(snapshot, 0)
    first.save(Task("job", 1, "", "train", 0, {}), 1, {})
    second = SiteRestart(tmp_path, fresh=False)
    second.begin(snapshot, 0)
    with pytest.raises(ProtocolError, match="asks for this site's initial weights, but the site has trained 1 rounds"):
        second.load(Task("job", 0, "", "initial", 0, {}))
    assert not loaded
