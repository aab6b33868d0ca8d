"""Our tensor files against the safetensors library, in both directions, and incomplete files."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_runtime.errors import ConfigError, StoreError
from fl_runtime.store.tensorfile import header_of, read_tensors, write_tensors
from fl_runtime.types import Arrays
from fl_runtime.wire.dtypes import DTYPES
from fl_runtime.wire.manifest import Manifest

# what safetensors.numpy makes arrays of in every version that we support
PLAIN = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
         "float16", "float32", "float64"]  # fmt: skip


def some(names: list[str]) -> Arrays:
    rng = np.random.default_rng(0)
    return {f"layer.{n}": rng.integers(0, 2, (2, 3)).astype(DTYPES[n]) for n in names} | {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), np.float16),
    }


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    arrays = some(PLAIN)
    write_tensors(tmp_path / "m.safetensors", arrays, {"format": "pt", "round": "3"})
    actual = safetensors.numpy.load_file(tmp_path / "m.safetensors")
    assert sorted(actual) == sorted(arrays)
    for name, array in arrays.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array)
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt", "round": "3"}


def test_the_library_takes_our_header_for_every_dtype_but_complex() -> None:
    arrays = {name: np.zeros(3, dtype) for name, dtype in DTYPES.items() if name not in ("complex64", *_UNKNOWN)}
    manifest = Manifest.of(arrays)
    data = header_of(manifest) + bytes(manifest.nbytes)
    actual = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    assert {name: entry["shape"] for name, entry in actual.items()} == {name: [3] for name in arrays}


_UNKNOWN = ("float8_e4m3fnuz", "float8_e5m2fnuz")  # newer than the library's floor


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    arrays = some(PLAIN)
    safetensors.numpy.save_file(dict(arrays), tmp_path / "m.safetensors", {"who": "the library"})
    actual = read_tensors(tmp_path / "m.safetensors")
    assert sorted(actual) == sorted(arrays)
    for name, array in arrays.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array)


def test_bfloat16_written_by_torch_is_read_bit_for_bit(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    tensor = torch.arange(-4, 4).to(torch.bfloat16) * 0.3
    save_file({"w": tensor, "odd": torch.ones(3, dtype=torch.uint8)}, tmp_path / "t.safetensors")
    actual = read_tensors(tmp_path / "t.safetensors")
    assert actual["w"].dtype == ml_dtypes.bfloat16
    assert actual["w"].tobytes() == tensor.view(torch.int16).numpy().tobytes()
    write_tensors(tmp_path / "back.safetensors", actual)
    assert torch.equal(load_file(tmp_path / "back.safetensors")["w"], tensor)


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.sampled_from([np.zeros((2, 0, 3)), np.arange(5.0), np.array(True), np.ones(3, ml_dtypes.float8_e5m2)]),
        max_size=5,
    )
)
def test_any_names_and_shapes_come_back(tmp_path_factory: pytest.TempPathFactory, arrays: Arrays) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_tensors(path, arrays)
    actual = read_tensors(path)
    assert list(actual) == list(arrays)
    assert all(actual[n].tobytes() == a.tobytes() and actual[n].shape == a.shape for n, a in arrays.items())


def test_the_payload_is_aligned_for_mapping() -> None:
    for count in range(1, 40):
        assert len(header_of(Manifest.of({"n" * count: np.zeros(1)}))) % 64 == 0


def test_what_is_read_may_be_changed_and_the_file_stays(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.safetensors", {"w": np.ones(3)})
    read_tensors(tmp_path / "m.safetensors")["w"][...] = 7
    np.testing.assert_array_equal(read_tensors(tmp_path / "m.safetensors")["w"], np.ones(3))


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_tensors(path, {"w": np.ones(3)})
    (tmp_path / "m.safetensors.partial").mkdir()  # the new one cannot be begun
    with pytest.raises(StoreError, match="cannot write") as caught:
        write_tensors(path, {"w": np.zeros(3)})
    assert caught.value.where == str(path)
    np.testing.assert_array_equal(read_tensors(path)["w"], np.ones(3))


def whole() -> bytes:
    manifest = Manifest.of({"w": np.ones(4), "v": np.ones(2, np.float32)})
    return header_of(manifest) + bytes(manifest.nbytes)


@pytest.mark.parametrize("kept", [0, 5, 8, 20, -1, -33])
def test_torn_files_are_refused_by_name(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "torn.safetensors"
    path.write_bytes(whole()[:kept])
    with pytest.raises(ConfigError) as caught:
        read_tensors(path)
    assert caught.value.where == str(path)


def with_header(fields: Any, payload: bytes = bytes(16)) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + payload


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        with_header(b"not json"),
        with_header([1, 2]),
        with_header({"w": 3}),
        with_header({"w": {"dtype": "F32"}}),
        with_header(entry(dtype="F7")),
        with_header(entry(shape=[5])),
        with_header(entry(shape=["x"])),
        with_header(entry(shape=[-2, -2])),
        with_header(entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0])),
        with_header(entry(data_offsets=[8, 24])),
        with_header(entry(data_offsets=[-16, 0])),
        with_header(entry(data_offsets=[16, 0])),
        with_header(entry(data_offsets=[0.0, 16.0])),
        with_header(entry(data_offsets=[0])),
        struct.pack("<Q", 2**63) + bytes(40),
        b"\x80\x04\x95pickle" + bytes(40),
    ],
)
def test_files_that_lie_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_tensors(path)
    assert caught.value.where == str(path)
    assert caught.value.fix


def test_a_file_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        read_tensors(tmp_path / "none.safetensors")
    assert "none.safetensors" in caught.value.where


def test_tensors_that_others_did_not_align_are_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    fields = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    path.write_bytes(with_header(fields, b"\x07" + np.array([1.5, -2.0], np.float32).tobytes()))
    actual = read_tensors(path)
    assert actual["a"].tolist() == [7]
    assert actual["w"].tolist() == [1.5, -2.0]
