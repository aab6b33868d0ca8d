"""What a bundle's metadata says of channels is compared between the sites before the first iteration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import monai_bundles
import pytest

from fl_adapters.monai.bundle import workflow_of
from fl_runtime.errors import FederationError, HandshakeError

TARGET = "fl_adapters.monai.FederatedHandler"


def write(folder: Path, classes: list[str], *, has_handler: bool) -> Path:
    """Write a bundle whose network tells these classes apart."""
    made = monai_bundles.config()
    if has_handler:
        made["train"]["handlers"].append({"_target_": TARGET, "kit": "@kit"})
        made["kit"] = None
    bundle = Path(monai_bundles.write(folder, made))
    channels = {str(i): name for i, name in enumerate(classes)}
    formats = {"inputs": {"image": {"channel_def": {"0": "CT"}}}, "outputs": {"pred": {"channel_def": channels}}}
    (bundle / "configs" / "metadata.json").write_text(json.dumps({"version": "0.1.0", "network_data_format": formats}))
    return bundle


def run(bundle: Path, kit: str, *, has_handler: bool, **override: Any) -> None:
    kit_id = "kit" if has_handler else "federated_handler#kit"
    workflow = workflow_of(bundle, {kit_id: kit, **override})
    workflow.initialize()
    workflow.run()


def told(error: BaseException | None) -> str:
    """The error of the federation, which MONAI may have wrapped."""
    while error is not None and not isinstance(error, FederationError):
        error = error.__cause__
    assert isinstance(error, HandshakeError)
    return error.what


@pytest.mark.parametrize("has_handler", [False, True])
def test_swapped_channels_are_refused(federation: Any, tmp_path: Path, *, has_handler: bool) -> None:
    running = federation(sites=2, rounds=1)
    orders = [["background", "liver", "spleen"], ["background", "spleen", "liver"]]
    bundles = [write(tmp_path / f"bundle-{i}", order, has_handler=has_handler) for i, order in enumerate(orders)]

    def site(place: Any) -> None:
        run(bundles[place.index], place.kit, has_handler=has_handler)

    outcomes = running.outcomes({place.name: site for place in running.places}, check=False)
    for outcome in outcomes.values():
        assert "channels of the output 'pred': 1: 'liver' != 'spleen', 2: 'spleen' != 'liver'" in told(outcome.error)
    assert not [event for event in running.events if event.kind == "round_started"]


def test_other_channels_may_be_meant(federation: Any, tmp_path: Path) -> None:
    running = federation(sites=2, rounds=1)
    orders = [["background", "liver", "spleen"], ["background", "left", "right"]]
    bundles = [write(tmp_path / f"bundle-{i}", order, has_handler=False) for i, order in enumerate(orders)]

    def site(place: Any) -> None:
        override: dict[str, Any] = {"federated_handler#agree": False} if place.index else {}
        run(bundles[place.index], place.kit, has_handler=False, epochs=1, **override)

    running.run(site)
    assert len(running.result().rounds) == 1
