"""The tensors of a torch module that travel, their names, and the copies in both directions."""

from __future__ import annotations

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from fl_adapters.torch.handshake.agreement import agreement, fingerprint
from fl_adapters.torch.optimizer_state import TorchOptimizerState
from fl_adapters.torch.selection import exchanged_tensors, unwrap
from fl_adapters.torch.state import TorchState, as_array, as_tensor
from fl_runtime.errors import ConfigError, StateMismatchError

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight


def lora_net(method: str = "lora", **options: object) -> nn.Module:
    torch.manual_seed(0)
    configs = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["body"], **options),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=["body"], use_dora=True, **options),
        "ia3": lambda: peft.IA3Config(target_modules=["body"], feedforward_modules=[], **options),
    }
    return peft.get_peft_model(Net(), configs[method]())


def test_auto_is_trainable_parameters_and_persistent_buffers() -> None:
    net = Net()
    net.body.weight.requires_grad_(False)
    assert list(exchanged_tensors(net)) == [
        "body.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "norm.num_batches_tracked", "head.weight", "head.bias",
    ]  # fmt: skip


def test_trainable_all_and_patterns() -> None:
    net = Net()
    net.body.requires_grad_(False)
    assert list(exchanged_tensors(net, "trainable")) == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert list(exchanged_tensors(net, "all")) == [n for n in net.state_dict() if n != "scratch"]
    assert list(exchanged_tensors(net, ("*.bias", "head.*"))) == ["body.bias", "norm.bias", "head.weight", "head.bias"]


def test_keep_local_never_travels() -> None:
    assert not [n for n in exchanged_tensors(Net(), "all", ("norm.*",)) if n.startswith("norm.")]


@pytest.mark.parametrize("options", [{"exchange": ("hed.*",)}, {"keep_local": ("hed.*",)}])
def test_pattern_without_a_match_is_an_error_that_shows_the_names(options: dict[str, tuple[str]]) -> None:
    with pytest.raises(ConfigError, match=r"hed\.\*") as error:
        exchanged_tensors(Net(), **options)  # type: ignore[arg-type]
    assert "body.weight" in str(error.value)


def test_nothing_to_exchange_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no tensor"):
        exchanged_tensors(Net().requires_grad_(False), "trainable")


def test_tied_weights_travel_once_and_stay_tied() -> None:
    model = Tied()
    state = TorchState(model, "all")
    assert list(state.tensors) == ["embed.weight"]
    state.set_state({"embed.weight": np.ones((6, 4), np.float32)})
    assert model.out.weight is model.embed.weight and model.out.weight.min() == 1


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_are_those_of_the_bare_module(wrap: object) -> None:
    net = Net()
    wrapped = wrap(net)  # type: ignore[operator]
    assert unwrap(wrapped) is net
    assert list(exchanged_tensors(wrapped)) == list(exchanged_tensors(net))
    inner = Net()
    inner.body = torch.compile(inner.body, backend="eager")  # one block compiled alone
    assert set(exchanged_tensors(inner)) == set(exchanged_tensors(net))


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("save", [None, ["head"]])
def test_peft_travels_as_the_file_that_peft_writes(method: str, save: list[str] | None) -> None:
    model = lora_net(method, modules_to_save=save)
    state = TorchState(model)
    expected = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert set(state.tensors) == set(expected)
    assert all(np.array_equal(array, expected[n].numpy()) for n, array in state.get_state().items())
    identities = {n: id(p) for n, p in model.named_parameters()}
    state.set_state({n: np.full_like(a, 0.5) for n, a in state.get_state().items()})
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert all(bool((t == 0.5).all()) for t in saved.values())


def test_prompt_learning_travels_as_its_parameters() -> None:
    transformers = pytest.importorskip("transformers")
    base = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    state = TorchState(model)
    assert list(state.tensors) == ["prompt_encoder.default.embedding.weight"]
    state.set_state({n: np.ones_like(a) for n, a in state.get_state().items()})
    assert model.prompt_encoder["default"].embedding.weight.min() == 1


def test_second_active_adapter_is_refused() -> None:
    model = lora_net()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["body"]))
    assert set(exchanged_tensors(model)) == set(exchanged_tensors(lora_net()))  # not active: not ours
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="2 PEFT adapters"):
        exchanged_tensors(model)


def test_trained_outside_the_adapter_is_warned_about() -> None:
    model = lora_net()
    model.base_model.model.head.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match="head.weight"):
        exchanged_tensors(model)
    assert "base_model.model.head.weight" in exchanged_tensors(model, "trainable")


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 5)], ids=str)
def test_every_dtype_there_and_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.arange(size, dtype=torch.uint8) % (2 if dtype is torch.bool else 120)
    tensor = raw.view(dtype).reshape(shape)
    array = as_array(tensor)
    assert array.shape == shape and array.dtype.itemsize == dtype.itemsize
    assert array.tobytes() == raw.numpy().tobytes()
    back = as_tensor(array)
    assert back.dtype is dtype and back.shape == tensor.shape
    assert as_array(back).tobytes() == array.tobytes()


def test_bfloat16_is_the_ml_dtypes_type_and_is_set_in_place() -> None:
    net = Net().to(torch.bfloat16)
    state = TorchState(net, "trainable")
    arrays = state.get_state()
    assert arrays["head.bias"].dtype == ml_dtypes.bfloat16
    state.set_state({n: np.full(a.shape, 1.5, ml_dtypes.bfloat16) for n, a in arrays.items()})
    assert net.head.bias.tolist() == [1.5, 1.5]


def test_host_buffers_are_reused_and_read_only_arrays_are_taken() -> None:
    state = TorchState(Net())
    first, second = state.get_state(), state.get_state()
    assert all(np.shares_memory(first[n], second[n]) for n in first if first[n].size)
    frozen = {n: a.copy() for n, a in first.items()}
    for array in frozen.values():
        array.flags.writeable = False
    state.set_state(frozen)


def test_set_state_keeps_objects_and_optimizer_state() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    before = {n: (id(p), p.data_ptr()) for n, p in net.named_parameters()}
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    state = TorchState(net)
    state.set_state({n: np.zeros_like(a) for n, a in state.get_state().items()})
    assert {n: (id(p), p.data_ptr()) for n, p in net.named_parameters()} == before
    assert all(not p.detach().any() for p in net.parameters())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(moments[i][k], after[i][k]) for i in moments for k in moments[i])


def test_mismatch_names_each_tensor_and_changes_nothing() -> None:
    net = Net()
    state = TorchState(net, "trainable")
    arrays = {n: np.ones_like(a) for n, a in state.get_state().items()}
    arrays["head.weight"] = np.ones((2, 9), np.float32)
    arrays["norm.weight"] = np.ones(3, np.float64)
    arrays["extra"] = arrays.pop("body.bias")
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(StateMismatchError) as error:
        state.set_state(arrays)
    for part in ("missing: body.bias", "unexpected: extra", "head.weight is float32[2, 3] here and float32[2, 9]"):
        assert part in str(error.value)
    assert "norm.weight is float32[3] here and float64[3]" in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_peft_keys_that_peft_itself_would_accept_silently(change: str) -> None:
    model = lora_net()
    state = TorchState(model)
    arrays = {n: a.copy() for n, a in state.get_state().items()}
    array = arrays.pop("base_model.model.body.lora_B.weight")
    if change == "renamed":
        arrays["base_model.model.body.lora_C.weight"] = array
    with pytest.raises(StateMismatchError, match="lora_B"):
        state.set_state(arrays)


def test_quantised_weights_cannot_travel() -> None:
    net = Net()
    net.head.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="quantised"):
        exchanged_tensors(net, "all")
    assert "head.weight" not in exchanged_tensors(net)


# --- optimizer state ---------------------------------------------------------------------------------------------


def trained(optimizer_class: type[torch.optim.Optimizer], **options: object) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = optimizer_class(net.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    for _ in range(3):
        optimizer.zero_grad()
        net(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
    return net, optimizer


def test_moments_travel_by_parameter_name_and_steps_as_integers() -> None:
    net, optimizer = trained(torch.optim.AdamW)
    arrays = TorchOptimizerState(optimizer, exchanged_tensors(net)).get()
    assert {n.partition("/")[0] for n in arrays} == {"exp_avg", "exp_avg_sq", "step"}
    assert arrays["step/head.bias"].dtype == np.int64 and arrays["step/head.bias"] == 3
    assert arrays["exp_avg/head.weight"].shape == (2, 3)
    assert not [n for n in arrays if "running_mean" in n]


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.NAdam, {}),
        (torch.optim.RMSprop, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_moments_set_into_a_fresh_optimizer_continue_it(
    optimizer_class: type[torch.optim.Optimizer], options: dict[str, object]
) -> None:
    net, optimizer = trained(optimizer_class, **options)
    twin = copy.deepcopy(net)
    fresh = optimizer_class(twin.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    TorchOptimizerState(fresh, exchanged_tensors(twin)).set(
        TorchOptimizerState(optimizer, exchanged_tensors(net)).get()
    )
    x = torch.randn(5, 4)
    for model, opt in ((net, optimizer), (twin, fresh)):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_moments_are_set_in_place() -> None:
    net, optimizer = trained(torch.optim.AdamW)
    state = TorchOptimizerState(optimizer, exchanged_tensors(net))
    held = optimizer.state[net.head.bias]["exp_avg"]
    arrays = state.get()
    arrays["exp_avg/head.bias"][:] = 7
    arrays["step/head.bias"][...] = 9
    state.set(arrays)
    assert held.tolist() == [7, 7] and optimizer.state[net.head.bias]["exp_avg"] is held
    assert optimizer.state[net.head.bias]["step"].item() == 9


def test_moments_that_do_not_fit_are_named() -> None:
    net, optimizer = trained(torch.optim.AdamW)
    state = TorchOptimizerState(optimizer, exchanged_tensors(net))
    arrays = state.get()
    del arrays["exp_avg/head.bias"]
    arrays["exp_avg/head.weight"] = np.zeros((9, 9), np.float32)
    with pytest.raises(StateMismatchError, match=r"missing: exp_avg/head\.bias(.|\n)*exp_avg/head\.weight"):
        state.set(arrays)


def test_reset_starts_the_moments_over_and_keeps_the_schedule() -> None:
    net, optimizer = trained(torch.optim.AdamW)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    rate = optimizer.param_groups[0]["lr"]
    TorchOptimizerState(optimizer, exchanged_tensors(net)).reset()
    twin = copy.deepcopy(net)
    fresh = torch.optim.AdamW(twin.parameters(), lr=rate)
    x = torch.randn(5, 4)
    for model, opt in ((net, optimizer), (twin, fresh)):
        opt.zero_grad()
        model(x).square().sum().backward()
        opt.step()
    assert rate == 0.05 and optimizer.param_groups[0]["lr"] == rate and schedule.last_epoch == 1
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_factored_and_quantised_moments_are_refused_with_the_reason() -> None:
    net = Net()
    optimizer = torch.optim.Adafactor(net.parameters())
    with pytest.raises(ConfigError, match="rows and columns"):
        TorchOptimizerState(optimizer, exchanged_tensors(net)).refuse_if_not_averageable()
    net, adam = trained(torch.optim.AdamW)
    adam.state[net.head.weight]["exp_avg"] = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="quantised"):
        TorchOptimizerState(adam, exchanged_tensors(net)).get()
    adam.state[net.head.weight]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ConfigError, match="factored"):
        TorchOptimizerState(adam, exchanged_tensors(net)).get()


# --- agreement ---------------------------------------------------------------------------------------------------


def test_agreement_says_what_shapes_do_not() -> None:
    facts = agreement(lora_net(), framework="hf")
    assert facts["peft.r"] == "2" and facts["peft.target_modules"] == '["body"]' and facts["model"] == "Net"
    assert facts == agreement(lora_net(), framework="hf")
    assert agreement(lora_net("dora"), framework="hf")["peft.use_dora"] != facts["peft.use_dora"]
    assert agreement(lora_net(lora_alpha=99), framework="hf")["peft.lora_alpha"] != facts["peft.lora_alpha"]


def test_fingerprint_tells_another_base_and_ignores_what_travels() -> None:
    base = agreement(lora_net(), framework="hf")["base.fingerprint"]
    other = lora_net()
    with torch.no_grad():
        other.base_model.model.body.base_layer.weight[0, 0] += 1e-6
    assert agreement(other, framework="hf")["base.fingerprint"] != base
    trained_further = lora_net()
    with torch.no_grad():
        trained_further.base_model.model.body.lora_A["default"].weight += 1
    assert agreement(trained_further, framework="hf")["base.fingerprint"] == base


def test_fingerprint_ignores_the_untrained_twin_of_a_saved_module() -> None:
    a, b = lora_net(modules_to_save=["head"]), lora_net(modules_to_save=["head"])
    with torch.no_grad():
        b.base_model.model.head.original_module.weight += 1  # a freshly drawn head differs between sites
    assert agreement(a, framework="hf") == agreement(b, framework="hf")


def test_sampled_fingerprint_sees_both_ends() -> None:
    tensors = {"w": torch.zeros(1_000_000)}
    sampled = fingerprint(tensors, full_bytes=0)
    assert sampled != fingerprint(tensors)
    for index in (0, -1):
        changed = {"w": torch.zeros(1_000_000)}
        changed["w"][index] = 1
        assert fingerprint(changed, full_bytes=0) != sampled


def test_full_model_agreement_covers_frozen_layers() -> None:
    torch.manual_seed(0)
    net = Net()
    assert "base.fingerprint" not in agreement(net, framework="hf")
    net.body.requires_grad_(False)
    assert "base.fingerprint" in agreement(net, framework="hf")
    assert "base.fingerprint" not in agreement(net, framework="hf", keep_local=("body.*",))
