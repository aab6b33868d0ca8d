"""Features of MONAI's trainers: optimizers, precision, log, folders and copies; and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import monai_models as m
import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import DataLoader, Dataset
from monai.engines import GanTrainer, SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver, MetricsSaver, StatsHandler, TensorBoardStatsHandler
from monai.losses import DiceLoss
from monai.networks.nets import UNet
from safetensors.torch import load_model
from torch import nn

from fl_adapters.monai import FederatedHandler
from fl_runtime.errors import ConfigError, FederationError

ROUND = "federation_round"


def train(run: Any, handlers: Any = (), *, net: Any = None, **options: Any) -> Any:
    """Train as the federation's first site in the test's own thread; return the trainer."""
    ours = FederatedHandler(kit=run.places[0].kit)
    training = m.trainer(net or m.network(), [*handlers, ours], **options)
    training.run()
    return training


def halves(run: Any, make: Any, **options: Any) -> list[Any]:
    """Train two sites with networks from make() on different rows; return their networks."""

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        net = make()
        m.trainer(net, [FederatedHandler(kit=place.kit)], data=m.loader(place.index), **options).run()
        return net

    return list(run.run(site).values())


# --- ways to attach ----------------------------------------------------------------------------------------------


def test_attached_by_hand_to_a_trainer_that_is_there(federation) -> None:
    run = federation(rounds=2)
    training = m.trainer(m.network())
    FederatedHandler(kit=run.places[0].kit).attach(training)
    training.run()
    assert training.state.iteration == 6 and m.same(m.weights(training.network), run.model())


def test_one_trainer_takes_part_in_one_run_after_another(federation) -> None:
    """MONAI starts again when a trainer has run all its epochs, and so does the handler."""
    runs = [federation(rounds=2, name=f"run-{i}") for i in range(2)]
    ours = FederatedHandler(kit=runs[0].places[0].kit)
    training = m.trainer(m.network(), [ours])
    training.run()
    ours.options = FederatedHandler(kit=runs[1].places[0].kit).options
    training.run()
    assert [len(run.result().rounds) for run in runs] == [2, 2]
    assert m.same(m.weights(training.network), runs[1].model())


def test_volumes_of_a_segmentation_trainer(federation) -> None:
    """Decollated batches, MetaTensors, a U-Net with Dice loss, and automatic mixed precision."""
    run = federation(sites=2, rounds=2)

    def site(place: Any) -> Any:
        torch.manual_seed(place.index)
        net = UNet(3, 1, 2, (4, 8), (2,), norm="batch")
        images = torch.rand(4, 1, 8, 8, 8)
        data = Dataset([{"image": image, "label": (image > 0.5).float()} for image in images])
        training = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=1,
            train_data_loader=DataLoader(data, batch_size=2),
            network=net,
            optimizer=m.optimizer_for(net),
            loss_function=DiceLoss(to_onehot_y=True, softmax=True),
            train_handlers=[FederatedHandler(kit=place.kit)],
            amp=True,
        )
        training.run()
        return net

    first, second = run.run(site).values()
    assert m.same(m.weights(first), run.model()) and m.same(m.weights(second), run.model())
    assert {e.data["num_examples"] for e in run.events if e.kind == "update"} == {4}


# --- optimizers and precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["keep", "reset", "average"])
def test_moments_by_policy(federation, policy) -> None:
    run = federation(sites=2, rounds=3, optimizer_state=policy)
    optimizers: list[Any] = []

    def site(place: Any) -> None:
        torch.manual_seed(place.index)
        net = m.network()
        optimizers.append(m.optimizer_for(net))
        ours = FederatedHandler(kit=place.kit)
        m.trainer(net, [ours], data=m.loader(place.index), optimizer=optimizers[-1]).run()

    run.run(site)
    states = [optimizer.state[optimizer.param_groups[0]["params"][0]] for optimizer in optimizers]
    assert {float(state["step"]) for state in states} == {3.0 if policy == "reset" else 9.0}
    assert not torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])  # after a round of their own


def test_average_of_factored_moments_is_refused_before_the_first_step(federation) -> None:
    net, seen = m.network(), m.Losses()
    with pytest.raises(ConfigError, match="rows and columns"):
        train(
            federation(optimizer_state="average"),
            [seen],
            net=net,
            optimizer=torch.optim.Adafactor(net.parameters()),
        )
    assert seen.losses == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision(federation, dtype) -> None:
    run = federation(sites=2, rounds=2)
    prepare = lambda batch, *_, **__: (batch["image"].to(dtype), batch["label"])  # noqa: E731
    first, second = halves(run, lambda: m.network().to(dtype), prepare_batch=prepare)
    assert run.model()["0.weight"].dtype.name == str(dtype).removeprefix("torch.")
    assert torch.equal(first[0].weight, second[0].weight)


def test_parameters_keep_their_identity(federation) -> None:
    run = federation(sites=2, rounds=2)
    made: dict[int, dict[str, Any]] = {}  # by the id of the network

    def parameters(net: Any) -> dict[str, Any]:
        return {name: (id(t), t.device) for name, t in net.state_dict(keep_vars=True).items()}

    def make() -> Any:
        net = m.network()
        made[id(net)] = parameters(net)
        return net

    for net in halves(run, make):
        assert parameters(net) == made[id(net)]


def test_keep_local_and_frozen_parts_stay(federation) -> None:
    run = federation(sites=2, rounds=2, keep_local=["1.*"])

    def make() -> Any:
        net = m.network()
        with torch.no_grad():
            net[4].weight.fill_(0.5)
        net[4].weight.requires_grad_(False)
        return net

    first, second = halves(run, make)
    assert set(run.model()) == {"0.weight", "4.bias"}
    assert not torch.equal(first[1].running_mean, second[1].running_mean)


# --- its log and its folders -------------------------------------------------------------------------------------


def test_rounds_are_in_the_frameworks_own_log(federation) -> None:
    run = federation(rounds=3)
    told: list[int] = []
    stats = StatsHandler(iteration_log=False, epoch_print_logger=lambda e: told.append(e.state.metrics[ROUND]))
    training = train(run, [stats])
    assert told == [1, 2, 3]
    size = sum(array.nbytes for array in run.model().values())
    assert training.state.metrics[ROUND] == 3
    assert training.state.metrics["federation_bytes_up"] >= size <= training.state.metrics["federation_bytes_down"]
    assert training.state.metrics["federation_seconds"] > 0


def test_rounds_are_in_tensorboard(federation) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = federation(rounds=2)
    board = TensorBoardStatsHandler(log_dir="board", iteration_log=False)
    train(run, [board])
    board.close()
    found = EventAccumulator("board").Reload()
    assert [event.value for event in found.Scalars("federation_round")] == [1.0, 2.0]


def test_output_folders_of_a_simulated_site_are_its_own(federation) -> None:
    run = federation(rounds=1)
    own = run.folder / "sites" / "site-1"
    net = m.network()
    savers = [
        CheckpointSaver("kept", {"net": net}, save_final=True, save_interval=1),
        CheckpointSaver(str(Path.cwd() / "named"), {"net": net}, save_final=True, final_filename="last.pt"),
    ]
    validation = m.validates(net, handlers=[CheckpointSaver("best", {"net": net}, save_key_metric=True)])
    MetricsSaver("table").attach(validation.validator)
    train(run, [*savers, validation], net=net)
    assert len(list((own / "kept").glob("*.pt"))) == 2 and (own / "named" / "last.pt").is_file()
    assert len(list((own / "best").glob("*.pt"))) == 1 and (own / "table" / "metrics.csv").is_file()
    for folder in ("kept", "named", "best", "table"):
        assert not Path(folder).is_dir() or list(Path(folder).iterdir()) == []


def test_absolute_folder_of_two_sites_is_refused(federation, tmp_path_factory) -> None:
    run = federation(sites=2, rounds=1)
    folder = str(tmp_path_factory.mktemp("elsewhere"))

    def site(place: Any) -> None:
        net = m.network()
        saver = CheckpointSaver(folder, {"net": net}, save_final=True)
        m.trainer(net, [FederatedHandler(kit=place.kit), saver]).run()

    outcomes = run.outcomes({place.name: site for place in run.places}, check=False)
    errors = [outcome.error for outcome in outcomes.values() if isinstance(outcome.error, ConfigError)]
    assert len(errors) == 1 and folder in str(errors[0]) and "relative path" in str(errors[0])


def test_results_open_with_monai_and_with_torch(federation) -> None:
    run = federation(rounds=2)
    net = m.network()
    train(run, [m.validates(net)], net=net)
    for folder, wanted in (("model", m.weights(net)), ("best", run.model("best"))):
        fresh = m.network()
        path = str(run.folder / folder / "model.pt")
        CheckpointLoader(path, {"net": fresh})(m.trainer(fresh))
        assert m.same(m.weights(fresh), wanted)
        fresh = m.network()
        load_model(fresh, run.folder / folder / "model.safetensors")
        assert m.same(m.weights(fresh), wanted)


# --- copies ------------------------------------------------------------------------------------------------------


def pickled(handler: Any) -> Any:
    return pickle.loads(pickle.dumps(handler))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copy_takes_the_place_of_the_handler(federation, duplicate) -> None:
    run = federation(rounds=2)
    m.trainer(m.network(), [duplicate(FederatedHandler(kit=run.places[0].kit))]).run()
    assert len(run.result().rounds) == 2 and len([e for e in run.events if e.kind == "joined"]) == 1


def test_copy_made_in_the_middle_of_a_run_leaves_the_network_alone(federation) -> None:
    run = federation(rounds=1)
    ours, sizes = FederatedHandler(kit=run.places[0].kit), []
    training = m.trainer(m.network(), [ours])
    training.add_event_handler(Events.ITERATION_COMPLETED, lambda: sizes.append(len(pickle.dumps(ours))))
    training.run()
    assert len(sizes) == 3 and max(sizes) < 2000


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [[], [StatsHandler(iteration_log=False)]])
def test_error_of_the_users_own_is_raised_and_the_site_leaves(federation, others) -> None:
    """Ignite swallows an error if a handler listens for errors and does not raise it again."""
    run = federation(sites=2, rounds=3, min_sites=1)

    def site(place: Any) -> None:
        failing = m.Losses(fail_at=4 if place.index else 0)
        m.trainer(m.network(), [*others, failing, FederatedHandler(kit=place.kit)]).run()

    outcomes = run.outcomes({place.name: site for place in run.places}, check=False)
    assert outcomes["site-1"].error is None and "told to fail" in str(outcomes["site-2"].error)
    (left,) = [e for e in run.events if e.kind == "left" and e.site == "site-2"]
    assert "told to fail" in left.data["reason"]


def test_error_before_the_first_epoch_is_raised_too(federation) -> None:
    run = federation()
    training = m.trainer(m.network(), [FederatedHandler(kit=run.places[0].kit)])
    training.add_event_handler(Events.STARTED, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.run()


@pytest.mark.parametrize("kits", [True, False])
def test_handler_given_twice(federation, kits) -> None:
    kit = federation().places[0].kit if kits else None
    with pytest.raises(ConfigError, match="twice"):
        m.trainer(m.network(), [FederatedHandler(kit=kit), FederatedHandler(kit=kit)])
    ours = FederatedHandler(kit=kit)
    ours.attach(training := m.trainer(m.network(), [ours]))  # the same one again does no harm
    training.run()


def test_engines_that_train_no_single_network_are_refused(federation) -> None:
    run = federation()
    engine = Engine(lambda engine, batch: None)
    FederatedHandler(kit=run.places[0].kit).attach(engine)
    with pytest.raises(ConfigError, match="no network"):
        engine.run([1, 2])
    net = nn.Linear(2, 2)
    half = (net, m.optimizer_for(net), lambda output: output)
    gan = GanTrainer("cpu", 1, m.loader(), *half, *half)
    FederatedHandler(kit=federation().places[0].kit).attach(gan)
    with pytest.raises(ConfigError, match="several networks"):
        gan.run()


def test_lazy_parameters_are_refused_unless_something_gave_them_a_shape(federation) -> None:
    make = lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))  # noqa: E731
    seen = m.Losses()
    with pytest.raises(ConfigError, match=r"0\.weight"):
        train(federation(), [seen], net=make())
    assert seen.losses == []
    net, run = make(), federation(rounds=1)
    net(torch.zeros(2, 4))
    train(run, net=net)
    assert run.model()["0.weight"].shape == (8, 4)


def test_weights_that_are_not_finite_are_refused_and_named(federation) -> None:
    net = m.network()
    training = m.trainer(net, [FederatedHandler(kit=federation(rounds=1).places[0].kit)])
    training.add_event_handler(Events.ITERATION_STARTED, lambda: net[4].bias.data.fill_(float("nan")))
    with pytest.raises(FederationError, match=r"[0-4]\.(weight|bias|running)"):
        training.run()


def test_outside_a_federation_it_stays_out_of_the_way(monkeypatch, capfd) -> None:
    monkeypatch.setattr("fl_adapters.participant.registry._announced_alone", False)
    trained = []
    for handlers in ([], [FederatedHandler()]):
        torch.manual_seed(0)
        net = m.network()
        saver = CheckpointSaver("kept", {"net": net}, save_final=True)
        training = m.trainer(net, [*handlers, m.validates(net, handlers=[saver])], epochs=2)
        training.run()
        trained.append(m.weights(net))
        assert "federation_round" not in training.state.metrics and list(Path("kept").glob("*.pt"))
    assert m.same(*trained) and FederatedHandler().state_dict() == {}
    lines = [line for line in capfd.readouterr().err.splitlines() if "fl-adapters" in line]
    assert len(lines) == 1
    with pytest.raises(ConfigError, match="required=True"):
        m.trainer(m.network(), [FederatedHandler(required=True)]).run()


class ScaledLoss(torch.nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(scores * self.scale, labels)


def test_parameters_of_a_loss_travel_with_the_network(federation) -> None:
    run = federation(sites=2)

    def site(place: Any) -> float:
        torch.manual_seed(place.index)
        net, loss = m.network(), ScaledLoss()
        optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], lr=0.1)
        handler = FederatedHandler(kit=place.kit)
        trainer = m.trainer(net, [handler], data=m.loader(place.index), epochs=100, optimizer=optimizer)
        trainer.loss_function = loss
        trainer.run()
        return loss.scale.item()

    scales = set(run.run(site).values())
    assert scales == {run.model()["loss_function.scale"].item()}
    assert scales != {1.0}
