"""TensorBoard event files with scalars, written without TensorBoard.

The format is small: records of (length, checksum, bytes, checksum), each holding an `Event` protobuf message. A
dependency on TensorBoard would be heavy: its import takes longer than a whole short run.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path


class ScalarWriter:
    """Appends scalars to a new event file. Used by one thread at a time."""

    def __init__(self, folder: Path) -> None:
        """Make the file, and its folder if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names: a restarted server's must come last
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._record(_field(3, b"brain.Event:2"), time.time())

    def add(self, tag: str, value: float, step: int, wall_time_s: float) -> None:
        """Add a point to the curve `tag`. The value is stored as float32."""
        number = struct.pack("<Bf", 2 << 3 | 5, _float32(value))
        summary = _field(1, _field(1, tag.encode()) + number)
        self._record(b"\x10" + _varint(step) + _field(5, summary), wall_time_s)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _record(self, body: bytes, wall_time_s: float) -> None:
        event = struct.pack("<Bd", 1 << 3 | 1, wall_time_s) + body
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _float32(value: float) -> float:
    try:
        struct.pack("<f", value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return value


def _crc_table() -> list[int]:
    table = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)
        table.append(number)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> bytes:
    """CRC-32C (Castagnoli), rotated and offset as the TFRecord format defines it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
