"""`load()`: the model of a run, as transformers and PEFT open it, predicts as the trained one does."""

from __future__ import annotations

import shutil
from pathlib import Path

import hf_models as m
import pytest
import torch
from torch import nn

from fl_adapters import open_run
from fl_adapters.hf import FederatedCallback
from fl_runtime.errors import ConfigError, StateMismatchError


def trained(federation, model: nn.Module):
    """Train a model alone, and return it with the run that it has left."""
    run = federation(rounds=1)
    m.trainer(FederatedCallback(kit=run.kit()), model=model).train()
    run.ended()
    return model.eval(), open_run(run.folder)


def logits(model: nn.Module) -> torch.Tensor:
    inputs = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=inputs).logits


def require_same(opened: nn.Module, trained: nn.Module) -> None:
    """The same bits of weights. Logits may differ by rounding: some processors' kernels depend on the alignment."""
    weights, expected = opened.state_dict(), trained.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    torch.testing.assert_close(logits(opened), logits(trained), rtol=0, atol=1e-6)


def test_a_model_of_transformers_opens_by_itself_and_in_a_model_of_ones_own(federation) -> None:
    model, run = trained(federation, m.classifier())
    require_same(run.load(), model)
    mine = m.classifier(seed=5)
    assert run.load(into=mine) is mine
    require_same(mine, model)
    with pytest.raises(ConfigError, match="no best model"):
        run.load(which="best")
    # a folder that came from others may hold weights that would be unpickled
    (run.folder / "model" / "model.safetensors").unlink()
    (run.folder / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hurt'\ntR.")
    with pytest.raises(ConfigError, match="does not open the files"):
        run.load()
    assert not (run.folder / "model" / "hurt").exists() and not Path("hurt").exists()


def test_an_adapter_opens_on_the_base_that_it_names_or_is_given(federation, tmp_path, capfd) -> None:
    m.classifier().save_pretrained(tmp_path / "base")
    base = type(m.classifier()).from_pretrained(tmp_path / "base")
    model, run = trained(federation, m.adapted(base))
    require_same(run.load(), model)
    assert f"the base of the adapter is '{tmp_path / 'base'}'" in capfd.readouterr().err
    require_same(run.load(into=m.classifier()), model)
    again = m.adapted(m.classifier(), seed=9)
    require_same(run.load(again), model)
    with pytest.raises(StateMismatchError, match="does not fit"):
        run.load(m.adapted(m.classifier(), r=3))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"does not open(.|\n)*load\(into=base\)"):
        run.load()


class Mine(type(m.classifier())):  # type: ignore[misc]
    """A class of the user's own, which transformers does not know."""


def test_a_class_of_ones_own_is_asked_for(federation) -> None:
    torch.manual_seed(0)
    model, run = trained(federation, Mine(m.classifier().config))
    with pytest.raises(ConfigError, match=r"load\(Mine\)"):
        run.load()
    opened = run.load(Mine)
    assert isinstance(opened, Mine)
    require_same(opened, model)
