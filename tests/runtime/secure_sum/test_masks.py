"""Streams of seeds against other implementations of HKDF and AES-CTR."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fl_runtime.errors import ConfigError
from fl_runtime.secure_sum import Context, Ring
from fl_runtime.secure_sum.context import label
from fl_runtime.secure_sum.masks import add_masks
from fl_runtime.secure_sum.primitives import expand, extract, seal, unseal

CONTEXT = Context("job", "first", "run")
SEED, OTHER = bytes(range(32)), bytes(32)


def test_derivation_is_hkdf() -> None:
    whole = HKDF(SHA256(), 32, b"fl-adapters secure sum 1", b"purpose").derive(b"secret")
    assert expand(extract(b"secret"), b"purpose") == whole


@pytest.mark.parametrize("count", [0, 1, 100_003])
def test_masks_are_streams_of_aes(count: int) -> None:
    def stream(seed: bytes) -> np.ndarray:
        key = HKDFExpand(SHA256(), 32, label("vector", CONTEXT, "w")).derive(seed)
        data = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count))
        return np.frombuffer(data, "<u8")

    vector = np.arange(count, dtype=np.uint64)
    add_masks(vector, Ring(64, 0), CONTEXT, "w", [SEED], [OTHER])
    assert np.array_equal(vector, np.arange(count, dtype=np.uint64) + stream(SEED) - stream(OTHER))


@pytest.mark.parametrize("ring", [Ring(32, 0), Ring(64, 0), Ring(128, 0)])
def test_what_is_added_can_be_subtracted(ring: Ring) -> None:
    vector = ring.encode(np.arange(70_000).reshape(-1, 7))
    masked = vector.copy()
    add_masks(masked, ring, CONTEXT, "w", [SEED, OTHER])
    assert not np.array_equal(vector, masked)
    add_masks(masked, ring, CONTEXT, "w", [], [OTHER, SEED])
    assert np.array_equal(vector, masked)


@pytest.mark.parametrize("vector", [np.zeros(4, np.uint32), np.zeros((4, 4), np.uint64)[:, 1], np.zeros(4)])
def test_arrays_that_no_mask_fits_are_refused(vector: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="w is an array of .* no mask of 64 bits"):
        add_masks(vector, Ring(64, 0), CONTEXT, "w", [SEED])


def test_sealed_data_open_with_key_and_purpose_alone() -> None:
    sealed = seal(SEED, b"data", b"purpose")
    assert unseal(SEED, sealed, b"purpose") == b"data" and sealed != seal(SEED, b"data", b"purpose")
    others = [(OTHER, sealed, b"purpose"), (SEED, sealed, b"other"), (SEED, sealed[:-1], b"purpose")]
    for key, data, purpose in [*others, (SEED, b"", b"purpose")]:
        with pytest.raises(ValueError):
            unseal(key, data, purpose)
