"""The state of a LoRA model under strategies that sum products, and what is refused; small PEFT models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.lora.factors import LoraFactors
from fl_adapters.torch.lora.strategy import LoraFreezing
from fl_runtime.aggregation import FedExLoRA, FlexLoRA, FLoRA, make_strategy
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.types import Arrays, Task

peft = pytest.importorskip("peft")

A, B = "base_model.model.dense.lora_A.weight", "base_model.model.dense.lora_B.weight"


class Net(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 6)
        self.dense = nn.Linear(6, 9, bias=False)
        self.image = nn.Conv2d(2, 3, 3)
        if tied:
            self.dense.weight = self.words.weight

    def forward(self, tokens: Any) -> Any:
        return self.dense(self.words(tokens))


def adapted(net: nn.Module | None = None, targets: tuple[str, ...] = ("dense",), **options: Any) -> nn.Module:
    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": False, **options}
    return peft.get_peft_model(net or Net(), peft.LoraConfig(**settings))


def state_of(model: nn.Module, strategy: Any) -> LoraFactors:
    return LoraFactors(model, "auto", (), strategy)


def live(model: nn.Module, strategy: str, **options: Any) -> LiveModel:
    settings = SiteSettings.resolve(Options(**options), {"strategy": strategy})
    return LiveModel(model, [torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)], settings)


def sent(rank: int, seed: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {A: rng.normal(size=(rank, 6)).astype("f4"), B: rng.normal(size=(9, rank)).astype("f4")}


def merged(model: Any) -> Any:
    layer = model.base_model.model.dense
    return (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach().numpy()


def task(arrays: Arrays, round: int = 3, **config: Any) -> Task:
    return Task("", round, "", "train", round - 1, arrays, config=config)


@pytest.mark.parametrize(("options", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / np.sqrt(2))])
def test_what_leaves_is_the_product_itself(options, scale) -> None:
    model = adapted(**options)
    arrays = state_of(model, FlexLoRA()).get_state()
    layer = model.base_model.model.dense
    np.testing.assert_allclose(arrays[B], layer.lora_B["default"].weight.detach() * scale, rtol=1e-6)
    np.testing.assert_allclose(arrays[B] @ arrays[A], layer.get_delta_weight("default").detach(), atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("strategy", [FlexLoRA(), FedExLoRA(), FLoRA()])
def test_what_arrives_is_what_the_model_computes(strategy, rank) -> None:
    """The whole update if the base takes the remainder; for FlexLoRA the part of the site's own rank."""
    model = adapted()
    start = model.base_model.model.dense.get_base_layer().weight.detach().numpy().copy()
    state, arrays = state_of(model, strategy), sent(rank)
    for _ in range(2):  # setting it again, or after something else, makes no difference
        state.set_state(sent(4, seed=8))
        state.set_state(arrays)
    kept = min(rank, 2) if isinstance(strategy, FlexLoRA) else rank
    np.testing.assert_allclose(merged(model), start + arrays[B][:, :kept] @ arrays[A][:kept], atol=1e-5)
    own = model.base_model.model.dense.lora_A["default"].weight
    assert own.shape == (2, 6) and bool(own.abs().sum(1).all())  # every direction can be trained
    if isinstance(strategy, FLoRA):
        assert not model.base_model.model.dense.lora_B["default"].weight.any()

    state.restore_global(arrays)
    np.testing.assert_allclose(merged(model), start + arrays[B] @ arrays[A], atol=1e-5)
    assert np.array_equal(model.base_model.model.dense.get_base_layer().weight.detach(), start)
    assert model.peft_config["default"].r == rank


def test_fresh_factors_are_the_same_at_all_sites_and_other_ones_every_round() -> None:
    made = []
    for seed in (5, 5, 6):
        model = adapted()
        state_of(model, FLoRA()).set_state(sent(3, seed))
        made.append(model.base_model.model.dense.lora_A["default"].weight)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_back_in_the_middle_of_a_round_the_base_alone_is_set() -> None:
    model = adapted()
    own = [p.detach().clone() for n, p in model.named_parameters() if "lora_" in n]
    start = model.base_model.model.dense.get_base_layer().weight.detach().numpy().copy()
    one, arrays = live(model, "flora"), sent(4)
    one.apply_task_config(task(arrays), over=False)
    after = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(torch.equal(a, b) for a, b in zip(own, after, strict=True))
    base = model.base_model.model.dense.get_base_layer().weight.detach()
    np.testing.assert_allclose(base, start + arrays[B] @ arrays[A], atol=1e-5)


def test_half_precision_base_does_not_drift() -> None:
    """Changes are added to the initial weight, not to the weight that the last round left."""
    model = adapted(Net().to(torch.bfloat16))
    start = model.base_model.model.dense.get_base_layer().weight.detach().float()
    state = state_of(model, FLoRA())
    for seed in range(20):
        arrays = sent(3, seed)
        state.set_state(arrays)
    wanted = (start + torch.from_numpy(arrays[B] @ arrays[A])).to(torch.bfloat16)
    assert torch.equal(model.base_model.model.dense.get_base_layer().weight, wanted)


def test_other_shapes_that_arrive_are_refused_before_anything_is_touched() -> None:
    model = adapted()
    state = state_of(model, FLoRA())
    before = merged(model)
    for arrays in ({A: sent(3)[A], B: sent(2)[B]}, {A: np.zeros((3, 7), "f4"), B: sent(3)[B]}, {A: sent(3)[A]}):
        with pytest.raises(StateMismatchError, match="lora_"):
            state.set_state(arrays)
    assert np.array_equal(merged(model), before)


def quantised() -> nn.Module:
    """Return a weight as bitsandbytes would store it, as far as our code can see: bytes."""
    model = adapted()
    layer = model.base_model.model.dense.get_base_layer()
    layer.weight = nn.Parameter(torch.zeros(9, 6, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (quantised, "is quantised"),
        (lambda: adapted(Net(tied=True)), "is tied to another layer"),
        (lambda: adapted(targets=("image",)), "Conv2d layer are not matrices"),
        (lambda: adapted(lora_bias=True), "whose B has a bias"),
    ],
)
def test_what_a_changed_base_does_not_allow(make, reason) -> None:
    for strategy in ("flora", "fedex-lora"):
        with pytest.raises(ConfigError, match=reason):
            live(make(), strategy)


@pytest.mark.parametrize("strategy", ["flexlora", "fedit", "ffa-lora", "rolora", "fedsa-lora"])
def test_methods_that_leave_the_base_alone_work_on_a_quantised_one(strategy) -> None:
    one = live(quantised(), strategy)
    assert "lora" in one.capabilities
    arrays = {name: np.copy(array) for name, array in one.arrays().items()}
    one.apply_task_config(task(arrays, **make_strategy(strategy).configure(1, ["a"])), over=False)
    one.receive(task(arrays))


def test_tied_or_convolutional_layers_are_no_trouble_where_factors_are_averaged() -> None:
    for model in (adapted(Net(tied=True)), adapted(targets=("image",)), adapted(lora_bias=True)):
        assert "lora" in live(model, "ffa-lora").capabilities


def test_averaged_moments_are_refused_with_new_directions() -> None:
    with pytest.raises(ConfigError, match="averaged moments do not belong"):
        live(adapted(), "flexlora", optimizer_state="average")


def test_frozen_by_the_user_stays_frozen() -> None:
    model = adapted()
    a, b = (getattr(model.base_model.model.dense, f"lora_{side}")["default"].weight for side in "AB")
    a.requires_grad_(False)
    one = live(model, "rolora")
    one.apply_task_config(task({}, lora_frozen="B"), over=False)
    assert not a.requires_grad and not b.requires_grad
    one.apply_task_config(task({}), over=True)
    assert not a.requires_grad and b.requires_grad


def test_a_model_without_an_adapter_does_not_declare_lora() -> None:
    assert "lora" not in live(Net(), "flora").capabilities


def test_ranks_and_scales_must_agree_only_where_they_have_to() -> None:
    for strategy, agree in (("flora", False), ("flexlora", False), ("fedex-lora", True), ("fedit", True)):
        one, other = (live(adapted(r=r, lora_alpha=r), strategy).agreement("x") for r in (2, 4))
        assert (one != other) == agree


def test_freezing_is_refused_where_several_ranks_train(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    freezing = LoraFreezing(dict(model.named_parameters()))
    monkeypatch.setattr("fl_adapters.torch.ranks.collectives.several", lambda: True)
    freezing.begin({}, over=False)
    with pytest.raises(ConfigError, match="cannot be frozen while several ranks train"):
        freezing.begin({"lora_frozen": "A"}, over=False)
    assert all(tensor.requires_grad for tensor in freezing.factors.values())
