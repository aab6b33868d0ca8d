"""LoRA strategies that fix a factor, on a model with an embedding: it is trained, and the rounds are those by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.testing import LocalFederation, Place
from fl_adapters.torch import FederatedLoop
from fl_adapters.torch.live_model import LiveModel
from fl_runtime.errors import ConfigError

peft = pytest.importorskip("peft")

EXAMPLES = (32, 16)
ROUNDS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6)
        self.dense = nn.Linear(6, 3)

    def forward(self, tokens: Any) -> Any:
        return self.dense(self.words(tokens).mean(1))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["words", "dense"]))


def data_of(index: int) -> list[tuple[Any, Any]]:
    draw = torch.Generator().manual_seed(index)
    tokens = torch.randint(0, 12, (EXAMPLES[index], 5), generator=draw)
    labels = (tokens.sum(1) + index) % 3
    return list(zip(tokens.split(8), labels.split(8), strict=True))


def train_step(model: nn.Module, optimizer: Any, tokens: Any, labels: Any) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(tokens), labels).backward()
    optimizer.step()


def factors(model: nn.Module) -> dict[str, Any]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if "lora_" in name}


def fixed(name: str, frozen: str) -> bool:
    """Whether a factor stays as it is in a round that fixes A, or B: for the embedding the other one."""
    embedding = "lora_embedding_" in name
    return (f"lora_embedding_{'B' if frozen == 'A' else 'A'}" if embedding else f"lora_{frozen}") in name


def by_hand(strategy: str) -> list[dict[str, Any]]:
    """Compute the global factors after each round with plain loops, averaged by examples."""
    current, models = {name: tensor.clone() for name, tensor in factors(adapted()).items()}, []
    for number in range(1, ROUNDS + 1):
        frozen = "B" if strategy == "rolora" and number % 2 == 0 else "A"
        parts = []
        for index in range(2):
            model = adapted()
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.copy_(current[name])
                    parameter.requires_grad_(not fixed(name, frozen))
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            for tokens, labels in data_of(index):
                train_step(model, optimizer, tokens, labels)
            parts.append(factors(model))
        total = sum(EXAMPLES)
        current = {
            name: sum(n / total * part[name] for n, part in zip(EXAMPLES, parts, strict=True)) for name in current
        }
        models.append(current)
    return models


def federated(strategy: str) -> list[dict[str, Any]]:
    """Train with `FederatedLoop`; return the factors of site-1 at the start of each round, and at the end."""
    seen: list[dict[str, Any]] = []
    models = [adapted(), adapted()]  # not in threads, which share the random state

    def work(place: Place) -> None:
        model, data = models[place.index], data_of(place.index)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        loop = FederatedLoop(model, optimizer, kit=place.kit, num_examples=EXAMPLES[place.index])
        for each in loop.rounds(data):
            if place.index == 0:
                seen.append({name: tensor.clone() for name, tensor in factors(model).items()})
            for tokens, labels in each:
                train_step(model, optimizer, tokens, labels)
        if place.index == 0:
            seen.append({name: tensor.clone() for name, tensor in factors(model).items()})

    with LocalFederation(sites=2, rounds=ROUNDS, strategy=strategy) as federation:
        federation.run(work)
        federation.result()
    return seen


@pytest.mark.parametrize("strategy", ["ffa-lora", "rolora"])
def test_an_embedding_is_trained_from_round_1_on_and_rounds_are_those_by_hand(strategy: str) -> None:
    found, wanted = federated(strategy), by_hand(strategy)
    assert len(found) == ROUNDS + 1
    for ours, theirs in zip(found[1:], wanted, strict=True):
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=1e-4)
    (a,) = [name for name in found[0] if "lora_embedding_A" in name]
    b = a.replace("embedding_A", "embedding_B")
    assert not found[0][a].any() and found[1][a].any()  # what PEFT begins with, and what round 1 makes of it
    assert torch.equal(found[0][b], found[1][b])
    if strategy == "ffa-lora":
        assert torch.equal(found[0][b], found[-1][b])


def live(model: nn.Module, strategy: str) -> LiveModel:
    settings = SiteSettings.resolve(Options(), {"strategy": strategy})
    return LiveModel(model, [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)], settings)


def test_only_the_trained_factors_leave_the_site() -> None:
    def kept(strategy: str) -> set[str]:
        names = live(adapted(), strategy).state.tensors
        return {part for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") if part in str(names)}

    assert kept("ffa-lora") == {"lora_B", "lora_embedding_A"}
    assert kept("fedsa-lora") == {"lora_A", "lora_embedding_A"}  # both factors are trained, so none is stuck at zero
    assert kept("rolora") == {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


def test_other_frozen_factors_of_an_embedding_show_at_the_handshake() -> None:
    one, other = adapted(), adapted()
    (b,) = [tensor for name, tensor in other.named_parameters() if "lora_embedding_B" in name]
    with torch.no_grad():
        b += 1
    assert live(one, "ffa-lora").agreement("test") != live(other, "ffa-lora").agreement("test")
    assert live(one, "fedit").agreement("test") == live(other, "fedit").agreement("test")


def test_a_frozen_factor_of_zeros_is_refused_before_round_1() -> None:
    model = adapted()
    (a,) = [tensor for name, tensor in model.named_parameters() if "dense.lora_A" in name]
    nn.init.zeros_(a)
    with pytest.raises(ConfigError, match="this LoRA factor is zero and ffa-lora keeps it fixed") as caught:
        live(model, "ffa-lora")
    assert "dense.lora_A" in caught.value.where
    live(model, "rolora")
