"""The XGBoost example on real data with five uneven sites: its demo in fewer rounds."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xgboost")
pytest.importorskip("cryptography")
if sys.platform != "linux":
    pytest.skip("loopback addresses beside 127.0.0.1 are Linux's", allow_module_level=True)

from fl_adapters.testing import LocalFederation
from fl_adapters.xgboost import train

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "xgboost" / "adult"
ROUNDS = 20


@pytest.fixture(scope="module")
def demo() -> Iterator[Any]:
    """The demo's module, imported from the folder of its scripts."""
    before, names = list(sys.path), ("data", "train", "demo")
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("demo")
    finally:
        sys.path[:] = before
        for name in names:
            sys.modules.pop(name, None)


@pytest.mark.slow
def test_what_the_demo_shows(demo: Any) -> None:
    parts = [demo.load(None, f"{number}/{demo.SITES}") for number in range(1, demo.SITES + 1)]
    everything, test = demo.load(None, "1/1").train, demo.matrix(parts[0].test)
    close = 0.001 if len(everything.y) > 10_000 else 0.005  # breast cancer: a few of 190 held-out rows decide
    boosters = {}
    for mode in demo.MODES:
        with LocalFederation(sites=demo.SITES, sockets=True) as federation:
            boosters[mode] = federation.run(
                lambda place, mode=mode: train(
                    demo.PARAMS, demo.matrix(parts[place.index].train), ROUNDS, mode=mode, kit=place.kit
                )
            )["site-1"]
            federation.result()
    scores = {mode: demo.exact_auc(booster, test) for mode, booster in boosters.items()}
    alone = [demo.alone("alone", part.train, test, ROUNDS).auc for part in parts]
    assert min(scores["bagging"], scores["cyclic"]) > max(alone)
    central = demo.alone("central", everything, test, ROUNDS)
    assert abs(scores["histogram"] - central.auc) < close
    _, same = demo.central_on_shared_bins(parts, everything, test, ROUNDS, boosters["histogram"])
    assert same == ROUNDS
