"""What a module, its datamodule and its data mean is compared between the sites before the first step."""

from __future__ import annotations

from typing import Any

import lightning_models as m
import pytest
from torch.utils.data import DataLoader

from fl_adapters.lightning import FederatedCallback
from fl_adapters.testing import LocalFederation
from fl_runtime.errors import HandshakeError


class Classes:
    """Data with the names of its classes, as torchvision has them."""

    def __init__(self, *classes: str) -> None:
        self.classes, self.rows = [*classes], m.rows(0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def refused(package: str, train: Any) -> str:
    """Train two sites with train(place, module, trainer); return what both are told."""
    pl, losses = m.package(package), []

    def site(place: Any) -> None:
        module = m.module(pl)
        losses.append(module.losses)
        train(place, module, m.trainer(FederatedCallback(kit=place.kit), pl=pl))

    with LocalFederation(sites=2, rounds=1, states=m.STATES) as federation:
        outcomes = federation.outcomes({place.name: site for place in federation.places}, check=False)
    errors = [outcome.error for outcome in outcomes.values()]
    assert all(isinstance(error, HandshakeError) for error in errors), errors
    assert losses == [[], []]
    return str(errors[0])


@pytest.mark.parametrize("package", m.PACKAGES)
def test_classes_of_the_data_are_compared(package: str) -> None:
    def train(place: Any, module: Any, trainer: Any) -> None:
        classes = ("cat", "dog") if place.index else ("dog", "cat")
        trainer.fit(module, DataLoader(Classes(*classes), batch_size=8))

    assert "classes of the training data: 0: 'dog' != 'cat', 1: 'cat' != 'dog'" in refused(package, train)


@pytest.mark.parametrize("package", m.PACKAGES)
def test_names_in_hyperparameters_are_compared(package: str) -> None:
    def train(place: Any, module: Any, trainer: Any) -> None:
        module.save_hyperparameters({"labels": {"benign": place.index, "malignant": 1 - place.index}})
        trainer.fit(module, m.loader())

    assert "labels of the module: 0: 'benign' != 'malignant'" in refused(package, train)


@pytest.mark.parametrize("package", m.PACKAGES)
def test_what_a_datamodule_holds_is_compared(package: str) -> None:
    def train(place: Any, module: Any, trainer: Any) -> None:
        class Data(m.package(package).LightningDataModule):  # type: ignore[misc]
            num_classes = 2 + place.index

            def train_dataloader(self) -> Any:
                return m.loader()

        trainer.fit(module, datamodule=Data())

    assert "num_classes of the datamodule: '2' != '3'" in refused(package, train)
