"""Seeds as streams of random numbers, and vectors to which such streams are added.

The stream of a seed for a named vector is AES-256 in counter mode. Its key is HKDF of the seed with the vector's name,
so it has one use, and the counter begins at 0. Measured on 2026-12-02 for seven streams of 3 MB, added in place, on one
core of a machine with AES instructions: 6 ms with AES-256-CTR in chunks of 256 KiB, 10 ms in chunks of 16 KiB, 21 ms
with ChaCha20.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fl_runtime.errors import ConfigError
from fl_runtime.secure_sum.context import Context, label
from fl_runtime.secure_sum.primitives import expand
from fl_runtime.secure_sum.ring import Ring
from fl_runtime.types import Array

_CHUNK_BYTES = 2**17
_ZEROS = bytes(_CHUNK_BYTES)


def add_masks(
    vector: Array, ring: Ring, context: Context, name: str, added: Iterable[bytes], subtracted: Iterable[bytes] = ()
) -> None:
    """Add the streams of seeds to a vector in place.

    Args:
        vector: A contiguous, writable array of the ring.
        ring: The ring.
        context: The run.
        name: Name of the vector.
        added: Seeds whose streams are added.
        subtracted: Seeds whose streams are subtracted.

    Raises:
        ConfigError: If the array is not one of the ring, or not contiguous and writable.
    """
    flat = _words(vector, ring, name)
    purpose = label("vector", context, name)
    streams = [(ring.add_into, _stream(expand(seed, purpose))) for seed in added]
    streams += [(ring.subtract_from, _stream(expand(seed, purpose))) for seed in subtracted]
    size = _CHUNK_BYTES // flat.itemsize
    scratch = np.empty(size, flat.dtype)
    for start in range(0, flat.size, size):  # all streams for one chunk, which stays in the cache
        part = flat[start : start + size]
        random = scratch[: part.size]
        zeros, target = memoryview(_ZEROS)[: part.nbytes], random.data.cast("B")
        if ring.words > 1:
            part, random = part.reshape(-1, ring.words), random.reshape(-1, ring.words)
        for change, stream in streams:
            stream.update_into(zeros, target)
            change(part, random)


def _words(vector: Array, ring: Ring, name: str) -> Array:
    """Return a flat view of a vector."""
    rows = ring.words == 1 or vector.shape[-1:] == (ring.words,)
    if vector.dtype != ring.dtype or not rows or not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ConfigError(
            f"{name} is an array of {vector.dtype} that no mask of {ring.bits} bits can be added to",
            fix="use a contiguous, writable array as Ring.encode returns it",
        )
    return vector.reshape(-1)


def _stream(key: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
