"""Fixtures for MONAI and Ignite; each federation runs within one process where it can."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("monai")
pytest.importorskip("ignite")
os.environ["OMP_NUM_THREADS"] = "1"

import monai_models
import torch

from fl_adapters.testing import LocalFederation


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test one thread, an empty working directory, no kit, and no warnings of MONAI's own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FL_ADAPTERS_KIT", raising=False)
    with warnings.catch_warnings():
        for module in ("monai", "torch", "ignite"):
            warnings.filterwarnings("ignore", module=rf"{module}\.")
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Callable[..., LocalFederation]]:
    """federation(sites=1, rounds=2, ...) starts a server whose sites take turns in this process."""
    running: list[LocalFederation] = []

    def make(sites: int = 1, **settings: Any) -> LocalFederation:
        folder = tmp_path / f"federation-{len(running)}"
        fields = {"rounds": 2, "states": monai_models.STATES, **settings}
        running.append(LocalFederation(sites=sites, folder=folder, **fields))
        return running[-1].__enter__()

    yield make
    for one in running:
        one.__exit__(None, None, None)
