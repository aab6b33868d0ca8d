"""One site's session: shared by a process, detached, closed, and what it refuses before anything is sent."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fl_adapters
from fl_adapters.participant.local_result import LocalResult
from fl_adapters.participant.options import Options
from fl_adapters.participant.registry import open_session
from fl_adapters.participant.session import Session
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.client.local_training import StepCount
from fl_runtime.errors import (
    AbortedError,
    ConfigError,
    ConnectionLostError,
    HandshakeError,
    QuorumError,
    StateMismatchError,
    UpdateRefusedError,
)
from fl_runtime.types import Arrays

W: Arrays = {"w": np.zeros(3, np.float32)}


def opened(place: Place, *, fresh: bool = False, **options: Any) -> Session:
    session = open_session(Options(kit=place.kit, **options), framework="test", fresh=fresh)
    assert session is not None
    return session


def registered(place: Place, state: Arrays = W, *, evaluates: bool = False, **options: Any) -> Session:
    session = opened(place, **options)
    session.register(state, agreement={}, rounds=None, evaluates=evaluates)
    return session


def to_the_end(session: Session, state: Arrays = W) -> list[float]:
    """Add 1 in each round until the run ends; return the final weights."""
    task = session.start(lambda: state)
    while task.kind == "train":
        task = session.exchange({"w": task.arrays["w"] + 1}, LocalResult(1, 1, {}))
    final = [float(value) for value in task.arrays["w"]]
    session.finish()
    return final


@pytest.fixture
def one() -> Iterator[tuple[LocalFederation, Place]]:
    """A federation of one site and three rounds."""
    with LocalFederation(sites=1, rounds=3) as federation:
        yield federation, federation.places[0]


# -- whose a session is ----------------------------------------------------------------------------------------------


def test_all_callbacks_of_a_process_share_a_kits_session(one: tuple[LocalFederation, Place]) -> None:
    federation, place = one
    assert opened(place) is opened(place)
    assert (opened(place).name, opened(place).site.index, opened(place).site.count) == ("site-1", 0, 1)
    assert opened(place).attempt == 1
    assert opened(place, fresh=True) is opened(place)  # nothing has begun yet: a second object, not a second run
    federation.server.abort("enough")


def test_a_cell_that_is_run_twice_goes_on_as_a_new_attempt_of_a_run_that_needs_it() -> None:
    """Leaving and joining again would end a run that needs every site."""
    with LocalFederation(sites=2, rounds=2) as federation:

        def twice(place: Place) -> tuple[int, list[float]]:
            first = registered(place)
            task = first.start(lambda: W)
            first.exchange({"w": task.arrays["w"] + 1}, LocalResult(1, 1, {}))
            second = opened(place, fresh=True)
            assert second is not first
            second.register(W, agreement={}, rounds=None, evaluates=False)
            with pytest.raises(ConfigError, match="has ended"):
                first.submit(W, LocalResult(1, 1, {}))
            return second.attempt, to_the_end(second)

        def once(place: Place) -> tuple[int, list[float]]:
            session = registered(place)
            return session.attempt, to_the_end(session)

        outcomes = federation.outcomes({"site-1": once, "site-2": twice})
        assert [outcome.value for outcome in outcomes.values()] == [(1, [2.0] * 3), (2, [2.0] * 3)]
        assert [r.sites for r in federation.result().rounds] == [("site-1", "site-2")] * 2
    assert not [e for e in federation.events if e.kind == "left" and e.data["early"]]


def test_a_second_process_takes_over_and_the_first_one_is_told(one: tuple[LocalFederation, Place]) -> None:
    from fl_adapters.participant.kit import read_kit
    from fl_runtime.transport.memory import MemoryTransport

    federation, place = one
    old = registered(place)
    task = old.start(lambda: W)
    new = Session(read_kit(place.kit), Options(), "test", MemoryTransport(federation.server.service, "site-1"))
    with pytest.raises(AbortedError, match="attempt 2 has taken over"):
        old.exchange(task.arrays, LocalResult(1, 1, {}))
    new.leave("enough")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_no_session_and_ends_nobodys(one: tuple[LocalFederation, Place]) -> None:
    _, place = one
    session = registered(place)
    process = multiprocessing.get_context("fork").Process(target=_in_the_child, args=(place,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert to_the_end(session) == [3.0] * 3


def _in_the_child(place: Place) -> None:
    from fl_adapters.participant.registry import close_sessions

    assert open_session(Options(kit=place.kit), framework="test") is None
    assert open_session(Options(kit=place.kit), framework="test", fresh=True) is None
    close_sessions("the child ends")


# -- without a kit ---------------------------------------------------------------------------------------------------


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(fl_adapters.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_without_a_kit_one_line_says_so_once() -> None:
    done = in_a_process("""
        from fl_adapters.participant.registry import open_session
        from fl_adapters.participant.options import Options
        assert open_session(Options(), framework="my framework") is None
        assert open_session(Options(), framework="my framework") is None
        import sys
        assert "grpc" not in sys.modules
    """)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "fl-adapters: no startup kit, so my framework runs alone, on this machine's data\n"
    assert done.stdout == ""


def test_a_script_that_needs_a_federation_says_how_to_start_it() -> None:
    with pytest.raises(ConfigError, match="required=True") as caught:
        open_session(Options(required=True), framework="test")
    assert "fl-adapters simulate" in caught.value.fix


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"format": 99}', '{"format": 1, "job": "x"}'])
def test_a_kit_that_is_none_is_an_error_and_no_reason_to_train_alone(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "kit.json").write_text(content)
    with pytest.raises(ConfigError) as caught:
        open_session(Options(kit=str(tmp_path)), framework="test")
    assert "kit.json" in caught.value.where


def test_a_federation_that_is_over_cannot_be_joined(tmp_path: Path) -> None:
    with LocalFederation(sites=1, rounds=1, folder=tmp_path) as federation:
        kit = federation.places[0].kit
    with pytest.raises(ConnectionLostError, match="memory:"):
        open_session(Options(kit=kit), framework="test")


# -- the handshake ---------------------------------------------------------------------------------------------------


def test_what_the_scripts_say_must_agree() -> None:
    budgets: dict[str, Any] = {"site-1": "epoch", "site-2": 50}
    with LocalFederation(sites=2, rounds=1) as federation:
        outcomes = federation.outcomes(
            {name: lambda p: registered(p, every=budgets[p.name]) for name in budgets}, check=False
        )
    for outcome in outcomes.values():
        assert isinstance(outcome.error, HandshakeError)
        assert "every: epoch != 50 steps" in str(outcome.error)


def test_different_optimizer_policies_are_refused() -> None:
    with LocalFederation(sites=2, rounds=1) as federation:
        outcomes = federation.outcomes(
            {
                "site-1": lambda p: registered(p, optimizer_state="reset"),
                "site-2": lambda p: registered(p, optimizer_state="average"),
            },
            check=False,
        )
    assert all("optimizer_state: reset != average" in str(o.error) for o in outcomes.values())


def test_models_that_differ_are_refused_at_all_sites_by_name() -> None:
    with LocalFederation(sites=2, rounds=1) as federation:
        outcomes = federation.outcomes(
            {
                "site-1": lambda p: registered(p, {"w": np.zeros((8, 4))}),
                "site-2": lambda p: registered(p, {"w": np.zeros((16, 4))}),
            },
            check=False,
        )
    for outcome in outcomes.values():
        assert isinstance(outcome.error, StateMismatchError)
        assert "w: float64[8, 4] != float64[16, 4]" in str(outcome.error)


def test_weights_that_are_not_finite_are_refused_before_round_1(one: tuple[LocalFederation, Place]) -> None:
    _, place = one
    with pytest.raises(UpdateRefusedError, match="NaN or infinite values in w") as caught:
        registered(place, {"w": np.array([np.nan])})
    assert "before round 1" in caught.value.where


def test_a_site_whose_tensors_a_filter_refuses_leaves_at_once() -> None:
    with LocalFederation(sites=1, rounds=1, filters=({"name": "Quantize"},)) as federation:
        session = opened(federation.places[0])
        with pytest.raises(ConfigError, match=r"the name of tensor .w\|scale."):
            session.register({"w|scale": np.zeros(3, np.float32)}, agreement={}, rounds=None, evaluates=False)
        assert session.closed


def test_the_rounds_are_the_jobs_else_the_trainers() -> None:
    for rounds, wanted in ((5, 5), (None, 2)):
        with LocalFederation(sites=1, rounds=rounds) as federation:
            session = opened(federation.places[0])
            assert session.register(W, agreement={}, rounds=2, evaluates=False) == session.rounds == wanted


# -- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"num_examples": 0}, {"num_examples": -1}, {"num_examples": 1.5}, {"w": np.inf}])
def test_updates_that_cannot_count_are_refused_before_anything_is_sent(
    one: tuple[LocalFederation, Place], bad: dict[str, Any]
) -> None:
    _, place = one
    session = registered(place)
    task = session.start(lambda: W)
    arrays = {"w": np.full(3, bad.get("w", 1.0), np.float32)}
    with pytest.raises(UpdateRefusedError) as caught:
        session.submit(arrays, LocalResult(bad.get("num_examples", 1), 1, {}))
    assert caught.value.where == "update of site-1, round 1"
    assert ("num_examples is" in caught.value.what) == ("num_examples" in bad)
    task = session.exchange(task.arrays, LocalResult(1, 1, {}))
    assert task.round == 2


def test_an_exchange_tells_what_it_cost(one: tuple[LocalFederation, Place]) -> None:
    _, place = one
    session = registered(place, {"w": np.zeros(10_000)})
    session.start(lambda: {"w": np.zeros(10_000)})
    session.exchange({"w": np.ones(10_000)}, LocalResult(1, 1, {}))
    assert session.stats.round == 1
    for count in (session.stats.bytes_up, session.stats.bytes_down):
        assert 80_000 <= count < 82_000
    assert session.stats.seconds > 0


def test_calls_without_a_task_are_refused_with_words(one: tuple[LocalFederation, Place]) -> None:
    _, place = one
    session = registered(place)
    for call in (
        lambda: session.submit(W, LocalResult(1, 1, {})),
        lambda: session.next_task(),
        lambda: session.report({"loss": 1.0}, 1),
        lambda: session.finish(),
    ):
        with pytest.raises(ConfigError, match="no task"):
            call()


def test_a_site_that_leaves_early_ends_a_run_that_needs_it() -> None:
    def leaves(place: Place) -> None:
        session = registered(place)
        session.start(lambda: W)
        session.leave("early stop at step 7")

    with LocalFederation(sites=2, rounds=2) as federation:
        outcomes = federation.outcomes(
            {"site-1": lambda place: to_the_end(registered(place)), "site-2": leaves}, check=False
        )
    assert isinstance(outcomes["site-1"].error, QuorumError)
    assert "site-2: early stop at step 7" in str(outcomes["site-1"].error)


def test_one_site_writes_the_model_and_the_best_round_of_the_run() -> None:
    losses = {0: 9.0, 1: 5.0, 2: 1.0, 3: 4.0}

    def site(place: Place) -> list[float]:
        session, live = registered(place, evaluates=True), W["w"].copy()
        task = session.start(lambda: W)
        while True:
            session.report({"loss": losses[task.version]}, 10)
            if task.kind == "final":
                break
            task = session.exchange({"w": task.arrays["w"] + 1}, LocalResult(1, 1, {}))
        live[...] = task.arrays["w"]

        def export(folder: str) -> None:
            Path(folder).mkdir(parents=True)
            (Path(folder) / f"{place.name}.txt").write_text(str(live[0]))

        def load(arrays: Arrays) -> None:
            live[...] = arrays["w"]

        session.finish(export=export, load=load)
        return [float(value) for value in live]

    with LocalFederation(sites=2, rounds=3) as federation:
        finals = federation.run(site)
        federation.result()
        written = {p.relative_to(federation.folder).as_posix(): p.read_text() for p in federation.folder.rglob("*.txt")}
    assert written == {"model/site-1.txt": "3.0", "best/site-1.txt": "2.0"}
    assert finals == {"site-1": [3.0] * 3, "site-2": [3.0] * 3}  # the final weights are back after the export


def test_output_folders_of_a_simulation_are_the_sites_own(one: tuple[LocalFederation, Place]) -> None:
    federation, place = one
    assert opened(place).output_dir("out") == str(federation.folder / "sites" / "site-1" / "out")


# -- the end of a process --------------------------------------------------------------------------------------------


def test_a_script_that_ends_early_is_known_at_once_and_not_after_a_timeout() -> None:
    with LocalFederation(sites=2, rounds=2, sockets=True, rejoin_s=1000.0) as federation:
        done = in_a_process(
            """
            import numpy as np
            from fl_adapters.participant.options import Options
            from fl_adapters.participant.registry import open_session
            open_session(Options(), framework="test")
            """,
            FL_ADAPTERS_KIT=federation.places[1].kit,
        )
        assert done.returncode == 0, done.stderr
        with pytest.raises(QuorumError, match="site-2: its script ended before the last round"):
            registered(federation.places[0])


def test_a_reconnect_leaves_the_users_random_state_alone() -> None:
    """The pauses between attempts are random, but must not change a seeded training."""
    import random

    from fl_adapters.participant.kit import Kit
    from fl_runtime.transport.memory import MemoryTransport

    class Broken:
        def handle(self, *_: object) -> Iterator[bytes]:
            raise ConnectionLostError("broken")

    random.seed(1)
    wanted = random.getstate()
    kit = Kit("job", "site-1", 0, 1, "memory:none", "token", patience_s=0.1)
    with pytest.raises(ConnectionLostError, match="gave up"):
        Session(kit, Options(), "test", MemoryTransport(Broken(), "site-1"))
    assert random.getstate() == wanted


@pytest.mark.parametrize(
    ("filters", "told"), [((), True), (({"name": "Examples", "equal": True},), False)], ids=["none", "hidden counts"]
)
def test_a_site_whose_filters_hide_its_steps_tells_nothing_of_its_training(filters: Any, told: bool) -> None:
    with LocalFederation(sites=1, rounds=1, filters=filters) as federation:

        def work(place: Place) -> bool:
            session = registered(place)
            task = session.start(lambda: W, steps=lambda: StepCount(3, 12))
            allowed = session._gate.shares_progress()  # as the thread that reports asks before each report
            session.exchange({"w": task.arrays["w"] + 1}, LocalResult(1, 12, {}))
            session.finish()
            return allowed

        assert list(federation.run(work).values()) == [told]
        updates = [event.data for event in federation.events if event.kind == "update" and event.round == 1]
        assert ["train_s" in data for data in updates] == [told]
