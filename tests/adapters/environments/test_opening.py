"""`load()` of a run whose sites train by a loop of their own: arrays, and the tensors of PyTorch modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fl_adapters import connect, open_run
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.errors import ConfigError, StateMismatchError
from fl_runtime.store.tensorfile import write_tensors

torch = pytest.importorskip("torch")


def add_one(place: Place) -> dict[str, np.ndarray]:
    with connect(kit=place.kit) as site:
        for task in site.tasks(initial={"w": np.arange(3, dtype=np.float32)}):
            task.submit({"w": task.arrays["w"] + 1}, num_examples=1)
    return dict(site.arrays)


def test_arrays_of_a_loop_are_arrays() -> None:
    with LocalFederation(sites=2, rounds=2) as federation:
        kept = federation.run(add_one)["site-1"]
        federation.result()
        assert federation.load().keys() == {"w"}
        assert type(federation.load()["w"]) is np.ndarray
        np.testing.assert_array_equal(federation.load()["w"], kept["w"])
        again = open_run(federation.folder)
        np.testing.assert_array_equal(again.load()["w"], kept["w"])
        with pytest.raises(ConfigError, match="cannot be loaded into a dict"):
            again.load(into={})
        with pytest.raises(ConfigError, match="no best model"):
            again.load(which="best")


def net() -> torch.nn.Module:
    tied = torch.nn.Linear(2, 2, bias=False)
    return torch.nn.Sequential(tied, torch.nn.BatchNorm1d(2), tied)


def left_by(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    write_tensors(folder / "model" / "model.safetensors", arrays)
    (folder / "events.jsonl").touch()
    return folder


def test_tensors_that_a_server_keeps_go_into_a_module(tmp_path: Path) -> None:
    """Tied weights travel once, and what does not travel must be asked for."""
    source = net()
    arrays = {name: tensor.detach().numpy() for name, tensor in source.state_dict().items() if name != "2.weight"}
    run = open_run(left_by(tmp_path / "whole", arrays))
    target = net()
    assert run.load(torch.compile(target, backend="eager")) is not None
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in target.state_dict().items())

    part = {"0.weight": arrays["0.weight"] + 1}
    run, before = open_run(left_by(tmp_path / "part", part)), net()
    with pytest.raises(StateMismatchError, match=r"has no 1\.weight(.|\n)*partial=True"):
        run.load(before)
    assert not np.array_equal(before.state_dict()["0.weight"], part["0.weight"])
    run.load(before, partial=True)
    np.testing.assert_array_equal(before.state_dict()["2.weight"], part["0.weight"])
    for other in (torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False)), torch.nn.Linear(2, 2)):
        with pytest.raises(StateMismatchError, match="does not fit"):
            run.load(other, partial=True)
    with pytest.raises(ConfigError, match=r"load\(into=BatchNorm1d\(\.\.\.\)\)"):
        run.load(torch.nn.BatchNorm1d)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        open_run(tmp_path / "elsewhere")
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(ConfigError, match=r"there is no final model(.|\n)*job download"):
        open_run(tmp_path).load()
