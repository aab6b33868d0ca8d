"""`exact_restart` with MONAI: sites that die end with the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai_models as m
import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from killed_sites import WarmProcess, run_sites
from monai.data import DataLoader, Dataset
from monai.handlers import LrScheduleHandler
from monai.transforms import RandGaussianNoised

from fl_adapters.monai import FederatedHandler
from fl_adapters.testing import Death, LocalFederation, Place, RestartCase, Trained, restart_cases
from fl_runtime.errors import ConfigError, SiteFailedError

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import monai_models as m
from fl_adapters import site
m.Example(True).train(site().index, epochs=100, keep_local=["1.*"])
"""


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("case", restart_cases(), ids=lambda case: case.name)
def test_the_handler_restarts_exactly(case: RestartCase, first: bool) -> None:
    case(m.Example(first))


@pytest.mark.parametrize("strategy", ["scaffold", "ditto:lam=0.1"])
def test_with_what_a_strategy_keeps_at_the_site(strategy: str) -> None:
    restart_cases(strategy=strategy)[-1](m.Example(True))


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """SIGKILL, with AdamW, a falling learning rate, dropout, shuffling, and batch statistics that stay at the site."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(Path(m.__file__).parent)))
    with WarmProcess("monai.engines", "monai.handlers", "ignite.metrics") as warm:
        wanted = run_sites(tmp_path / "undisturbed", script, warm=warm, rounds=5)
        assert run_sites(tmp_path / "disturbed", script, warm=warm, kills=4, seed=2, rounds=5) == wanted


@pytest.mark.parametrize("workers", [0, 1])
def test_random_transforms_validation_and_a_schedule_of_epochs(tmp_path: Path, workers: int) -> None:
    class Augmented(m.Example):
        def train(self, site: int, *, fail_at: int = 0, **arguments: Any) -> Trained:
            torch.manual_seed(site)
            net = m.network()
            rows = m.Rows(site)
            noisy = Dataset([rows[i] for i in range(len(rows))], RandGaussianNoised("image", prob=0.8, std=0.5))
            data = DataLoader(noisy, batch_size=m.BATCH, shuffle=True, num_workers=workers)
            optimizer = m.optimizer_for(net)
            rates = LrScheduleHandler(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7), print_lr=False)
            handlers = [m.Losses(fail_at), rates, m.validates(net), FederatedHandler(kit=arguments["kit"])]
            m.trainer(net, handlers, data=data, epochs=9, optimizer=optimizer).run()
            return Trained(m.weights(net), 0)

    example = Augmented(True)
    for case in restart_cases(every="2 epochs")[-2:]:
        case(example)


def test_all_rounds_are_scored(tmp_path: Path) -> None:
    def run(deaths: list[Death], folder: str) -> tuple[Any, Any]:
        left = len(deaths)

        def site(place: Place) -> None:
            nonlocal left
            while True:
                torch.manual_seed(0)
                net = m.network()
                try:
                    return m.trainer(net, [m.validates(net), FederatedHandler(kit=place.kit)]).run()
                except SiteFailedError:
                    assert left
                    left -= 1

        settings: dict[str, Any] = {"rounds": 3, "exact_restart": True, "deaths": deaths}
        with LocalFederation(sites=1, states=m.STATES, folder=tmp_path / folder, **settings) as federation:
            federation.run(site)
            best = federation.result().best_round
        return best, sorted({event.round for event in federation.events if event.kind == "report"})

    wanted = run([], "undisturbed")
    assert wanted[1] == [1, 2, 3]
    for death in (Death("site-1", "Next", 3, heard=True), Death("site-1", "Score", 3)):
        assert run([death], f"{death.method} {death.number}") == wanted


def refused(*handlers: Any, net: Any = None, every: Any = None, **options: Any) -> str:
    def train(place: Place) -> None:
        m.trainer(net or m.network(), [*handlers, FederatedHandler(kit=place.kit)], **options).run()

    with LocalFederation(sites=1, states=m.STATES, rounds=2, exact_restart=True, every=every) as federation:
        outcome = federation.outcomes({"site-1": train}, check=False)["site-1"]
        assert not [event for event in federation.events if event.kind == "round_started"]
    assert isinstance(outcome.error, ConfigError), outcome.error
    return str(outcome.error)


class Steps:
    """A learning-rate schedule in a user's own handler."""

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.schedule.step)


class Averaging:
    def __init__(self, net: Any) -> None:
        self.handler = EMAHandler(net)

    def attach(self, engine: Any) -> None:
        self.handler.attach(engine)


def test_what_cannot_be_exact_is_refused_before_round_1() -> None:
    net = m.network()
    optimizer = m.optimizer_for(net)
    assert "a budget in steps" in refused(every=2)
    assert "persistent data loader workers" in refused(data=m.loader(num_workers=1, persistent_workers=True))
    plateau = LrScheduleHandler(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), step_transform=lambda _: 0.0)
    assert "follows a metric" in refused(plateau, net=net, optimizer=optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert "by monai.handlers.LrScheduleHandler" in refused(Steps(schedule), net=net, optimizer=optimizer)
    assert "EMAHandler" in refused(Averaging(net), net=net, optimizer=optimizer)
