"""`FederatedLoop` under FSDP2: each rank holds a part of the model, and the federation is that of whole models."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.numpy import load_file
from torch import nn
from torch_fsdp_site import ROWS, model_of, take_part, train
from torch_loops import STATES

from fl_adapters.participant.kit import read_kit
from fl_adapters.participant.registry import close_sessions
from fl_adapters.testing import LocalFederation
from fl_adapters.torch import FederatedLoop
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import ConfigError

TIMEOUT_S = 300
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch_fsdp_site", "peft"])
ROUNDS = 3
RUNS: dict[str, tuple[tuple[int, int], dict[str, Any], dict[str, Any]]] = {
    # name -> (ranks of both sites, the sites' settings, the job)
    "llama": ((2, 2), {"model": "llama"}, {"optimizer_state": "average"}),
    "qwen": ((2, 1), {"model": "qwen", "sgd": True}, {"strategy": "scaffold", "cross_site": True}),
    "hsdp": ((2, 1), {"model": "llama", "copies": 2}, {}),
    "lora": ((2, 1), {"model": "llama", "lora": True}, {"strategy": "fedprox:mu=0.1"}),
}


@dataclass
class Ended:
    """A run that has ended, and the same run with sites of one process each."""

    model: dict[str, np.ndarray]
    events: list[Any]
    folder: Path
    ranks: list[dict[str, Any]]
    plain_model: dict[str, np.ndarray]
    plain_events: list[Any]


def start(site: int, runs: list[Any], folder: Path) -> list[Any]:
    """Start the two ranks of a site. Each leaves a file in `folder` for each run."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_forks.Process(target=take_part, args=(rank, port, folder, runs)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


def train_in_turn(places: list[tuple[Any, dict[str, Any]]]) -> None:
    """Take part in several runs as site 2, in one process."""
    for place, settings in places:
        train(place.kit, site=2, settings=settings)
        close_sessions("its script has ended", read_kit(place.kit), failed=False)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ended]]:
    """All runs of RUNS, each once with sharded sites and once without. Four processes train them all."""
    top = tmp_path_factory.mktemp("fsdp")
    plain: dict[str, tuple[Any, Any]] = {}
    for name, (_, settings, job) in RUNS.items():
        with LocalFederation(sites=2, states=STATES, rounds=ROUNDS, every=2, **job) as whole:
            whole.run(lambda place, settings=settings: train(place.kit, site=int(place.name[-1]), settings=settings))
            plain[name] = whole.model(), whole.events
    with ExitStack() as stack:
        runs = {
            name: stack.enter_context(
                LocalFederation(sites=2, sockets=True, folder=top / name, name=name, rounds=ROUNDS, every=2, **job)
            )
            for name, (_, _, job) in RUNS.items()
        }
        processes = [
            process
            for site in (1, 2)
            for process in start(
                site,
                [
                    (name, run.places[site - 1].kit, {**RUNS[name][1], "site": site})
                    for name, run in runs.items()
                    if RUNS[name][0][site - 1] == 2
                ],
                top / f"site-{site}",
            )
        ]
        others = [(run.places[1], RUNS[name][1]) for name, run in runs.items() if RUNS[name][0][1] == 1]
        thread = threading.Thread(target=train_in_turn, args=(others,), daemon=True)
        thread.start()
        for process in processes:
            process.join(TIMEOUT_S)
        outputs = [path.read_text() for path in top.glob("site-*/output-*.txt")]
        assert [process.exitcode for process in processes] == [0] * 4, "\n".join(outputs)
        thread.join(TIMEOUT_S)
        yield {
            name: Ended(run.model(), run.events, run.folder, _left(top, name), *plain[name])
            for name, run in runs.items()
            if len(run.result().rounds) == ROUNDS
        }


def _left(top: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(path, weights_only=True) for path in sorted(top.glob(f"site-*/{name}-*.pt"))]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sharded_sites_train_the_model_of_whole_ones(ended: dict[str, Ended], name: str) -> None:
    run = ended[name]
    assert run.model.keys() == run.plain_model.keys()
    for tensor, value in run.plain_model.items():
        assert np.abs(run.model[tensor] - value).max() < 1e-6, tensor
    told = [
        sorted((e.site, e.round, e.data["metrics"]["loss"]) for e in events if e.kind == "report")
        for events in (run.events, run.plain_events)
    ]
    assert [entry[:2] for entry in told[0]] == [entry[:2] for entry in told[1]]
    assert [entry[2] for entry in told[0]] == pytest.approx([entry[2] for entry in told[1]], abs=1e-5)
    matrices = [
        [e.data["matrix"] for e in events if e.kind == "cross_site"] for events in (run.events, run.plain_events)
    ]
    for mine, wanted in zip(*matrices, strict=True):
        assert {model: sorted(row) for model, row in mine.items()} == {
            model: sorted(row) for model, row in wanted.items()
        }
    assert [e.data["num_examples"] for e in run.events if e.kind == "update"] == [ROWS] * 2 * ROUNDS


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_rank_ends_with_its_part_of_the_global_model(ended: dict[str, Ended], name: str) -> None:
    run, settings = ended[name], RUNS[name][1]
    whole = model_of(settings["model"], lora=settings.get("lora", False))
    size = sum(parameter.numel() for parameter in whole.parameters())
    for first, second in zip(run.ranks[::2], run.ranks[1::2], strict=True):
        assert first["held"] + second["held"] == size * settings.get("copies", 1)
        for left in (first, second):
            assert left["stats"]["federation_round"] == ROUNDS
            whole.load_state_dict(left["weights"], strict=False)
            for tensor, array in TorchState(whole).get_state().items():
                assert array.tobytes() == run.model[tensor].tobytes(), tensor


@pytest.mark.slow
def test_a_sharded_site_leaves_a_model_that_the_framework_opens(ended: dict[str, Ended]) -> None:
    for name in ("llama", "qwen"):
        opened = transformers.AutoModelForCausalLM.from_pretrained(ended[name].folder / "model")
        for tensor, array in TorchState(opened).get_state().items():
            assert array.tobytes() == ended[name].model[tensor].tobytes(), tensor
    folder = ended["lora"].folder / "model"
    assert {tensor.rpartition("lora_")[1] for tensor in load_file(folder / "adapter_model.safetensors")} == {"lora_"}
    adapted = peft.PeftModel.from_pretrained(model_of("llama"), folder)
    for tensor, array in TorchState(adapted, exchange=["*lora*"]).get_state().items():
        assert array.tobytes() == ended["lora"].model[tensor].tobytes(), tensor


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def rounds_of(kit: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for round in FederatedLoop(net, optimizer, kit=kit).rounds([torch.ones(2, 4)]):
        for batch in round:
            net(batch).sum().backward()
            optimizer.step()


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        ({"exact_restart": True}, "a sharded model is not supported yet"),
        ({"strategy": "ditto"}, "a personal model does not work with a sharded model"),
        ({"strategy": "scaffold"}, "SCAFFOLD with another optimizer than plain SGD"),
    ],
)
def test_what_a_sharded_model_cannot_do_is_refused_before_a_step(
    one_rank: None, job: dict[str, Any], reason: str
) -> None:
    from torch.distributed.fsdp import fully_shard

    net = fully_shard(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(net.parameters())
    with LocalFederation(sites=1, rounds=2, **job) as run, pytest.raises(ConfigError, match=reason):
        run.run(lambda place: rounds_of(place.kit, net, optimizer))
    assert not optimizer.state


def test_an_optimizer_made_before_sharding_is_refused(one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    net = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    fully_shard(net)
    with LocalFederation(sites=1, rounds=2) as run, pytest.raises(ConfigError, match=r"after fully_shard"):
        run.run(lambda place: rounds_of(place.kit, net, optimizer))


def test_fsdp1_is_refused_with_what_to_use(one_rank: None) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW(net.parameters())
    with LocalFederation(sites=1, rounds=2) as run, pytest.raises(ConfigError, match="(?s)FSDP1 .*fully_shard"):
        run.run(lambda place: rounds_of(place.kit, net, optimizer))
