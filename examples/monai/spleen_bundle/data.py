"""Data of the example: volumes and masks, written into one folder per site as the bundle reads them.

The volumes are hippocampus MRI of the Medical Segmentation Decathlon with a two-class mask if they are found, else
generated: noise with a bright blob. They are sorted into four classes by the size of the segmented object. Each class
is divided among the sites by a Dirichlet distribution, so that sites differ in size and in what they see.
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
HELD_OUT = 40  # volumes that no site trains on
VALIDATION = 9  # the bundle keeps the last nine volumes of a folder for validation
FEWEST = 4  # smallest number of volumes that a site trains on
ALPHA = 0.5  # of the Dirichlet distribution: smaller is more uneven
SEED = 2025  # divides the data; the training has a seed of its own
MADE = 160  # number of generated volumes, if no data is found
HERE = Path(__file__).resolve()
CENTRAL, TEST = "central", "held-out"


@dataclass(frozen=True)
class Volume:
    """A volume and its mask, as files, and the number of voxels in the mask."""

    image: Path
    mask: Path
    voxels: int


def prepare(folder: Path, source: str | None = None) -> dict[str, int]:
    """Write the folders of all sites, and those of all data and of the held-out volumes.

    Args:
        folder: Folder for `site-1` to `site-4`, `central` and `held-out`.
        source: Folder of the hippocampus data, or "made" for generated volumes. None takes what is found.

    Returns:
        Number of training volumes of each site and of `central`, and of volumes in `held-out`.
    """
    volumes = _found(source) or _made(folder / "made")
    draw = np.random.RandomState(SEED)  # RandomState: the same in every NumPy
    order = draw.permutation(len(volumes))
    test, rest = order[:HELD_OUT], order[HELD_OUT:]
    sizes = np.array([volumes[i].voxels for i in rest])
    parts = _divided(np.searchsorted(np.quantile(sizes, [0.25, 0.5, 0.75]), sizes), draw)
    sites = {f"site-{n}": [int(rest[i]) for i in part] for n, part in enumerate(parts, start=1)}
    train = {name: part[:-VALIDATION] for name, part in sites.items()}
    everything = [i for part in train.values() for i in part] + sites["site-1"][-VALIDATION:]
    for name, part in {**sites, CENTRAL: everything, TEST: test}.items():
        _write(folder / name, [volumes[i] for i in part])
    sizes = {name: len(part) for name, part in train.items()}
    return {**sizes, CENTRAL: sum(sizes.values()), TEST: len(test)}


def bundle(source: str | None = None) -> Path:
    """Folder of the spleen bundle: `source`, else beside the data sets, else the small bundle of this example."""
    folder = Path(source) if source else _data() / "monai_bundles" / "spleen_ct_segmentation"
    return folder if folder.is_dir() else HERE.parent / "small_bundle"


def _data() -> Path:
    return Path(os.environ.get("FL_ADAPTERS_DATA", HERE.parents[4] / "shared" / "data"))  # or beside the checkout


def _divided(classes: np.ndarray, draw: np.random.RandomState) -> list[list[int]]:
    """Numbers of the volumes of each site. Each class is divided by shares from a Dirichlet distribution.

    A site with too few volumes for the bundle takes some from the largest site.
    """
    parts: list[list[int]] = [[] for _ in range(SITES)]
    for one in np.unique(classes):
        mine = np.flatnonzero(classes == one)
        cuts = np.cumsum(draw.dirichlet([ALPHA] * SITES))[:-1] * len(mine)
        for part, chunk in zip(parts, np.split(mine, cuts.astype(int)), strict=True):
            part.extend(chunk.tolist())
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
    return [Volume(image, mask, _voxels(mask)) for image, mask in pairs]


def _made(folder: Path) -> list[Volume]:
    """Generate volumes of 24 x 24 x 24 voxels with a bright ellipsoid, at different scales of intensity."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.RandomState(SEED)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
    volumes = []
    for i in range(MADE):
        centre, radius, scale = draw.uniform(8, 16, (3, 1, 1, 1)), draw.uniform(3, 6, (3, 1, 1, 1)), draw.randint(3)
        mask = (((grid - centre) / radius) ** 2).sum(0) < 1
        image = (1 + mask * draw.uniform(0.5, 1.5) + draw.normal(0, 0.5, mask.shape)) * 100 * 30**scale
        paths = folder / f"image_{i:03d}.nii.gz", folder / f"mask_{i:03d}.nii.gz"
        for array, path in zip((image.astype(np.float32), mask.astype(np.uint8)), paths, strict=True):
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 1.5, 1])), path)
        volumes.append(Volume(*paths, int(mask.sum())))
    return volumes


def _voxels(mask: Path) -> int:
    return int((np.asarray(nibabel.load(mask).dataobj) > 0).sum())


def _write(folder: Path, volumes: list[Volume]) -> None:
    """Write volumes as the bundle expects them: `imagesTr` and `labelsTr`, with file names in the same order."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number, volume in enumerate(volumes):
        name = f"volume_{number:03d}.nii.gz"
        shutil.copyfile(volume.image, folder / "imagesTr" / name)
        mask = nibabel.load(volume.mask)
        two_class = (np.asarray(mask.dataobj) > 0).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(two_class, mask.affine), folder / "labelsTr" / name)
