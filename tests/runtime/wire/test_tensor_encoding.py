"""Tensors on the wire: bit for bit for every dtype and layout, and no claim of a hostile peer is believed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_runtime.errors import ConfigError, ProtocolError, TransferDamagedError, UpdateRefusedError
from fl_runtime.types import Array, Arrays, is_floating
from fl_runtime.wire import frames
from fl_runtime.wire.dtypes import DTYPES, dtype_name, dtype_of
from fl_runtime.wire.finite import check_finite, inspect
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import MAX_TENSORS, Manifest, differences

SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (0,), (3, 0, 2), (2, 3), (1, 2, 1, 3)]


def random_bits(shape: tuple[int, ...], dtype: np.dtype[Any], seed: int = 0) -> Array:
    """Return an array of arbitrary bits, NaN payloads included."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return (raw % 2 if dtype == np.bool_ else raw).view(dtype).reshape(shape)


def sent(arrays: Arrays, extras: Arrays | None = None, frame_bytes: int = 16) -> tuple[Arrays, Arrays]:
    """Send arrays through manifest, protobuf, frames and receiver, as between two processes."""
    extras = extras or {}
    ours = Manifest.of(arrays, extras)
    digests = ours.digests(arrays, extras)
    theirs = Manifest.from_proto(pb.Manifest.FromString(ours.to_proto().SerializeToString()))
    receiver = frames.Receiver(theirs, digests, np.empty(theirs.nbytes, np.uint8))
    for message in frames.frames(ours.pieces(arrays, extras), 0, lambda: frame_bytes):
        receiver.take(frames.frame_data(message))
    return receiver.finish()


def assert_same(actual: Arrays, expected: Arrays) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert actual[name].shape == array.shape
        assert actual[name].dtype == array.dtype.newbyteorder("<")
        assert actual[name].tobytes() == np.asarray(array, array.dtype.newbyteorder("<")).tobytes(), name


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_and_shape_survives_bit_for_bit(name: str) -> None:
    arrays = {f"t{i}": random_bits(shape, DTYPES[name], i) for i, shape in enumerate(SHAPES)}
    assert_same(sent(arrays)[0], arrays)


def test_all_dtypes_at_once_with_extras_lie_aligned_and_without_gaps() -> None:
    arrays = {name: random_bits((3,), dtype) for name, dtype in DTYPES.items()}
    extras = {name: random_bits((5, 1), dtype) for name, dtype in DTYPES.items()}
    manifest = Manifest.of(arrays, extras)
    found_arrays, found_extras = sent(arrays, extras)
    assert_same(found_arrays, arrays)
    assert_same(found_extras, extras)
    spans = sorted((start, start + t.nbytes) for start, t in zip(manifest.offsets, manifest.tensors, strict=True))
    assert [end for _, end in spans] == [*(start for start, _ in spans[1:]), manifest.nbytes]
    assert all(start % dtype_of(t.dtype).itemsize == 0
               for start, t in zip(manifest.offsets, manifest.tensors, strict=True))  # fmt: skip


@pytest.mark.parametrize("name", DTYPES)
def test_layouts_in_memory_do_not_matter(name: str) -> None:
    base = random_bits((4, 6), DTYPES[name])
    arrays = {
        "transposed": base.T,
        "strided": base[::2, ::-3],
        "column": base[:, 2],
        "fortran": np.asfortranarray(base),
    }
    frozen = base.copy()
    frozen.flags.writeable = False
    assert_same(sent({**arrays, "frozen": frozen})[0], {**arrays, "frozen": frozen})


@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.kind != "V" and n != "float8_e5m2"])
def test_big_endian_arrays_arrive_with_the_same_values(name: str) -> None:
    little = random_bits((5,), DTYPES[name])
    big = little.byteswap().view(little.dtype.newbyteorder(">"))
    actual = sent({"t": big})[0]["t"]
    assert actual.tobytes() == little.tobytes()


@pytest.mark.parametrize("dtype", [np.complex128, np.dtype("U4"), np.dtype(object), np.longdouble, ml_dtypes.int4])
def test_dtypes_that_cannot_travel_are_refused_by_name(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="my.tensor") as caught:
        Manifest.of({"my.tensor": np.zeros(2, dtype)})
    assert "keep_local" in caught.value.fix


def test_an_unknown_dtype_name_is_refused() -> None:
    message = pb.Manifest(tensors=[pb.Tensor(name="w", dtype="float7", shape=[2])])
    with pytest.raises(ProtocolError, match="float7"):
        Manifest.from_proto(message)


def test_a_dtype_has_one_name_whatever_its_byte_order() -> None:
    assert {dtype_name(d.newbyteorder(">"), tensor="t") for d in DTYPES.values()} == set(DTYPES)
    assert {n for n, d in DTYPES.items() if not is_floating(d)} == {
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"
    }  # fmt: skip


# -- frames ------------------------------------------------------------------------------------------------------

pieces_of_bytes = st.lists(st.binary(max_size=40), max_size=8)


@given(pieces_of_bytes, st.integers(0, 200), st.integers(1, 50))
def test_frames_hold_the_bytes_from_any_offset_in_any_size(pieces: list[bytes], start: int, size: int) -> None:
    payload = b"".join(pieces)
    start = min(start, len(payload))
    messages = list(frames.frames([memoryview(p) for p in pieces], start, lambda: size))
    assert b"".join(bytes(frames.frame_data(m)) for m in messages) == payload[start:]
    assert all(len(frames.frame_data(m)) == size for m in messages[:-1])


@given(st.binary(max_size=300))
def test_protobuf_itself_reads_and_writes_our_frames(data: bytes) -> None:
    ours = frames.frame([memoryview(data)])
    for kind in (pb.TaskPart, pb.UpdatePart):
        assert kind.FromString(ours).data == data
        assert kind.FromString(ours).WhichOneof("kind") == "data"
        assert kind(data=data).SerializeToString() == ours
    assert frames.is_frame(ours)
    assert bytes(frames.frame_data(pb.TaskPart(data=data).SerializeToString())) == data


def test_headers_are_not_taken_for_frames() -> None:
    for message in (
        pb.TaskPart(task=pb.TaskHeader(round=1)),
        pb.TaskPart(waiting=pb.Waiting()),
        pb.UpdatePart(update=pb.UpdateHeader()),
    ):
        assert not frames.is_frame(message.SerializeToString())
    assert not frames.is_frame(b"")


@pytest.mark.parametrize(
    "message",
    [
        b"\x7a",  # no length
        b"\x7a\x80",  # a length that does not end
        b"\x7a\x05abcd",  # fewer bytes than it says
        b"\x7a\x03abcd",  # more
        b"\x7a" + b"\xff" * 9 + b"\x01",  # 2**64 - 1
        b"\x7a\x80\x80\x80\x80\x80\x80\x00",  # too many bytes of length
    ],
)
def test_frames_that_lie_about_their_length_are_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.frame_data(message)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_frame_or_a_protocol_error(junk: bytes) -> None:
    try:
        data = frames.frame_data(b"\x7a" + junk)
    except ProtocolError:
        return
    assert bytes(data) == junk[len(junk) - len(data) :]


# -- manifests and receivers -------------------------------------------------------------------------------------

tensors = st.builds(
    random_bits,
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(list(DTYPES.values())),
    st.integers(0, 9),
)
names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=["C", "Z"]), min_size=1)
sets_of_arrays = st.dictionaries(names, tensors, max_size=6)


@settings(deadline=None, max_examples=50)
@given(sets_of_arrays, sets_of_arrays, st.integers(1, 64))
def test_any_set_of_arrays_survives(arrays: Arrays, extras: Arrays, size: int) -> None:
    found_arrays, found_extras = sent(arrays, extras, size)
    assert_same(found_arrays, arrays)
    assert_same(found_extras, extras)


@settings(deadline=None, max_examples=50)
@given(sets_of_arrays, st.data())
def test_any_damaged_byte_is_noticed(arrays: Arrays, data: st.DataObject) -> None:
    manifest = Manifest.of(arrays)
    if manifest.nbytes == 0:
        return
    payload = bytearray(b"".join(manifest.pieces(arrays, {})))
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    receiver = frames.Receiver(manifest, manifest.digests(arrays, {}), np.empty(manifest.nbytes, np.uint8))
    with pytest.raises(TransferDamagedError):
        receiver.take(bytes(payload))


def test_a_damaged_tensor_is_named() -> None:
    arrays = {"good": np.ones(3), "hurt": np.ones(3)}
    manifest = Manifest.of(arrays)
    receiver = frames.Receiver(manifest, manifest.digests(arrays, {}), np.empty(manifest.nbytes, np.uint8))
    with pytest.raises(TransferDamagedError, match="hurt") as caught:
        receiver.take(np.array([1.0, 1, 1, 1, 2, 1]).tobytes())
    assert "good" not in str(caught.value)
    assert receiver.arrived == 24  # from there it goes on
    receiver.take(np.ones(3).tobytes())
    assert receiver.finish()[0]["hurt"].tolist() == [1.0] * 3


def test_a_receiver_takes_neither_more_nor_fewer_bytes_than_announced() -> None:
    manifest = Manifest.of({"w": np.zeros(4)})
    receiver = frames.Receiver(manifest, bytes(8), np.empty(32, np.uint8))
    receiver.take(bytes(31))
    with pytest.raises(ProtocolError, match="31 of 32"):
        receiver.finish()
    with pytest.raises(ProtocolError, match="more bytes"):
        receiver.take(bytes(2))
    with pytest.raises(ProtocolError, match="digests"):
        frames.Receiver(manifest, bytes(9), np.empty(32, np.uint8))


def test_layouts_differ_by_name_dtype_shape_order_and_place() -> None:
    a, b = np.zeros(4, np.float32), np.zeros(4, np.int32)
    sets: list[tuple[Arrays, Arrays]] = [
        ({"a": a, "b": a}, {}),
        ({"b": a, "a": a}, {}),
        ({"a": a, "b": b}, {}),
        ({"a": a, "b": a.reshape(2, 2)}, {}),
        ({"a": a}, {"b": a}),
        ({"a": a, "c": a}, {}),
        ({"a": a}, {}),
    ]
    assert len({Manifest.of(*pair).layout for pair in sets}) == len(sets)
    assert Manifest.of(*sets[0]).layout == Manifest.of({"a": a + 1, "b": a}, {}).layout


def hostile(*entries: dict[str, Any]) -> pb.Manifest:
    return pb.Manifest(tensors=[pb.Tensor(**{"name": "w", "dtype": "float32", "shape": [2], **e}) for e in entries])


@pytest.mark.parametrize(
    "message",
    [
        hostile({"name": ""}),
        hostile({"name": "w\0x"}),
        hostile({"name": "w\nx"}),
        hostile({"name": "w" * 1025}),
        hostile({}, {}),
        hostile({"extra": True}, {"extra": True}),
        hostile({"dtype": ""}),
        hostile({"dtype": "object"}),
        hostile({"shape": [1] * 33}),
        hostile({"shape": [2**63]}),
        hostile({"shape": [2**40, 2**40]}),
        hostile({"shape": [2**64 - 1, 2]}),
        hostile({"shape": [0, 2**63]}),
        hostile({"shape": [0, 2**46, 2**46]}),
        hostile({"shape": [2**46 // 4 + 1]}),
    ],
    ids=lambda message: str(message)[:40].replace("\n", " "),
)
def test_hostile_manifests_are_refused(message: pb.Manifest) -> None:
    with pytest.raises(ProtocolError):
        Manifest.from_proto(message)


def test_too_many_tensors_are_refused() -> None:
    message = pb.Manifest()
    for _ in range(MAX_TENSORS + 1):
        message.tensors.add()
    with pytest.raises(ProtocolError, match="200001 tensors"):
        Manifest.from_proto(message)


def test_a_name_may_be_that_of_a_weight_and_of_an_extra() -> None:
    Manifest.from_proto(hostile({}, {"extra": True}))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.tuples(st.text(max_size=4), st.sampled_from(["float32", "bool", "x"]), st.lists(st.integers(0, 2**64 - 1))),
        max_size=3,
    )
)
def test_whatever_manifest_is_accepted_can_be_laid_out(entries: list[tuple[str, str, list[int]]]) -> None:
    message = pb.Manifest(tensors=[pb.Tensor(name=n, dtype=d, shape=s) for n, d, s in entries])
    try:
        manifest = Manifest.from_proto(message)
    except ProtocolError:
        return
    if manifest.nbytes < 2**20:
        manifest.views(np.empty(manifest.nbytes, np.uint8))


def test_differences_name_every_tensor_once() -> None:
    ours = Manifest.of({"same": np.zeros(2), "shape": np.zeros(2), "dtype": np.zeros(2), "gone": np.zeros(1)})
    theirs = Manifest.of(
        {"same": np.zeros(2), "shape": np.zeros((2, 1)), "dtype": np.zeros(2, np.float32), "new": np.zeros(1)},
        {"moments": np.zeros(1)},
    )
    assert differences(ours, theirs) == [
        "shape: float64[2] != float64[2, 1]",
        "dtype: float64[2] != float32[2]",
        "gone: float64[1] != missing",
        "new: missing != float64[1]",
    ]


# -- values that may not enter an average ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100, 2**14, 2**20])
def test_a_payload_in_its_header_is_what_protobuf_makes_of_it(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    pieces = [memoryview(data[: size // 3]), memoryview(data[size // 3 :])]
    update = pb.UpdatePart(update=pb.UpdateHeader(round=7, payload=pb.Payload(layout=b"l" * 16, total_bytes=size)))
    task = pb.TaskPart(task=pb.TaskHeader(job="j", version=3, payload=pb.Payload(digests=b"d" * 8)))
    actual = pb.UpdatePart.FromString(frames.inlined(update, pieces))
    other = pb.TaskPart.FromString(frames.inlined(task, pieces))
    update.update.payload.inline = task.task.payload.inline = data
    assert actual == update
    assert other == task


@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if is_floating(d)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_found_in_every_dtype(name: str, value: float) -> None:
    array = np.zeros(100_000, np.float32).astype(DTYPES[name])
    check_finite({"w": array}, "here")
    array[99_998] = value
    with pytest.raises(UpdateRefusedError, match="NaN or infinite values in w") as caught:
        check_finite({"fine": np.ones(3), "w": array[::2]}, "site-1, round 4")
    assert "fine" not in caught.value.what
    assert caught.value.where == "site-1, round 4"


@pytest.mark.parametrize("name", DTYPES)
def test_one_pass_finds_the_digests_and_what_is_not_finite(name: str) -> None:
    """For any layout in memory, and for several blocks."""
    arrays = {"w": np.ones(300_000, np.float32).astype(DTYPES[name]), "s": np.zeros((), DTYPES[name])}
    arrays |= {"turned": arrays["w"].reshape(500, 600).T, "big": arrays["w"].astype(DTYPES[name].newbyteorder(">"))}
    extras = {"w": np.zeros((3, 0), DTYPES[name])}
    manifest, inspected = Manifest.of(arrays, extras), inspect(arrays, extras, "here")
    assert inspected.covers(arrays, extras)
    assert manifest.digests(arrays, extras, inspected) == manifest.digests(arrays, extras)
    other = {**arrays, "w": np.zeros_like(arrays["w"])}
    assert not inspected.covers(other, extras)
    assert manifest.digests(other, extras, inspected) == manifest.digests(other, extras)
    if is_floating(DTYPES[name]):
        arrays["w"][299_999] = np.nan
        with pytest.raises(UpdateRefusedError, match="NaN or infinite values in w"):
            inspect({"fine": np.ones(3), "w": arrays["w"]}, {}, "here")


def test_integers_booleans_and_empty_tensors_are_always_finite() -> None:
    check_finite({"i": np.array([2**62]), "b": np.array([True]), "e": np.empty((0, 3)), "s": np.array(1.0)}, "here")


def test_both_parts_of_complex_numbers_are_checked() -> None:
    with pytest.raises(UpdateRefusedError):
        check_finite({"z": np.array([complex(0, np.inf)], np.complex64)}, "here")
