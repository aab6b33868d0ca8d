"""Which tensors of a model travel, and what is said of those that do not."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch_loops as t
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from fl_adapters.participant.options import Options, SiteSettings
from fl_adapters.testing import LocalFederation
from fl_adapters.torch import FederatedLoop
from fl_adapters.torch.handshake.agreement import agreement
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.selection import exchanged_tensors, frozen_base, modules_in, tensors_beside
from fl_adapters.torch.state import TorchState
from fl_runtime.errors import ConfigError, HandshakeError

NORMS = pytest.mark.parametrize(
    "norm", [spectral_norm, parametrizations.spectral_norm], ids=["hook", "parametrization"]
)


def normalised(norm: Any, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(norm(nn.Conv2d(2, 5, 3)), nn.Flatten(), norm(nn.Linear(5, 4)), nn.Linear(4, 2))


def largest_singular_values(net: nn.Module) -> list[float]:
    """Of the two normalised weights, as the network uses them. They should be 1."""
    net.eval()(torch.zeros(1, 2, 3, 3))  # the hook computes the weight in a forward pass
    return [float(np.linalg.norm(net[i].weight.detach().flatten(1).numpy(), 2)) for i in (0, 2)]


@NORMS
@pytest.mark.parametrize("exchange", ["auto", "trainable", "all", ("*",)])
def test_singular_vectors_stay_at_the_site(norm: Any, exchange: Any) -> None:
    net = normalised(norm)
    names = set(exchanged_tensors(net, exchange))
    parameters = {name for name, _ in net.named_parameters()}
    assert names == parameters
    assert exchanged_tensors(net, exchange, ("*_u", "*_v")).keys() == parameters  # allowed, and of no effect


@NORMS
def test_pattern_for_singular_vectors_alone_is_refused(norm: Any) -> None:
    with pytest.raises(ConfigError, match=r"'\*_u' names only tensors that never travel"):
        exchanged_tensors(normalised(norm), ("3.*", "*_u"))


@NORMS
def test_singular_vectors_follow_from_weights_that_arrive(norm: Any) -> None:
    """The weights of another network arrive; its singular vectors are quite different ones."""
    net, other = normalised(norm), normalised(norm, seed=1)
    TorchState(net).set_state(TorchState(other).get_state())
    assert largest_singular_values(net) == pytest.approx([1, 1], rel=1e-2)
    x = torch.randn(3, 2, 3, 3)
    for _ in range(50):  # each forward pass in training mode makes one power iteration
        other.train()(x)
    torch.testing.assert_close(net(x), other.eval()(x), rtol=1e-2, atol=1e-2)


@NORMS
def test_sites_whose_singular_vectors_have_opposite_signs(norm: Any) -> None:
    """Both signs are right, and the mean of the vectors is zero: the averaged network would divide by it."""

    def body(place: Any) -> Any:
        net = normalised(norm)
        if place.index == 1:
            for name, buffer in net.named_buffers():
                assert name.endswith(("_u", "_v"))
                buffer.neg_()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for round in FederatedLoop(net, optimizer, kit=place.kit).rounds([torch.randn(4, 2, 3, 3)]):
            for x in round:
                net.train()(x).square().mean().backward()
                optimizer.step()
        return largest_singular_values(net), net(torch.ones(1, 2, 3, 3)).detach()

    with LocalFederation(sites=2, rounds=3, states=t.STATES) as federation:
        sites = list(federation.run(body).values())
    for values, _ in sites:
        assert values == pytest.approx([1, 1], rel=1e-2)
    torch.testing.assert_close(sites[0][1], sites[1][1], rtol=1e-2, atol=1e-2)


def adapted(private: bool, *, injected: bool = False) -> nn.Module:
    """A small Llama under an adapter; with `private`, it has a second adapter, which is not active."""
    peft, m = pytest.importorskip("peft"), pytest.importorskip("hf_models")
    model = m.decoder()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    own = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    torch.manual_seed(1)
    if injected:
        config.modules_to_save = own.modules_to_save = None
        model.add_adapter(config)
        if private:
            model.add_adapter(own, "private")
            model.set_adapter("default")
        return model
    model = peft.get_peft_model(model, config)
    if private:
        model.add_adapter("private", own)
    return model


@pytest.mark.parametrize("injected", [False, True], ids=["peft", "transformers"])
@pytest.mark.parametrize("exchange", ["auto", "trainable", "all"])
def test_private_adapter_that_is_not_active_stays_out_of_the_handshake(exchange: str, injected: bool) -> None:
    mine, others = adapted(True, injected=injected), adapted(False, injected=injected)
    assert any("private" in name for name, _ in mine.named_parameters())
    assert TorchState(mine, exchange).specs == TorchState(others, exchange).specs
    assert frozen_base(mine, exchange).keys() == frozen_base(others, exchange).keys()
    assert agreement(mine, framework="t", exchange=exchange) == agreement(others, framework="t", exchange=exchange)


def on_frozen_layers(layers: int, other: int) -> nn.Module:
    """A network whose frozen layers are the same at each call, but for that with the number `other`."""
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers))).requires_grad_(False)
    if other >= 0:
        nn.init.ones_(body[other].bias)
    return nn.Sequential(body, t.network())


@pytest.mark.parametrize(
    ("layers", "named"), [(3, r"these tensors differ: 0\.2\.bias"), (200, r"400 entries each; .*: 0\.2\.bias")]
)
def test_other_frozen_weights_are_named_and_not_told_as_hashes(layers: int, named: str) -> None:
    """Of a few tensors and of many, about which the server asks the sites."""

    def body(place: Any) -> None:
        net = on_frozen_layers(layers, other=2 if place.index else -1)
        optimizer = t.optimizer_for(net[1])
        next(FederatedLoop(net, optimizer, kit=place.kit, agree=False).rounds(t.loader()))

    with LocalFederation(sites=2, rounds=1, states=t.STATES) as federation:
        with pytest.raises(HandshakeError, match=rf"base\.fingerprint: {named}") as caught:
            federation.run(body)
    assert not re.search(r"[0-9a-f]{16}", str(caught.value))
    assert "load the same frozen weights at every site" in caught.value.fix
    assert "agree=False" not in caught.value.fix


class Loss(nn.Module):
    """A loss with a classifier of its own, beside the model that it holds too, and with a frozen teacher."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
        self.teacher = nn.BatchNorm1d(2).requires_grad_(False)


def test_what_is_trained_beside_the_model_travels_with_it() -> None:
    net = t.network()
    trainer = type("Trainer", (), {})()
    trainer.model, trainer.losses = net, {"nli": Loss(net)}
    optimizer = torch.optim.SGD([p for p in trainer.losses["nli"].parameters() if p.requires_grad], lr=0.1)
    beside = tensors_beside(net, modules_in(trainer), [optimizer])
    layers = ("0.weight", "0.bias", "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias")
    assert list(beside) == [f"losses.nli.head.{name}" for name in layers]
    assert list(exchanged_tensors(net, beside=beside)) == [*exchanged_tensors(net), *beside]
    patterns = ("0.*", "losses.nli.head.1.*")
    names = ["0.weight", "losses.nli.head.1.weight", "losses.nli.head.1.bias"]
    assert list(exchanged_tensors(net, patterns, beside=beside)) == names


def test_what_is_trained_beside_the_model_never_takes_the_name_of_a_part_of_it() -> None:
    net, head = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
    beside = tensors_beside(net, {"0": head}, [optimizer])
    assert list(exchanged_tensors(net, beside=beside)) == ["0.weight", "0.bias", "beside.0.weight", "beside.0.bias"]


def test_unknown_parameters_are_named_if_the_optimizer_has_names() -> None:
    net, head = t.network(), nn.Linear(2, 2, bias=False)
    try:
        optimizer = torch.optim.SGD([*net.named_parameters(), ("head.weight", head.weight)], lr=0.1)
    except TypeError:
        pytest.skip("optimizers of this release of torch take no names")
    with pytest.warns(UserWarning, match=r"There are 1, by name or shape: head\.weight\."):
        next(FederatedLoop(net, optimizer).rounds(t.loader()))


def test_what_is_trained_beside_the_model_and_kept_local_is_saved_for_restarts() -> None:
    net = t.network()
    head = nn.Linear(2, 3)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1)
    settings = SiteSettings.resolve(Options(keep_local=["head.*"]), {})
    live = LiveModel(net, [optimizer], settings, {"head": head})
    saved = {name: np.copy(array) for name, array in live.state_dict()["tensors"].items()}
    assert {"head.weight", "head.bias"} <= saved.keys()
    assert not any(name.startswith("head") for name in live.state.tensors)
    nn.init.zeros_(head.weight)
    live.load_state_dict({**live.state_dict(), "tensors": saved})
    assert np.array_equal(head.weight.detach().numpy(), saved["head.weight"])
    live.local.close()


def test_parameters_that_are_unfrozen_during_the_run_are_named() -> None:
    def body(place: Any) -> None:
        net = t.network()
        net[0].requires_grad_(False)
        optimizer = t.optimizer_for(net)
        for round in FederatedLoop(net, optimizer, kit=place.kit).rounds(t.loader()):
            for x, y in round:
                t.cross_entropy(net(x), y).backward()
                optimizer.step()
            if round.number == 1:
                net[0].requires_grad_(True)

    with LocalFederation(sites=1, rounds=3, states=t.STATES) as federation:
        with pytest.warns(UserWarning, match=r"were frozen .* site to site: 0\.weight\. .*exchange='all'"):
            federation.run(body)
