"""GPUs of a simulation's sites are counted within CUDA_VISIBLE_DEVICES, and must exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from fl_adapters import ConfigError, Job, Simulation
from fl_adapters.environments.processes.gpus import count_gpus, visible_devices


def unasked() -> int | None:
    raise AssertionError("the variable says which GPUs there are")


@pytest.mark.parametrize(
    ("gpus", "visible", "devices"),
    [
        (["0", "1"], "2,3", ("2", "3")),
        ([1, 0, 1], " 5, 7 ", ("7", "5", "7")),
        (["GPU-8932f937", 0], "MIG-1,GPU-8932f937", ("GPU-8932f937", "MIG-1")),
        ([0], "4,-1,5", ("4",)),
        ([], "2,3", ()),
    ],
)
def test_numbers_count_within_the_visible_devices(gpus: list[str | int], visible: str, devices: tuple[str]) -> None:
    assert visible_devices(gpus, {"CUDA_VISIBLE_DEVICES": visible}, unasked) == devices


@pytest.mark.parametrize(
    ("gpus", "visible", "said"),
    [
        (["2"], "2,3", "there is no GPU '2'.*CUDA_VISIBLE_DEVICES=2,3.*from 0 to 1"),
        ([1], "3", "there is no GPU '1'.*give 0; they count within CUDA_VISIBLE_DEVICES"),
        ([0], "", "there is no GPU '0'.*leave --gpus out"),
        ([0], "-1", "leave --gpus out"),
        (["GPU-1"], "GPU-2", "there is no GPU 'GPU-1'"),
    ],
)
def test_devices_that_are_not_visible_are_refused(gpus: list[str | int], visible: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        visible_devices(gpus, {"CUDA_VISIBLE_DEVICES": visible}, unasked)


@pytest.mark.parametrize(
    ("gpus", "number", "said"),
    [
        (["0", "4"], 2, "there is no GPU '4'.*from 0 to 1"),
        (["0"], 0, "there is no GPU '0'.*leave --gpus out"),
        (["first"], None, "there is no GPU 'first'.*give numbers"),
    ],
)
def test_a_gpu_that_the_machine_does_not_have_is_refused(gpus: list[str], number: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        visible_devices(gpus, {}, lambda: number)


@pytest.mark.parametrize("number", [2, None])
def test_gpus_of_the_machine_are_given_as_they_are(number: int | None) -> None:
    assert visible_devices([0, "1", "GPU-8932f937"], {}, lambda: number) == ("0", "1", "GPU-8932f937")


def test_counting_needs_no_framework() -> None:
    assert count_gpus() is None or count_gpus() >= 0  # type: ignore[operator]


def test_nothing_is_made_for_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (tmp_path / "train.py").write_text("")
    simulation = Simulation(sites=2, gpus=[0, 1], folder=tmp_path / "runs", quiet=True)
    with pytest.raises(ConfigError, match="there is no GPU '1'"):
        simulation.run(Job(app=str(tmp_path / "train.py"), rounds=1))
    assert not (tmp_path / "runs").exists()
