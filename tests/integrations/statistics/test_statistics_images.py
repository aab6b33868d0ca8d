"""Images over all sites: sizes, spacings and intensities equal NumPy's on all images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threaded_federation import ThreadedFederation, run_sites

from fl_adapters.statistics import Statistics, describe_images
from fl_runtime.errors import ConfigError, HandshakeError


def scans(count: int, seed: int) -> list[Any]:
    draw = np.random.default_rng(seed)
    return [(draw.integers(0, 256, (10 + number, 12), np.uint8), (0.5 + seed, 1.0)) for number in range(count)]


def described(parts: list[Any], **arguments: Any) -> Statistics:
    def site(federation: ThreadedFederation) -> Statistics:
        return describe_images(parts[federation.site.index], federation=federation, **arguments)

    results = run_sites(len(parts), site)
    assert len({result.to_json() for result in results}) == 1
    return results[0]


def test_images_of_all_sites_are_described() -> None:
    parts = [scans(5, 0), scans(3, 1)]
    found = described(parts)
    every = [image for part in parts for image, _ in part]
    pixels = np.concatenate([image.reshape(-1) for image in every]).astype(float)
    assert found.rows == 8 and list(found.features)[:4] == ["size 1", "size 2", "spacing 1", "spacing 2"]
    assert found.features["size 1"].mean == pytest.approx(np.mean([len(image) for image in every]))
    assert (found.features["spacing 1"].min, found.features["spacing 1"].max) == (0.5, 1.5)
    assert found.features["intensity mean"].mean == pytest.approx(np.mean([image.mean() for image in every]))
    intensity = found.features["intensity"]
    assert (intensity.count, intensity.sites) == (len(pixels), 2)
    assert intensity.mean == pytest.approx(pixels.mean()) and intensity.std == pytest.approx(pixels.std(ddof=1))
    assert intensity.histogram.counts == tuple(np.histogram(pixels, np.arange(0, 257, 8))[0])


def test_a_bin_of_too_few_images_is_not_told() -> None:
    images = [np.zeros((4, 4)) for _ in range(9)] + [np.full((4, 4), 200.0)]
    found = described([images, images], smallest_count=5)
    histogram = found.features["intensity"].histogram
    assert histogram.counts[0] == 2 * 9 * 16 and sum(histogram.counts) == histogram.counts[0]
    assert described([images, images[:3]], smallest_count=5).features["intensity"].sites == 1


def test_files_are_read(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    pytest.importorskip("PIL")
    import nibabel
    from PIL import Image

    array = np.arange(24, dtype=np.uint8).reshape(4, 6)
    np.save(tmp_path / "a.npy", array)
    Image.fromarray(array).save(tmp_path / "b.png")
    nibabel.save(nibabel.Nifti1Image(array[..., None], np.diag([2.0, 3.0, 4.0, 1.0])), tmp_path / "c.nii.gz")
    found = describe_images(sorted(tmp_path.iterdir()))
    assert found.rows == 3 and found.features["intensity"].mean == pytest.approx(array.mean())
    assert (found.features["spacing 2"].count, found.features["spacing 2"].mean) == (1, 3.0)
    (tmp_path / "d.png").write_text("no picture")
    with pytest.raises(ConfigError, match="cannot be read as an image"):
        describe_images([tmp_path / "d.png"])


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="images is a ndarray"):
        describe_images(np.zeros((3, 3)))
    with pytest.raises(ConfigError, match="image 0 has the shape"):
        describe_images([np.array(["text"])])

    def site(federation: ThreadedFederation) -> Statistics:
        return describe_images([np.zeros((2, 2))], intensities=[0, federation.site.index + 1], federation=federation)

    with pytest.raises(HandshakeError, match="do not agree on intensities"):
        run_sites(2, site)
