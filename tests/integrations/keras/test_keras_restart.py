"""`exact_restart` with `fit`: sites that die end with the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import keras_models as m
import numpy as np
import pytest
from killed_sites import WarmProcess, run_sites

from fl_adapters.keras import FederatedCallback
from fl_adapters.testing import Death, LocalFederation, Place, RestartCase, Trained, restart_cases
from fl_runtime.errors import ConfigError, SiteFailedError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras itself

BACKEND = keras.backend.backend()
ALL = restart_cases()
CASES = ALL if BACKEND != "tensorflow" else (ALL[0], *ALL[-2:])  # which takes its time to trace each program


class Example(m.Example):
    """A training job with shuffling, dropout, Adam, and a learning rate that falls with the epochs."""

    def train(self, site: int, *, epochs: int, different: bool = False, fail_at: int = 0, **arguments: Any) -> Trained:
        model = m.compiled(m.classifier(seed=site))
        counter = m.Counter(fail_at)
        falling = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9**epoch)
        m.fit(model, m.rows(site), FederatedCallback(**arguments), counter, falling, epochs=epochs, shuffle=True)
        assert model._initial_epoch is None
        return Trained(m.weights(model), counter.batches)


SCRIPT = """
import sys
sys.path[:0] = {folders!r}
import test_keras_restart
from fl_adapters import site
test_keras_restart.Example().train(site().index, epochs=100, keep_local=["batch_normalization/*"])
"""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_callback_restarts_exactly(case: RestartCase) -> None:
    case(Example())


@pytest.mark.skipif(BACKEND == "tensorflow", reason="takes long, and is the same code")
@pytest.mark.parametrize("strategy", ["scaffold", "ditto:lam=0.1"])
def test_with_what_a_strategy_keeps_at_the_site(strategy: str) -> None:
    restart_cases(strategy=strategy)[-1](Example())


@pytest.mark.skipif(BACKEND != "torch", reason="the others do not outlive a fork: each start would take long")
@pytest.mark.slow
def test_killed_at_random_instants(tmp_path: Path) -> None:
    """SIGKILL, in processes that nobody has seeded."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folders=[str(Path(path).parent) for path in (m.__file__, __file__)]))
    with WarmProcess("keras", "pytest", KERAS_BACKEND=BACKEND) as process:
        wanted = run_sites(tmp_path / "undisturbed", script, warm=process, rounds=6)
        assert run_sites(tmp_path / "disturbed", script, warm=process, kills=2, seed=3, rounds=6) == wanted


def test_rounds_of_two_epochs_with_validation(tmp_path: Path) -> None:
    """All rounds are scored, so the best round is that of an undisturbed run."""

    def run(deaths: list[Death], folder: str) -> tuple[Any, Any]:
        left = len(deaths)

        def train(place: Place) -> Any:
            model = m.compiled(m.classifier(), keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 30)))
            callback = FederatedCallback(kit=place.kit)
            history = m.fit(
                model, m.rows(0), callback, epochs=9, initial_epoch=1, shuffle="batch", validation_data=m.rows(9)
            )
            return {name: array.tobytes() for name, array in m.weights(model).items()}, max(history.epoch, default=6)

        def site(place: Place) -> Any:
            nonlocal left
            while True:
                try:
                    return train(place)
                except SiteFailedError:
                    assert left
                    left -= 1

        settings: dict[str, Any] = {"rounds": 3, "every": "2 epochs", "exact_restart": True}
        with LocalFederation(
            sites=1, states=m.STATES, folder=tmp_path / folder, deaths=deaths, **settings
        ) as federation:
            left_behind = federation.run(site)["site-1"]
            best = federation.result().best_round
        return left_behind, (best, sorted({event.round for event in federation.events if event.kind == "report"}))

    wanted = run([], "undisturbed")
    assert wanted[1][1] == [1, 2, 3]
    for death in (Death("site-1", "Submit", 3), Death("site-1", "Next", 4, heard=True), Death("site-1", "Score", 3)):
        assert run([death], f"{death.method} {death.number}") == wanted


class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return m.BATCHES

    def __getitem__(self, index: int) -> Any:
        return tuple(part[index * m.BATCH : (index + 1) * m.BATCH] for part in m.rows(0))


def refused(*callbacks: Any, data: Any = None, every: Any = None, **options: Any) -> str:
    def train(place: Place) -> None:
        x = {"x": data} if data is not None else dict(zip("xy", m.rows(0), strict=True))
        m.compiled(m.classifier()).fit(
            **x, callbacks=[FederatedCallback(kit=place.kit), *callbacks], epochs=9, verbose=0, **options
        )

    with LocalFederation(sites=1, states=m.STATES, rounds=2, exact_restart=True, every=every) as federation:
        outcome = federation.outcomes({"site-1": train}, check=False)["site-1"]
        assert not [event for event in federation.events if event.kind == "round_started"]
    assert isinstance(outcome.error, ConfigError), outcome.error
    return str(outcome.error)


def test_what_cannot_be_exact_is_refused_before_round_1() -> None:
    assert "a budget in steps" in refused(every=2)
    assert "continues with the data of the one before" in refused(steps_per_epoch=2)
    assert "the order of this data (PyDataset)" in refused(data=Batches())
    assert "ReduceLROnPlateau has a state of its own" in refused(keras.callbacks.ReduceLROnPlateau())
    assert "fit is restored without it" in refused(keras.callbacks.BackupAndRestore("backup"))


@pytest.mark.skipif(BACKEND != "torch", reason="DataLoaders are for PyTorch")
def test_a_dataloader(tmp_path: Path) -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    class Loaded(m.Example):
        def train(self, site: int, *, fail_at: int = 0, **arguments: Any) -> Trained:
            model = m.compiled(m.classifier(seed=site))
            rows = TensorDataset(*map(torch.from_numpy, m.rows(site)))
            loader = DataLoader(rows, batch_size=m.BATCH, shuffle=True, generator=torch.Generator())
            callbacks = [FederatedCallback(kit=arguments["kit"], keep_local=arguments["keep_local"])]
            model.fit(loader, callbacks=[*callbacks, m.Counter(fail_at)], epochs=arguments["epochs"], verbose=0)
            return Trained({name: np.array(array) for name, array in m.weights(model).items()}, 0)

    restart_cases()[-1](Loaded())
    loader = DataLoader(TensorDataset(*map(torch.from_numpy, m.rows(0))), num_workers=1, persistent_workers=True)
    assert "persistent data loader workers" in refused(data=loader)
