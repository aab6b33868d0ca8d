"""`describe_images`: sizes, spacings and intensities of images over all sites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import fl_adapters
from fl_adapters.extras import needs_extra
from fl_adapters.loop.federation import Federation, of_same_sites
from fl_adapters.loop.order import Array
from fl_adapters.participant.kit import current_kit
from fl_adapters.participant.policy_gate.own_policy import statistics_rules
from fl_runtime.errors import ConfigError, HandshakeError
from fl_runtime.types import StatisticsRules

from .columns import Table
from .federated import BINS, QUANTILES, over
from .protection import is_allowed
from .question import Question, ask
from .result import Histogram, Numeric, Statistics

INTENSITY = "intensity"
"""Name of the feature of all pixels."""
_EIGHT_BITS = tuple(float(edge) for edge in range(0, 257, 8))
_MOST_AXES = 4
_WHERE = "describe_images"


def describe_images(
    images: Iterable[Any],
    *,
    intensities: Sequence[float] = _EIGHT_BITS,
    bins: int = BINS,
    quantiles: Sequence[float] = QUANTILES,
    smallest_count: int = 1,
    federation: Any = None,
    kit: str | None = None,
    required: bool = False,
) -> Statistics:
    """Describe images over all sites of the federation that this process belongs to.

    Each image is a row with the columns "size 1", "size 2" and so on, "spacing 1" and so on where it is known, and
    "intensity mean", "intensity std", "intensity min" and "intensity max". The feature "intensity" is about all pixels
    of all images: count, mean, deviation and histogram. A bin of it is told by a site if at least `smallest_count`
    images have pixels there.

    Args:
        images: Images, each an array, a pair of an array and the spacing of its axes, or the path of a file: .npy,
            NIfTI, DICOM, or what Pillow reads. They are read one after the other. Pixels that are not finite count as
            missing.
        intensities: Edges of the bins of all pixels, the same at all sites. Default: 32 bins from 0 to 256.
        bins: Number of bins of the other histograms.
        quantiles: Levels of the quantiles of the columns, from 0 to 1.
        smallest_count: Least number of images behind any number that leaves this site. A higher one in the site's
            policy wins.
        federation: What `fl_adapters.sums` gives, to stay in its block. Default: a block of its own.
        kit: Folder of the site's startup kit. Default: `$FL_ADAPTERS_KIT`.
        required: Whether a missing startup kit is an error.

    Returns:
        The statistics over all sites that take part.

    Raises:
        ConfigError: An argument cannot work, or an image cannot be read.
        HandshakeError: The sites pass different arguments.

    Example:
        ```python
        import numpy as np

        from fl_adapters.statistics import describe_images

        scans = [np.random.default_rng(n).integers(0, 256, (64, 64)) for n in range(10)]
        print(describe_images(scans).features["intensity"].histogram)
        ```
    """
    question = ask(None, (), bins, quantiles, True, bins)
    edges = ask(None, (), list(intensities), (), True, BINS).bins
    rules = statistics_rules(current_kit(kit))
    rules = replace(rules, smallest_count=max(rules.smallest_count, smallest_count))
    pixels = _Pixels(np.array(edges))
    table = _table(images, pixels)
    if federation is not None:
        return _described(of_same_sites(federation), table, pixels, rules, question)
    with fl_adapters.sums(kit=kit, required=required) as block:
        return _described(of_same_sites(block), table, pixels, rules, question)


@dataclass
class _Pixels:
    """Sums over the pixels of a site's images.

    Attributes:
        edges: Edges of the bins.
        counts: Number of pixels in each bin.
        images: Number of images that have pixels there.
        moments: Number of pixels, of missing ones, and the sums of values and of their squares.
    """

    edges: Array
    counts: Array = field(init=False)
    images: Array = field(init=False)
    moments: Array = field(init=False)

    def __post_init__(self) -> None:
        self.counts, self.images = np.zeros(len(self.edges) - 1), np.zeros(len(self.edges) - 1)
        self.moments = np.zeros(4)

    def add(self, values: Array, missing: int) -> None:
        counts = np.histogram(values, self.edges)[0].astype(np.float64)
        self.counts += counts
        self.images += counts > 0
        self.moments += (len(values), missing, values.sum(), (values**2).sum())


def _table(images: Iterable[Any], pixels: _Pixels) -> Table:
    """A row for each image; its pixels go into `pixels`."""
    if isinstance(images, str | bytes | np.ndarray) or not isinstance(images, Iterable):
        raise ConfigError(
            f"images is a {type(images).__name__}", where=_WHERE, fix="pass a list of arrays or paths, or an iterable"
        )
    rows: list[dict[str, float]] = []
    for number, image in enumerate(images):
        array, spacing = _opened(image, number)
        values = array.reshape(-1).astype(np.float64)
        there = values[np.isfinite(values)]
        pixels.add(there, len(values) - len(there))
        row = {f"size {axis + 1}": float(size) for axis, size in enumerate(array.shape)}
        row |= {f"spacing {axis + 1}": float(step) for axis, step in enumerate(spacing)}
        if len(there):
            row |= {f"{INTENSITY} {name}": float(getattr(np, name)(there)) for name in ("mean", "std", "min", "max")}
        rows.append(row)
    names = sorted({name for row in rows for name in row}, key=lambda name: (not name.startswith("s"), name))
    return Table.of_arrays({name: np.array([row.get(name, np.nan) for row in rows]) for name in names}, len(rows))


def _opened(image: Any, number: int) -> tuple[Any, Sequence[float]]:
    """The array of an image, and the spacing of its axes as far as it is known."""
    spacing: Sequence[float] = ()
    if isinstance(image, tuple) and len(image) == 2:
        image, spacing = image
    elif isinstance(image, str | Path):
        image, spacing = _read(Path(image))
    array = np.asarray(image)
    if array.dtype.kind not in "biuf" or not 1 <= array.ndim <= _MOST_AXES or not array.size:
        raise ConfigError(
            f"image {number} has the shape {array.shape} and the dtype {array.dtype}",
            where=_WHERE,
            fix=f"pass arrays of real numbers with 1 to {_MOST_AXES} axes",
        )
    return array, spacing


def _read(path: Path) -> tuple[Any, Sequence[float]]:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False), ()
        if path.name.endswith((".nii", ".nii.gz")):
            with needs_extra("monai", "nibabel"):
                import nibabel
            volume: Any = nibabel.load(path)
            return np.asarray(volume.dataobj), [float(step) for step in volume.header.get_zooms()]
        if path.suffix.lower() in (".dcm", ".dicom"):
            with needs_extra("monai", "pydicom"):
                import pydicom
            scan = pydicom.dcmread(path)
            scale, shift = float(getattr(scan, "RescaleSlope", 1)), float(getattr(scan, "RescaleIntercept", 0))
            return scan.pixel_array * scale + shift, [float(step) for step in getattr(scan, "PixelSpacing", ())]
        with needs_extra("statistics", "Pillow", also=" pillow"):
            from PIL import Image
        with Image.open(path) as picture:
            return np.asarray(picture), ()
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path} cannot be read as an image: {error}", where=_WHERE, fix="check the file") from None


def _described(
    federation: Federation, table: Table, pixels: _Pixels, rules: StatisticsRules, question: Question
) -> Statistics:
    known = federation.union([repr(pixels.edges.tolist())[:900]])
    if len(known) > 1:
        raise HandshakeError(
            "the sites do not agree on intensities", where=_WHERE, fix="pass the same edges at every site"
        )
    found = over(federation, table, rules, question)
    least = max(1, rules.smallest_count)
    told = federation.site.name in found.sites and is_allowed(INTENSITY, rules) and rules.epsilon is None
    asked = federation.union([f"{rules.min_cohort} {federation.site.name}"] if told else [])
    if not asked or max(int(text.split()[0]) for text in asked) > len(asked):
        return found  # a site asks for more sites than tell
    total = federation.sum(
        {
            "counts": np.where(pixels.images >= least, pixels.counts, 0.0) * told,
            "moments": pixels.moments * told,
        }
    )
    count, missing, first, second = map(float, total["moments"])
    if not count:
        return found
    mean = first / count
    std = float(np.sqrt(max(0.0, (second - count * mean**2) / (count - 1)))) if count > 1 else None
    counts = tuple(map(int, total["counts"]))
    histogram = Histogram(tuple(pixels.edges.tolist()), counts, int(count) - sum(counts))
    pooled = Numeric(int(count), int(missing), mean, std, None, None, {}, histogram=histogram, sites=len(asked))
    return replace(found, features={**found.features, INTENSITY: pooled})
