"""Sites that are interrupted and come back, with CheckpointSaver and CheckpointLoader or without."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import monai_models as m
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.handlers import CheckpointLoader, CheckpointSaver, LrScheduleHandler

from fl_adapters import connect
from fl_adapters.monai import FederatedHandler
from fl_adapters.torch.handshake.agreement import agreement
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import ConfigError, FederationError

TOTAL = 9


def halving(kit: str) -> None:
    """Run site 2 without a trainer: it sends half of each weight that it receives."""
    net = m.network(dropout=0.0)  # here: the random state belongs to all threads

    def take_part() -> None:
        with suppress(FederationError), connect(kit=kit) as site:
            facts = agreement(net, framework="monai")
            for task in site.tasks(initial=TorchState(net).get_state(), agreement=facts):
                half = {n: (a / 2).astype(a.dtype) for n, a in task.arrays.items()}
                task.submit(half, num_examples=m.ROWS)

    threading.Thread(target=take_part, daemon=True).start()


class Site:
    """Site 1: its trainer saves after every iteration, can be interrupted, and can continue from a file."""

    def __init__(self, run: Any, saved_by: Site | None = None) -> None:
        self.kit = run.places[0].kit
        self.folder = saved_by.folder if saved_by else run.folder / "sites" / "site-1" / "kept"

    def train(self, *, until: int = 0, resume: int = 0, keys: Any = None, by_hand: bool = False) -> Any:
        """Train, and return the trainer.

        Args:
            until: Iteration after which Ctrl-C is pressed.
            resume: Iteration whose file the training continues from.
            keys: The parts that are saved and loaded; None for all.
            by_hand: Whether to load the file by calling the loader, with max_epochs changed before.
        """
        torch.manual_seed(0)
        net, self.seen = m.network(dropout=0.0), m.Losses()
        optimizer, ours = m.optimizer_for(net), FederatedHandler(kit=self.kit)
        schedule = m.linear_schedule(optimizer, TOTAL)
        step = LrScheduleHandler(schedule, print_lr=False, epoch_level=False)
        training = m.trainer(net, data=m.loader(shuffle=False), optimizer=optimizer)
        parts = {"net": net, "opt": optimizer, "lr": schedule, "trainer": training, "federation": ours}
        parts = {key: part for key, part in parts.items() if keys is None or key in keys}
        saver = CheckpointSaver("kept", parts, save_interval=1, epoch_level=False)
        for handler in (step, ours, m.validates(net), self.seen, saver):
            handler.attach(training)
        if resume:
            file = f"checkpoint_iteration={resume}.pt"
            loader = CheckpointLoader(str(self.folder / file), parts)
            if by_hand:
                training.state.max_epochs = 100
                loader(training)
            else:
                loader.attach(training)
        if until:
            training.add_event_handler(Events.ITERATION_COMPLETED(once=until), interrupt)
        training.run()
        return training


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def start(federation) -> Callable[..., Any]:
    """start(**settings) returns the run and its site 1, beside the halving site 2."""

    def begin(saved_by: Site | None = None, **settings: Any) -> Any:
        run = federation(sites=2, rounds=3, states=None, **settings)
        halving(run.places[1].kit)
        return run, Site(run, saved_by)

    return begin


@pytest.mark.filterwarnings("ignore:this site comes back")
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize(
    ("every", "dies", "resume"),
    [
        ("epoch", 5, 4),  # goes on in the middle of an epoch and of round 2
        ("epoch", 4, 3),  # saved before the exchange of that epoch, which it makes again
        (4, 7, 6),  # rounds that end within epochs
        (3, 4, 3),
    ],
)
def test_resumed_run_ends_as_if_nothing_had_happened(start, every, dies, resume, by_hand) -> None:
    run, site = start(every=every)
    site.train()
    expected, rates = run.model(), site.seen.rates
    run, site = start(every=every, name="again")
    with pytest.raises(KeyboardInterrupt):
        site.train(until=dies)
    training = site.train(resume=resume, by_hand=by_hand)
    assert len(run.result().rounds) == 3
    assert training.state.iteration == len(rates) and site.seen.rates == rates[resume:]
    if resume % m.STEPS:  # Ignite begins an epoch's data from its start, and ends it where it should
        assert m.same(m.weights(training.network), run.model())
        return
    for name, value in expected.items():
        np.testing.assert_allclose(run.model()[name], value, rtol=0, atol=1e-6, err_msg=name)


def test_restart_without_a_checkpoint_takes_the_rounds_that_are_left(start) -> None:
    run, site = start()
    with pytest.raises(KeyboardInterrupt):
        site.train(until=5)
    with pytest.warns(UserWarning, match="behind round 2"):
        training = site.train()
    assert training.state.iteration == 6 and len(run.result().rounds) == 3
    assert site.seen.rates == pytest.approx([m.RATE * (1 - i / TOTAL) for i in range(3, 9)])
    assert [e.data["attempt"] for e in run.events if e.kind == "joined" and e.site == "site-1"] == [1, 2]


def test_resumed_a_round_behind_the_federation(start) -> None:
    run, site = start()
    with pytest.raises(KeyboardInterrupt):
        site.train(until=7)
    with pytest.warns(UserWarning, match="behind round 3"):
        training = site.train(resume=4)
    assert m.same(m.weights(training.network), run.model()) and len(run.result().rounds) == 3
    assert site.seen.rates == pytest.approx([m.RATE * (1 - i / TOTAL) for i in range(6, 6 + len(site.seen.rates))])


def test_comes_back_after_the_last_round(start) -> None:
    run, site = start()
    with pytest.raises(KeyboardInterrupt):
        site.train(until=9)
    run, site = start(every=4, name="steps")  # its last exchange is within an epoch
    site.train()
    assert len(run.result().rounds) == 3


def test_late_site_takes_the_final_weights_and_scores_them(federation) -> None:
    run = federation(rounds=2, min_sites=1)
    net = m.network()
    training = m.trainer(net, [m.validates(net), FederatedHandler(kit=run.places[0].kit)])
    training.add_event_handler(Events.EPOCH_COMPLETED(once=2), interrupt)  # has them, and has not said so
    with pytest.raises(KeyboardInterrupt):
        training.run()
    net = m.network()
    again = m.trainer(net, [m.validates(net), FederatedHandler(kit=run.places[0].kit)])
    again.run()
    assert again.state.iteration == 0 and m.same(m.weights(net), run.model())
    assert len(run.result().rounds) == 2


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"net", "trainer"}, "of no federated run"),
        ({"net", "trainer", "federation"}, "of the run 'first', and this is 'second'"),
    ],
)
def test_checkpoint_of_something_else_is_refused(start, keys, problem) -> None:
    _, site = start(name="first")
    with pytest.raises(KeyboardInterrupt):
        site.train(until=5, keys=keys)
    run, other = start(site, name="second")
    with pytest.raises(ConfigError, match=problem):
        other.train(resume=4, keys=keys)
    assert other.seen.losses == [] and run.server.result() is not None


def test_checkpoint_from_ahead_of_the_federation_is_refused(start) -> None:
    _, site = start(name="same")
    with pytest.raises(KeyboardInterrupt):
        site.train(until=8)
    _, other = start(site, name="same")
    with pytest.raises(ConfigError, match="is of round 3, but the federation is in round 1"):
        other.train(resume=7)
    assert other.seen.losses == []
