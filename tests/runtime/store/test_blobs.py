"""Blobs: payloads in mapped files that are recycled and swept, and that find a full disk when they are created."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fl_runtime.errors import StoreError
from fl_runtime.store.blobs import Blobs
from fl_runtime.wire.manifest import Manifest

MANIFEST = Manifest.of({"w": np.zeros((3, 2), np.float32), "n": np.zeros((), np.int64)}, {"moment": np.zeros(3)})
OTHER = Manifest.of({"w": np.zeros(3)})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_to_a_blob_is_in_its_file(tmp_path: Path) -> None:
    blob = Blobs(tmp_path / "blobs").create("update-1", MANIFEST)
    arrays, extras = blob.views()
    arrays["w"][...] = np.arange(6).reshape(3, 2)
    arrays["n"][...] = 5
    extras["moment"][...] = 0.5
    again = Blobs(tmp_path / "blobs").open("update-1", MANIFEST)
    assert again.buffer.tobytes() == blob.buffer.tobytes()
    tensors = safetensors.numpy.load_file(tmp_path / "blobs" / "update-1.safetensors")
    assert tensors["w"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert tensors["extra:moment"].tolist() == [0.5] * 3


def test_freed_blobs_are_used_again_for_the_same_layout_only(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    first = blobs.create("a", MANIFEST)
    inode = os.stat(tmp_path / "a.safetensors").st_ino
    blobs.free(first)
    assert not (tmp_path / "a.safetensors").exists()
    other = blobs.create("b", OTHER)
    assert other.buffer is not first.buffer
    second = blobs.create("c", MANIFEST)
    assert second.buffer is first.buffer
    assert os.stat(tmp_path / "c.safetensors").st_ino == inode
    assert len(files(tmp_path)) == 2


def test_many_rounds_need_no_more_files_than_one(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    for number in range(20):
        updates = [blobs.create(f"update-{number}-{site}", MANIFEST) for site in range(3)]
        for blob in updates:
            blobs.free(blob)
    assert len(files(tmp_path)) == 3


def test_a_rename_keeps_the_mapping(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blob = blobs.create("upload-0", OTHER)
    blobs.rename(blob, "update-1-0")
    blob.views()[0]["w"][...] = 3
    assert files(tmp_path) == ["update-1-0.safetensors"]
    assert Blobs(tmp_path).open("update-1-0", OTHER).views()[0]["w"].tolist() == [3, 3, 3]


def test_a_sweep_deletes_what_a_killed_server_left(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    for name in ("model-1", "upload-0", "free-7f"):
        blobs.create(name, OTHER)
    Blobs(tmp_path).sweep({"model-1"})
    assert files(tmp_path) == ["model-1.safetensors"]


def test_a_blob_of_the_wrong_size_or_none_at_all_is_refused(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.create("a", OTHER)
    with open(tmp_path / "a.safetensors", "ab") as file:
        file.truncate(70)
    with pytest.raises(StoreError, match="size") as caught:
        blobs.open("a", OTHER)
    assert "a.safetensors" in caught.value.where
    with pytest.raises(StoreError, match="cannot be read"):
        blobs.open("b", OTHER)


def test_tensors_without_any_bytes_have_a_blob_too(tmp_path: Path) -> None:
    manifest = Manifest.of({"empty": np.zeros((0, 3))})
    blob = Blobs(tmp_path).create("a", manifest)
    assert blob.views()[0]["empty"].shape == (0, 3)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Make the disk look full to a write: no file may grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_met_when_a_blob_is_made_and_leaves_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    with no_file_above(2**20):
        with pytest.raises(StoreError, match="cannot write") as caught:
            blobs.create("a", Manifest.of({"w": np.zeros(2**18)}))
        blobs.create("small", OTHER).buffer[...] = 1
    assert "a.safetensors" in caught.value.where
    assert "free disk space" in caught.value.fix
    assert files(tmp_path) == ["small.safetensors"]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError) as caught:
        Blobs(tmp_path / "file" / "blobs")
    assert caught.value.where.endswith("blobs")
