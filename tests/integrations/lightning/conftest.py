"""Fixtures for Lightning; each federation runs within one process where it can."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
if not any(__import__("importlib.util").util.find_spec(name) for name in ("lightning", "pytorch_lightning")):
    pytest.skip("Lightning is not installed", allow_module_level=True)
os.environ["OMP_NUM_THREADS"] = "1"

import lightning_models
import torch

from fl_adapters.testing import LocalFederation


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test one thread, an empty working directory, no kit, and none of Lightning's hints."""
    threads, interrupt = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    with warnings.catch_warnings():
        for hint in (".*does not have many workers.*", ".*smaller than the logging interval.*", ".*GPU available.*"):
            warnings.filterwarnings("ignore", message=hint)
        yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, interrupt)  # Lightning leaves it ignored after a Ctrl-C


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., LocalFederation]]:
    """federation(sites=1, rounds=2, ...) starts a server whose sites take turns in this process."""
    running: list[LocalFederation] = []

    def make(sites: int = 1, **settings: Any) -> LocalFederation:
        folder = tmp_path / f"federation-{len(running)}"
        fields = {"rounds": 2, "states": lightning_models.STATES, **settings}
        running.append(LocalFederation(sites=sites, folder=folder, **fields))
        return running[-1].__enter__()

    yield make
    for one in running:
        one.__exit__(None, None, None)


@pytest.fixture(params=lightning_models.PACKAGES)
def pl(request: pytest.FixtureRequest) -> Any:
    """Both packages in turn: `lightning.pytorch` and `pytorch_lightning`."""
    return lightning_models.package(request.param)
