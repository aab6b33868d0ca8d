"""What virtual sites refuse, with the site and the round in the error where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from virtual_sites import NOISY, script, simulated

from fl_adapters import Job, Simulation
from fl_runtime.errors import ConfigError, FederationError, HandshakeError, StateMismatchError, UpdateRefusedError

SUBMITTING = """
import numpy as np

def initial():
    return {"w": np.zeros(4, np.float32)}

def train(task, site):
    %s
"""


@pytest.mark.parametrize(
    ("line", "kind", "said"),
    [
        ("pass", ConfigError, "returned without a submitted update in round 1"),
        (
            "task.submit({'w': np.zeros(5, np.float32)}, num_examples=1)",
            StateMismatchError,
            r"float32\[4\] != float32\[5\]",
        ),
        (
            "task.submit({'w': task.arrays['w'] + np.nan}, num_examples=1)",
            UpdateRefusedError,
            "NaN or infinite values in w",
        ),
        ("task.submit(task.arrays, num_examples=0)", UpdateRefusedError, "num_examples is 0"),
        ("task.submit(task.arrays, num_examples=1, extras=task.arrays)", ConfigError, "cannot send extras"),
    ],
)
def test_a_bad_result_is_refused_with_site_and_round(
    here: Path, line: str, kind: type[FederationError], said: str
) -> None:
    with pytest.raises(kind, match=said) as raised:
        simulated(script(SUBMITTING % line), sites=3, workers=1)
    assert "site-1, round 1" in raised.value.where


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"app": "train.py"}, "does not name one"),
        ({"app": "train.py:nothing"}, "has no function nothing"),
        ({"app": "absent.py:train"}, "there is no script absent.py"),
        ({"app": "absent.module:train"}, "cannot be imported: ModuleNotFoundError"),
        ({"engine": "threads"}, "no engine 'threads'"),
        ({"workers": 0}, "0 workers"),
        ({"rounds": None}, "does not say how many rounds"),
        ({"cross_site": True}, "cross_site needs sites with"),
        ({"secure_sum": True}, "secure_sum needs sites with"),
        ({"keep_local": ["b"]}, "keep_local needs sites with"),
        ({"strategy": "fedbuff"}, "fedbuff needs sites with"),
        ({"filters": [{"name": "Quantize", "to": "int8"}]}, "the filter Quantize at site_out needs sites"),
        ({"function": print}, "there are no initial weights"),
        ({"function": print, "initial": {"w": [0.0, 1.0]}}, "'w' is a list, not an array"),
        ({"function": print, "initial": {"w": np.zeros(2)}, "args": ("a",)}, "take no command-line arguments"),
    ],
)
def test_what_cannot_work_is_refused(here: Path, options: dict[str, Any], said: str) -> None:
    script(NOISY)
    with pytest.raises(FederationError, match=said):
        simulated(**{"app": "train.py:train", "sites": 3} | options)
    assert not Path("runs").exists() or not list(Path("runs").iterdir())  # the name stays free


def test_a_strategy_that_needs_a_capability_is_refused(here: Path) -> None:
    with pytest.raises(HandshakeError, match="scaffold needs the capability"):
        simulated(script(NOISY), sites=3, strategy="scaffold")


def test_what_is_for_virtual_sites_alone_is_refused_without_an_engine(here: Path) -> None:
    with pytest.raises(ConfigError, match="workers is for virtual sites"):
        Job(app=script(NOISY), rounds=1).run(Simulation(sites=2, workers=2))


def test_without_ray_the_extra_is_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)  # as if it were not installed
    with pytest.raises(ConfigError, match="needs Ray") as raised:
        simulated(script(NOISY), engine="ray")
    assert "fl-adapters[ray]" in raised.value.fix
