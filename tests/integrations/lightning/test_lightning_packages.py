"""Lightning comes in two packages with separate class hierarchies; either of them is enough."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning_models as m
import pytest

from fl_adapters.lightning import FederatedCallback
from fl_adapters.lightning.framework import callback_classes

ALONE = """
import sys
sys.modules[{other!r}] = None  # as if it were not installed
sys.path.insert(0, {folder!r})
import lightning_models as m
from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import LocalFederation

pl = m.package({package!r})
with LocalFederation(sites=1, rounds=2, states=m.STATES) as run:
    trainer = m.trainer(FederatedCallback(kit=run.places[0].kit), pl=pl)
    trainer.fit(m.module(pl), m.loader(), m.validation())
    print("steps", trainer.global_step, "rounds", len(run.result().rounds), {other!r}.partition(".")[0] in sys.modules)
"""


def test_a_callback_of_both() -> None:
    assert {base.__module__.partition(".")[0] for base in callback_classes()} == {
        name.partition(".")[0] for name in m.PACKAGES
    }
    assert all(issubclass(FederatedCallback, m.package(name).Callback) for name in m.PACKAGES)


def test_trainer_takes_the_callback_without_a_list(pl) -> None:
    trainer = pl.Trainer(callbacks=FederatedCallback(), accelerator="cpu", logger=False, enable_checkpointing=False)
    assert any(isinstance(callback, FederatedCallback) for callback in trainer.callbacks)


@pytest.mark.parametrize("package", m.PACKAGES)
def test_one_package_is_enough(package, tmp_path) -> None:
    other = next((name for name in ("lightning", "pytorch_lightning") if not package.startswith(name)), None)
    code = ALONE.format(other=other, package=package, folder=str(Path(m.__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "steps 6 rounds 2" in done.stdout


def test_neither_is_an_error_that_says_what_to_install(monkeypatch: Any) -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'fl-adapters\[lightning\]'"):
        callback_classes()
