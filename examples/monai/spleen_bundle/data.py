"""The example's volumes: what each site gets of them, as the folders that the bundle reads.

Hippocampus MRI of the Medical Segmentation Decathlon where it is found, with its mask made two-class; else volumes
made here: noise with a bright blob. The volumes come from scanners of very different intensities. Each scanner's
are dealt out to the sites by a Dirichlet draw, so the sites differ in size and in what they see.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

SITES = 4
HELD_OUT = 40  # volumes that nobody trains on
VALIDATION = 9  # the bundle keeps the last nine volumes of a folder for validation
FEWEST = 4  # volumes that a site trains on
ALPHA = 0.5  # of the Dirichlet draw: smaller is more uneven
SEED = 2021  # of the division, not of the training
MADE = 160  # volumes, where no data is found
HERE = Path(__file__).resolve()
CENTRAL, TEST = "central", "held-out"


@dataclass(frozen=True)
class Volume:
    """A volume and its mask. scanner: the magnitude of its intensities."""

    image: Path
    mask: Path
    scanner: int


def prepare(folder: Path, source: str | None = None) -> dict[str, int]:
    """Write `folder`/<site-1 ... site-4, central, held-out>; how many volumes each trains on (or holds).

    source: the folder of the hippocampus data, "made", or None: that data where it is found, else made volumes.
    """
    volumes = _found(source) or _made(folder / "made")
    draw = np.random.RandomState(SEED)  # the same in every NumPy
    order = draw.permutation(len(volumes))
    test, rest = order[:HELD_OUT], order[HELD_OUT:]
    parts = _divided([volumes[i].scanner for i in rest], draw)
    sites = {f"site-{n}": [int(rest[i]) for i in part] for n, part in enumerate(parts, start=1)}
    train = {name: part[:-VALIDATION] for name, part in sites.items()}
    everything = [i for part in train.values() for i in part] + sites["site-1"][-VALIDATION:]
    for name, part in {**sites, CENTRAL: everything, TEST: test}.items():
        _write(folder / name, [volumes[i] for i in part])
    sizes = {name: len(part) for name, part in train.items()}
    return {**sizes, CENTRAL: sum(sizes.values()), TEST: len(test)}


def bundle(source: str | None = None) -> Path:
    """The spleen bundle's folder: `source`, else where the data sets are."""
    folder = Path(source) if source else _data() / "monai_bundles" / "spleen_ct_segmentation"
    return folder if folder.is_dir() else HERE.parent / "small_bundle"


def _data() -> Path:
    return Path(os.environ.get("FL_ADAPTERS_DATA", HERE.parents[4] / "shared" / "data"))  # or beside the checkout


def _divided(scanners: list[int], draw: np.random.RandomState) -> list[list[int]]:
    """Numbers of the volumes of each site: every scanner's are cut at the shares of a Dirichlet draw. A site that got
    too few for the bundle takes some from the largest."""
    parts: list[list[int]] = [[] for _ in range(SITES)]
    for scanner in sorted(set(scanners)):
        mine = [i for i, other in enumerate(scanners) if other == scanner]
        cuts = np.cumsum(draw.dirichlet([ALPHA] * SITES))[:-1] * len(mine)
        for part, chunk in zip(parts, np.split(np.array(mine), cuts.astype(int)), strict=True):
            part.extend(int(i) for i in chunk)
    for part in parts:
        while len(part) < VALIDATION + FEWEST:
            part.append(max(parts, key=len).pop())
        draw.shuffle(part)
    return parts


def _found(source: str | None) -> list[Volume]:
    folder = Path(source) if source and source != "made" else _data() / "hippocampus"
    if source == "made" or (source is None and not folder.is_dir()):
        return []
    items = json.loads((folder / "dataset.json").read_text("utf-8"))["training"]
    pairs = [(folder / item["image"], folder / item["label"]) for item in items]
    return [Volume(image, mask, _magnitude(image)) for image, mask in pairs]


def _made(folder: Path) -> list[Volume]:
    """Volumes of 24^3 with a bright ellipsoid each, of three scanners."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.RandomState(SEED)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
    volumes = []
    for i in range(MADE):
        centre, radius, scanner = draw.uniform(8, 16, (3, 1, 1, 1)), draw.uniform(3, 6, (3, 1, 1, 1)), draw.randint(3)
        mask = (((grid - centre) / radius) ** 2).sum(0) < 1
        image = (1 + mask * draw.uniform(0.5, 1.5) + draw.normal(0, 0.5, mask.shape)) * 100 * 30**scanner
        paths = folder / f"image_{i:03d}.nii.gz", folder / f"mask_{i:03d}.nii.gz"
        for array, path in zip((image.astype(np.float32), mask.astype(np.uint8)), paths, strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 1.5, 1])), path)
        volumes.append(Volume(*paths, scanner))
    return volumes


def _magnitude(image: Path) -> int:
    return round(np.log10(nibabel.load(image).get_fdata().mean()))


def _write(folder: Path, volumes: list[Volume]) -> None:
    """As the bundle wants them: imagesTr and labelsTr, whose names sort alike."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, volume in enumerate(volumes):
        name = f"volume_{number:03d}.nii.gz"
        shutil.copyfile(volume.image, folder / "imagesTr" / name)
        mask = nibabel.load(volume.mask)
        two_class = (np.asarray(mask.dataobj) > 0).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(two_class, mask.affine), folder / "labelsTr" / name)
