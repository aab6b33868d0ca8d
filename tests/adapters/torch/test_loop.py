"""`FederatedLoop`: loops of one's own, plain and under Accelerate, compared with loops that average by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_loops as t
from killed_sites import WarmProcess, run_sites
from safetensors.numpy import load_file

from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_adapters.testing import (
    CorrectionCase,
    CrossSiteCase,
    LocalFederation,
    Place,
    RestartCase,
    correction_cases,
    cross_site_cases,
    restart_cases,
    training_cases,
)
from fl_adapters.torch import FederatedLoop
from fl_runtime.errors import ConfigError, SiteFailedError

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import torch_loops as t
from fl_adapters import site
t.Example().train(site().index, epochs=100, keep_local=["1.*"])
"""
EXAMPLES = {
    "plain": t.Example(),
    "accumulating": t.Example("sgd", accumulate=2),
    "accelerate": t.Example(accelerate=True),
    "accelerate, accumulating": t.Example("sgd", accumulate=2, accelerate=True),
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
@pytest.mark.parametrize("case", training_cases(), ids=lambda case: case.__name__)
def test_training(case: Any, example: t.Example) -> None:
    case(example)


@pytest.mark.parametrize("example", [t.Example(), t.Example("plain sgd"), EXAMPLES["accelerate, accumulating"]])
@pytest.mark.parametrize("case", correction_cases(), ids=lambda case: case.__name__)
def test_corrections(case: CorrectionCase, example: t.Example) -> None:
    case(example)


@pytest.mark.parametrize("case", cross_site_cases(), ids=lambda case: case.__name__)
def test_cross_site(case: CrossSiteCase) -> None:
    case(t.ScoredExample())


@pytest.mark.parametrize("accelerate", [False, True], ids=["plain", "accelerate"])
@pytest.mark.parametrize("case", restart_cases(), ids=lambda case: case.name)
def test_the_loop_restarts_exactly(case: RestartCase, accelerate: bool) -> None:
    case(t.Example(accelerate=accelerate))


@pytest.mark.parametrize("strategy", ["scaffold", "ditto:lam=0.1"])
def test_with_what_a_strategy_keeps_at_the_site(strategy: str) -> None:
    restart_cases(strategy=strategy)[-1](t.Example())


def test_killed_at_random_instants(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(Path(t.__file__).parent)))
    with WarmProcess("torch") as warm:
        wanted = run_sites(tmp_path / "undisturbed", script, warm=warm, rounds=5)
        assert run_sites(tmp_path / "disturbed", script, warm=warm, kills=4, seed=2, rounds=5) == wanted


def steps_of(batches: Any, net: Any, optimizer: Any) -> int:
    """Train on these batches; the number of steps."""
    count = 0
    for x, y in batches:
        optimizer.zero_grad()
        t.cross_entropy(net(x), y).backward()
        optimizer.step()
        count += 1
    return count


def run(body: Any, sites: int = 2, **settings: Any) -> tuple[LocalFederation, dict[str, Any]]:
    with LocalFederation(sites=sites, states=t.STATES, **settings) as federation:
        found = federation.run(body)
        federation.result()
    return federation, found


@pytest.mark.parametrize("length", ["known", "unknown"])
def test_rounds_of_steps_go_on_within_the_epoch(length: str) -> None:
    """Rounds of two steps over epochs of three: the batches are those of a loop over the loader."""
    seen: dict[int, list[float]] = {}

    def body(place: Place) -> list[int]:
        torch.manual_seed(place.index)
        net = t.network()
        optimizer = t.optimizer_for(net)
        data: Any = t.loader(place.index)
        if length == "unknown":
            whole = data

            class Endless:
                def __iter__(self) -> Any:
                    return iter(whole)

            data = Endless()
        firsts: list[float] = []
        steps = []
        for round in FederatedLoop(net, optimizer, kit=place.kit, every=2).rounds(data):
            steps.append(steps_of(((x, firsts.append(float(x[0, 0])) or y) for x, y in round), net, optimizer))
        seen[place.index] = firsts
        return steps

    _, found = run(body, rounds=3)
    assert found == {"site-1": [2, 2, 2], "site-2": [2, 2, 2]}
    for index, firsts in seen.items():
        loader = t.loader(index)
        assert firsts == [float(x[0, 0]) for _ in range(2) for x, _ in loader]


@pytest.mark.parametrize("every", ["epoch", "2 epochs", 2])
def test_alone_it_trains_the_epochs_that_the_script_says(every: Any, capsys: pytest.CaptureFixture[str]) -> None:
    net = t.network()
    optimizer = t.optimizer_for(net)
    steps = [
        steps_of(round, net, optimizer)
        for round in FederatedLoop(net, optimizer, every=every).rounds(t.loader(), epochs=3)
    ]
    assert sum(steps) == 3 * t.STEPS
    assert steps == {"epoch": [3, 3, 3], "2 epochs": [6, 3], 2: [2, 2, 2, 2, 1]}[every]


def test_every_global_model_is_scored_and_the_best_can_stay(tmp_path: Path) -> None:
    """The scores are those of the arriving models, and the model's mode is what it was."""

    def body(place: Place) -> Any:
        torch.manual_seed(place.index)
        net = t.network()
        optimizer = t.optimizer_for(net)
        scores: list[float] = []

        def evaluate() -> Any:
            assert not torch.is_grad_enabled()
            metrics, count = t.score(net)
            scores.append(metrics["loss"])
            return {"loss": float(len(scores) != 2)}, count  # the second is the best

        loop = FederatedLoop(net, optimizer, evaluate=evaluate, best_at_end=True, kit=place.kit)
        net.train()
        for round in loop.rounds(t.loader(place.index)):
            assert net.training
            steps_of(round, net, optimizer)
        assert loop.exchange_stats["federation_round"] == 4
        return scores, t.score(net)[0]["loss"]

    federation, found = run(body, rounds=4)
    assert federation.result().best_round == 2
    for scores, last in found.values():
        assert len(scores) == 4
        assert last == scores[1]


def test_a_checkpoint_of_the_loop_resumes_the_run() -> None:
    """A process that dies after round 2 goes on from its checkpoint, with the optimizer it had."""
    saved: dict[str, Any] = {}
    is_back = threading.Event()

    def body(place: Place) -> Any:
        while True:
            torch.manual_seed(place.index)
            net = t.network()
            optimizer = t.optimizer_for(net)
            loop = FederatedLoop(net, optimizer, kit=place.kit)
            resumed = dict(saved) if place.index == 0 else {}
            if resumed:
                net.load_state_dict(resumed["net"])
                optimizer.load_state_dict(resumed["optimizer"])
                loop.load_state_dict(resumed["loop"])
            numbers = []
            for round in loop.rounds(t.loader(place.index)):
                if place.index == 0 and round.number == 3 and not resumed:
                    saved["net"] = {k: v.clone() for k, v in net.state_dict().items()}
                    saved["optimizer"], saved["loop"] = optimizer.state_dict(), loop.state_dict()
                    break
                if resumed:
                    is_back.set()
                elif place.index == 1 and round.number == 3:
                    assert is_back.wait(60)  # else this site alone ends the run
                numbers.append(round.number)
                steps_of(round, net, optimizer)
            else:
                return numbers, loop.state_dict(), optimizer.state_dict()["state"][0]["step"].item()
            close_sessions("its process died", read_kit(place.kit), failed=True)

    with LocalFederation(sites=2, rounds=4, min_sites=1) as federation:
        numbers, state, steps = federation.run(body)["site-1"]
    assert numbers == [3, 4]
    assert state == {}  # the run is over
    assert steps == t.STEPS * 4


def test_a_checkpoint_of_another_run_is_refused() -> None:
    def body(place: Place) -> None:
        net = t.network()
        loop = FederatedLoop(net, t.optimizer_for(net), kit=place.kit)
        loop.load_state_dict({"job": "another", "progress": {"round": 2, "steps": 3, "began": 3}})
        list(loop.rounds(t.loader()))

    with pytest.raises(ConfigError, match="of the run 'another'"):
        run(body, sites=1, rounds=2)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda round, net, optimizer: None, "has not taken the batches of round 1"),
        (lambda round, net, optimizer: list(round), "without a step of the optimizer"),
        (lambda round, net, optimizer: steps_of(round, net, t.optimizer_for(net)), "without a step of the optimizer"),
    ],
    ids=["other batches", "no step", "another optimizer"],
)
def test_a_loop_that_does_not_train_is_refused_before_anything_is_sent(body: Any, match: str) -> None:
    def train(kit: str | None = None) -> None:
        net = t.network()
        optimizer = t.optimizer_for(net)
        for round in FederatedLoop(net, optimizer, kit=kit).rounds(t.loader()):
            body(round, net, optimizer)

    with pytest.raises(ConfigError, match=match):
        run(lambda place: train(place.kit), sites=1, rounds=2)
    with pytest.raises(ConfigError, match=match):  # alone, too
        train()


@pytest.mark.parametrize(("every", "rounds"), [("epoch", 3), ("2 epochs", 2)])
def test_an_epoch_that_the_body_breaks_off_counts(every: str, rounds: int) -> None:
    """Alone the loop would never end otherwise."""
    net = t.network()
    optimizer = t.optimizer_for(net)
    numbers = []
    for round in FederatedLoop(net, optimizer, every=every).rounds(t.loader(), epochs=3):
        numbers.append(round.number)
        steps_of(itertools.islice(round, 1), net, optimizer)
    assert numbers == list(range(1, rounds + 1))


def test_a_sampler_moves_on_after_an_epoch_that_was_broken_off() -> None:
    epochs = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    def body(place: Place) -> None:
        net = t.network()
        optimizer = t.optimizer_for(net)
        data = t.rows(0)
        for round in FederatedLoop(net, optimizer, kit=place.kit).rounds(
            torch.utils.data.DataLoader(data, batch_size=8, sampler=Sampler(data))
        ):
            steps_of(itertools.islice(round, 1), net, optimizer)

    run(body, sites=1, rounds=3)
    assert epochs == [0, 1, 2]


def test_a_loop_that_breaks_off_leaves_the_run() -> None:
    def body(place: Place) -> None:
        net = t.network()
        optimizer = t.optimizer_for(net)
        for round in FederatedLoop(net, optimizer, kit=place.kit).rounds(t.loader()):
            steps_of(round, net, optimizer)
            if place.index == 0 and round.number == 2:
                break

    federation, _ = run(body, rounds=3, min_sites=1)
    (left,) = [event for event in federation.events if event.kind == "left" and event.data["early"]]
    assert left.site == "site-1"
    assert "the trainer stopped at step 6, in round 2" in left.data["reason"]


def test_arguments_that_cannot_work_are_refused() -> None:
    net = t.network()
    optimizer = t.optimizer_for(net)
    with pytest.raises(ConfigError, match="needs a score of each global model"):
        FederatedLoop(net, optimizer, best_at_end=True)
    with pytest.raises(ConfigError, match="needs a score of each global model"):
        FederatedLoop(net, optimizer, evaluate_global=True)
    with pytest.raises(ConfigError, match="the model is of the type AdamW"):
        FederatedLoop(optimizer, net)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the optimizer is of the type float"):
        FederatedLoop(net, [optimizer, 0.1])
    with pytest.raises(ConfigError, match="is not a function"):
        FederatedLoop(net, optimizer, evaluate={"loss": 0.3})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rounds\(\) got 3 in place of the training data"):
        list(FederatedLoop(net, optimizer).rounds(3))
    with pytest.raises(ConfigError, match="holds no parameter of the model"):
        list(FederatedLoop(t.network(), optimizer).rounds(t.loader()))
    with pytest.raises(ConfigError, match="scheduler_steps='batch'"):
        FederatedLoop(net, optimizer, scheduler_steps="batch")  # type: ignore[arg-type]
    loop = FederatedLoop(net, optimizer, evaluate=lambda: 0.3)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match=r"evaluate\(\) returned float"):
        loop._evaluated()


@pytest.mark.parametrize("missing", ["torch", "safetensors"])
def test_a_package_that_is_missing_is_named_with_the_extra(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom fl_adapters.torch import FederatedLoop"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'fl-adapters[torch]'" in done.stderr
    assert missing in done.stderr.splitlines()[-1]


def test_parameters_of_another_network_are_named_in_a_warning() -> None:
    net = t.network()
    optimizer = torch.optim.SGD([*net.parameters(), *t.network().parameters()], lr=0.1)
    with pytest.warns(UserWarning, match="are not part of the model"):
        next(FederatedLoop(net, optimizer).rounds(t.loader()))


def test_data_that_gives_its_batches_once_is_refused() -> None:
    net = t.network()
    optimizer = t.optimizer_for(net)
    rounds = FederatedLoop(net, optimizer).rounds(iter(t.loader()), epochs=2)
    assert steps_of(next(rounds), net, optimizer) == t.STEPS
    second = next(rounds)
    with pytest.raises(ConfigError, match="has given no batch in epoch 2"):
        steps_of(second, net, optimizer)


def test_several_losses_at_once_are_refused() -> None:
    net = t.network()
    with pytest.raises(ConfigError, match="got 2 losses"):
        next(FederatedLoop(net, t.optimizer_for(net)).rounds(t.loader())).add_loss(torch.ones(2))


def test_steps_without_rounds_in_the_job_are_refused() -> None:
    """How many batches make a step is the loop's affair, so epochs do not say how many rounds there are."""

    def body(place: Place) -> None:
        net = t.network()
        list(FederatedLoop(net, t.optimizer_for(net), kit=place.kit, every=2).rounds(t.loader()))

    with pytest.raises((ConfigError, SiteFailedError), match="unknown how long this run is"):
        run(body, sites=1, rounds=None)


def test_statistics_changed_by_evaluate_are_put_back() -> None:
    """An `evaluate` that forgets `model.eval()` changes the batch-norm statistics."""

    def body(place: Place) -> Any:
        net = t.network()
        optimizer = t.optimizer_for(net)

        def evaluate() -> dict[str, float]:
            net.train()
            return {"loss": net(torch.full((8, 4), 50.0)).mean().item()}

        for round in FederatedLoop(net, optimizer, kit=place.kit, evaluate=evaluate).rounds(t.loader(place.index)):
            steps_of(round, net, optimizer)
        return {name: tensor.numpy() for name, tensor in net.state_dict().items()}

    with LocalFederation(sites=2, rounds=2, states=t.STATES) as federation:
        sites = federation.run(body)
        exported = load_file(federation.folder / "model" / "model.safetensors")
        final = federation.model()
        opened = t.network()
        opened.load_state_dict(federation.load())
    for found in sites.values():
        assert all((found[name] == array).all() for name, array in final.items())
        assert all((found[name] == array).all() for name, array in exported.items())
        assert all((tensor.numpy() == found[name]).all() for name, tensor in opened.state_dict().items())
