"""The MONAI example: its volumes are distributed fairly, and both bundles train on them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("nibabel")
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "monai" / "spleen_bundle"


@pytest.fixture(scope="module")
def data() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("data_of_spleen_bundle", FOLDER / "data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def prepared(data: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("volumes")
    return folder, data.prepare(folder, "made")


def volumes(folder: Path) -> list[str]:
    """Return the content of each image of a folder, in the order of their names."""
    assert [p.name for p in sorted((folder / "labelsTr").iterdir())] == [
        p.name for p in sorted((folder / "imagesTr").iterdir())
    ]
    return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((folder / "imagesTr").iterdir())]


def test_sites_share_no_volume_and_none_sees_what_is_held_out(prepared, data) -> None:
    folder, sizes = prepared
    sites = [volumes(folder / f"site-{n}") for n in range(1, 5)]
    held_out = volumes(folder / "held-out")
    everything = [volume for site in sites for volume in site]
    assert len(set(everything)) == len(everything) and not set(everything) & set(held_out)
    assert len(held_out) == sizes["held-out"] >= 30
    train = {volume for site in sites for volume in site[: -data.VALIDATION]}
    central = volumes(folder / "central")
    assert set(central[: -data.VALIDATION]) == train and not set(central[-data.VALIDATION :]) & train
    counts = sorted(sizes[f"site-{n}"] for n in range(1, 5))
    assert counts[0] >= data.FEWEST and counts[-1] > 1.5 * counts[0]


def test_settings_for_the_hippocampus_fit_the_bundle(shared_data: Path) -> None:
    config = json.loads((shared_data / "monai_bundles/spleen_ct_segmentation/configs/train.json").read_text())
    for name in json.loads((FOLDER / "hippocampus.json").read_text()):
        place = config
        for key in name.split("#")[:-1]:
            place = place[int(key)] if isinstance(place, list) else place[key]
        assert isinstance(place, list | dict), name
