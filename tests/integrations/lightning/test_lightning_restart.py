"""`exact_restart` with Lightning: sites that die end with the bits of an undisturbed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning_models as m
import pytest
import torch
from killed_sites import WarmProcess, run_sites
from torch.utils.data import DataLoader

from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import Death, LocalFederation, Place, RestartCase, restart_cases
from fl_runtime.errors import ConfigError, SiteFailedError
from fl_runtime.types import Arrays

SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import lightning_models as m
from fl_adapters import site
m.Example(m.package()).train(site().index, epochs=100, keep_local=["net.1.*"])
"""


@pytest.mark.parametrize("case", restart_cases(), ids=lambda case: case.name)
def test_the_callback_restarts_exactly(case: RestartCase, pl: Any) -> None:
    case(m.Example(pl))


@pytest.mark.parametrize("strategy", ["scaffold", "ditto:lam=0.1"])
def test_with_what_a_strategy_keeps_at_the_site(strategy: str, pl: Any) -> None:
    restart_cases(strategy=strategy)[-1](m.Example(pl))


def test_killed_at_random_instants(tmp_path: Path) -> None:
    """SIGKILL, with AdamW, a falling learning rate, dropout, shuffling, and batch statistics that stay at the site."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(folder=str(Path(m.__file__).parent)))
    with WarmProcess("lightning.pytorch") as warm:
        wanted = run_sites(tmp_path / "undisturbed", script, warm=warm, rounds=5)
        assert run_sites(tmp_path / "disturbed", script, warm=warm, kills=4, seed=2, rounds=5) == wanted


def test_rounds_of_two_epochs_with_validation_workers_and_other_callbacks(tmp_path: Path) -> None:
    """A second run dies between its rounds and is scored like the first; early stopping counts the same."""

    class Augmented(torch.utils.data.Dataset):
        """A dataset that draws random numbers in its worker."""

        def __len__(self) -> int:
            return m.ROWS

        def __getitem__(self, index: int) -> Any:
            x, y = m.rows(0)[index]
            return x + 0.1 * torch.randn(4), y

    def train(place: Place) -> tuple[Arrays, int]:
        pl = m.package()
        patience = pl.callbacks.EarlyStopping("val_loss", patience=50)
        module = m.module(pl)
        data = DataLoader(Augmented(), batch_size=m.BATCH, shuffle=True, num_workers=1)
        callback = FederatedCallback(kit=place.kit)
        m.trainer(callback, pl=pl, callbacks=[patience], max_epochs=9).fit(module, data, m.validation())
        return m.weights(module), patience.wait_count

    def run(deaths: list[Death], folder: str) -> tuple[Any, Any, Any]:
        left = len(deaths)

        def site(place: Place) -> tuple[Arrays, int]:
            nonlocal left
            while True:
                try:
                    return train(place)
                except SiteFailedError:
                    assert left
                    left -= 1

        settings: dict[str, Any] = {"rounds": 3, "every": "2 epochs", "exact_restart": True, "min_sites": 1}
        with LocalFederation(
            sites=1, states=m.STATES, folder=tmp_path / folder, deaths=deaths, **settings
        ) as federation:
            weights, waited = federation.run(site)["site-1"]
            best = federation.result().best_round
        scored = sorted({event.round for event in federation.events if event.kind == "report"})
        return {n: a.tobytes() for n, a in weights.items()}, waited, (best, scored)

    torch.manual_seed(0)
    wanted = run([], "undisturbed")
    assert wanted[2][1] == [1, 2, 3]
    for death in (Death("site-1", "Submit", 2), Death("site-1", "Next", 3, heard=True), Death("site-1", "Score", 1)):
        torch.manual_seed(0)
        assert run([death], f"{death.method} {death.number}") == wanted


def test_what_cannot_be_exact_is_refused_before_round_1(tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        options = settings.pop("options", {})
        module = settings.pop("module", None) or m.module()
        data = settings.pop("data", None) or m.loader()
        with LocalFederation(sites=1, states=m.STATES, rounds=2, exact_restart=True, **settings) as federation:
            outcome = federation.outcomes(
                {
                    "site-1": lambda place: m.trainer(FederatedCallback(kit=place.kit), max_epochs=9).fit(
                        module, data, **options
                    )
                },
                check=False,
            )["site-1"]
            assert not [event for event in federation.events if event.kind == "round_started"]
        assert isinstance(outcome.error, ConfigError)
        return str(outcome.error)

    assert "a budget in steps" in refused(every=2)
    assert "persistent_workers=False" in refused(data=m.loader(num_workers=1, persistent_workers=True))

    class Plateau(type(m.module())):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "train_loss"}}

    assert "follows a metric" in refused(module=Plateau())
    alone = m.trainer(max_epochs=1)
    alone.fit(m.module(), m.loader())
    alone.save_checkpoint(tmp_path / "last.ckpt")
    assert "without ckpt_path" in refused(options={"ckpt_path": str(tmp_path / "last.ckpt")})
