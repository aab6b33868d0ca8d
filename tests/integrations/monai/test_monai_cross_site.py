"""Cross-site evaluation by the bundle's evaluator, which leaves no trace in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import monai_models as m
import pytest
import torch
from ignite.engine import Events
from monai.handlers import CheckpointSaver, EarlyStopHandler, StatsHandler, ValidationHandler

from fl_adapters.monai import FederatedHandler
from fl_adapters.testing import CrossSiteCase, Trained, cross_site_cases
from fl_runtime.types import Arrays


def valid(site: int) -> Any:
    generator = torch.Generator()  # of its own: else its iterators would draw from that of the dropout
    return torch.utils.data.DataLoader(m.Rows(200 + site, 16), batch_size=8, generator=generator)


class Scored(m.Example):
    def __init__(self) -> None:
        super().__init__(first=False)

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        torch.manual_seed(100 + site)
        net = m.network()
        optimizer = m.optimizer_for(net)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total() if step else 1.0)
        schedule = m.LrScheduleHandler(rate, print_lr=False, epoch_level=False)
        handlers = [schedule, ValidationHandler(1, m.evaluator(net, valid(site))), FederatedHandler(**arguments)]
        training = m.trainer(net, handlers, data=m.loader(site), epochs=epochs, optimizer=optimizer)
        total = lambda: training.state.max_epochs * m.STEPS  # noqa: E731
        made: list[int] = []
        handle = optimizer.register_step_post_hook(lambda *_: made.append(1))
        training.run()
        handle.remove()
        return Trained(m.weights(net), len(made))

    def score(self, site: int, weights: Arrays) -> dict[str, float]:
        return {"loss": m.loss_of(weights, valid(site))}


@pytest.mark.parametrize("case", cross_site_cases(), ids=lambda case: case.__name__)
def test_the_handler_conforms(case: CrossSiteCase) -> None:
    case(Scored())


def test_the_evaluator_knows_nothing_of_it(federation, tmp_path: Path) -> None:
    def left(cross_site: bool) -> Any:
        run = federation(sites=2, rounds=3, cross_site=cross_site)

        def site(place: Any) -> Any:
            torch.manual_seed(place.index)
            net = m.network()
            folder = tmp_path / f"{cross_site}-{place.name}"
            saver = CheckpointSaver(str(folder), {"net": net}, save_key_metric=True, key_metric_n_saved=9)
            stop = EarlyStopHandler(9, lambda engine: -engine.state.metrics["val_loss"])
            printed: list[int] = []
            stats = StatsHandler(
                name=place.name, iteration_log=False, epoch_print_logger=lambda engine: printed.append(1)
            )
            scoring = m.evaluator(net, valid(place.index), [saver, stop, stats])
            own: list[int] = []
            scoring.add_event_handler(Events.COMPLETED, lambda: own.append(1))
            handlers = [ValidationHandler(1, scoring), FederatedHandler(kit=place.kit)]
            training = m.trainer(net, handlers, data=m.loader(place.index), epochs=9)
            stop.set_trainer(training)
            live = [p.data_ptr() for p in net.parameters()]
            training.run()
            assert [p.data_ptr() for p in net.parameters()] == live
            state = {
                k: v for k, v in vars(scoring.state).items() if k not in ("batch", "output", "times", "dataloader")
            }
            files = sorted(path.name for path in folder.iterdir())
            seen = (state, files, len(printed), scoring.has_event_handler(stats.epoch_completed))
            return seen, len(own), m.weights(net), training.optimizer.state_dict()["state"]

        found = run.run(site)
        run.result()
        scores = [e.data["metrics"]["loss"] for e in run.events if e.kind == "cross_score"]
        assert len(scores) == (4 if cross_site else 0)
        return found["site-1"]

    seen, own, weights, optimizer = left(True)
    alone, own_alone, weights_alone, optimizer_alone = left(False)
    assert seen == alone
    assert own == own_alone + 2  # a handler of the user's own runs, as it may be what the metrics need
    assert m.same(weights, weights_alone)
    assert all(torch.equal(optimizer[i][k], optimizer_alone[i][k]) for i in optimizer for k in optimizer[i])
