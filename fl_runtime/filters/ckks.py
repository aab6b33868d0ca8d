"""Averages of encrypted weights: the sites hold the key, the server adds up what it cannot read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fl_runtime.errors import ConfigError, UpdateRefusedError
from fl_runtime.filters.base import AUX, FilterSettings, Layout, Point, check_number, is_real, refuse
from fl_runtime.types import Allocate, Array, Arrays, Settings, Update

VALUES, LENGTHS = f"ckks{AUX}values", f"ckks{AUX}lengths"
KEY_FILE = "ckks.key"
_MAX_BITS = {4096: 109, 8192: 218, 16384: 438, 32768: 881}
_PRIME_BITS, _EXACT_BITS = 60, 44
_HEADER_BYTES = 1024  # of a serialized ciphertext, besides its coefficients


@dataclass(frozen=True)
class HomomorphicCKKS(FilterSettings):
    """The weights of all tensors, as one long row of numbers, are encrypted with CKKS at the site; the server forms
    sum_i (n_i / N) ct_i, with N the sum of all n_i, and hands that out; the sites decrypt.

    All sites hold one secret key (`ckks.key` in the startup kit, made by `fl-adapters ckks-key`; in a simulation the
    first site makes it). The server holds the parameters alone, no key. It sees num_examples, metrics, tensor names
    and shapes; neither updates nor the model. Any site could read the update of another that came into its hands:
    this protects against the server, and so does not replace GaussianDP, which may go before it.

    poly_modulus_degree n: a ciphertext holds n / 2 numbers, default 8192. coeff_mod_bits: default (60, 50, 60), at
    128 bits of security (the Homomorphic Encryption Standard allows 218 bits in all for n = 8192). scale_bits:
    default 50. The average takes one multiplication, so there must be a prime in the middle, of scale_bits, to
    rescale by; numbers must stay below 2^(first - scale - 1) = 512, and the relative error of an average is about
    1e-10 (below 1e-6 for scale_bits of 44 and more; fewer are refused, and the key's first use tests it).

    A number takes 2 (len - 1) n 8 / (n / 2) = 64 bytes on the way up and 32 down. float16 to float64 tensors travel,
    integers and booleans do not: keep them at the site with `keep_local`. With a strategy that needs more than the
    weighted mean, and with filters that need the server to read (Quantize, TopK, ExcludeVars), it is refused.

    What is decrypted must not go back to whoever has the ciphertexts: with an approximate scheme the rounding error
    of exact results tells about the key (Li and Micciancio 2021, "On the security of homomorphic encryption on
    approximate numbers").

    Cheon, Kim, Kim, Song 2017, "Homomorphic encryption for arithmetic of approximate numbers"; TenSEAL (Benaissa et
    al. 2021) on Microsoft SEAL. Needs the extra `[he]` at the sites and at the server.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out",)
    poly_modulus_degree: int = 8192
    coeff_mod_bits: tuple[int, ...] = (60, 50, 60)
    scale_bits: int = 50

    def __post_init__(self) -> None:
        if self.poly_modulus_degree not in _MAX_BITS:
            degrees = ", ".join(map(str, _MAX_BITS))
            raise refuse(f"HomomorphicCKKS: poly_modulus_degree is {self.poly_modulus_degree!r}", f"one of {degrees}")
        bits = self.coeff_mod_bits
        if not isinstance(bits, (list, tuple)) or not all(type(b) is int and 20 <= b <= _PRIME_BITS for b in bits):
            raise refuse(f"HomomorphicCKKS: coeff_mod_bits is {bits!r}", "give sizes of primes such as [60, 50, 60]")
        object.__setattr__(self, "coeff_mod_bits", tuple(bits))
        if type(self.scale_bits) is not int:
            raise refuse(f"HomomorphicCKKS: scale_bits is {self.scale_bits!r}", "give a whole number such as 50")
        check_number(self, "scale_bits", self.scale_bits, least=_EXACT_BITS, most=_PRIME_BITS)
        self._check_depth(tuple(bits))

    def _check_depth(self, bits: tuple[int, ...]) -> None:
        limit = _MAX_BITS[self.poly_modulus_degree]
        if sum(bits) > limit:
            raise refuse(
                f"HomomorphicCKKS: {sum(bits)} bits of coeff_mod_bits leave less than 128 bits of security",
                f"at poly_modulus_degree {self.poly_modulus_degree} use {limit} bits at most, or a larger degree",
            )
        if len(bits) < 3 or any(middle != self.scale_bits for middle in bits[1:-1]):
            raise refuse(
                f"HomomorphicCKKS: with primes of {bits} bits an average, which is one multiplication at a scale of "
                f"2^{self.scale_bits}, cannot be rescaled",
                f"use three primes or more, those in the middle of {self.scale_bits} bits",
            )
        if bits[-1] < max(bits) or self.largest < 2:
            raise refuse(
                f"HomomorphicCKKS: primes of {bits} bits leave no room above a scale of 2^{self.scale_bits}",
                "make the first and the last prime the largest, and the first larger than scale_bits",
            )

    @property
    def largest(self) -> float:
        """Numbers must stay below this."""
        return float(2.0 ** (self.coeff_mod_bits[0] - self.scale_bits - 1))

    @property
    def slots(self) -> int:
        """Numbers in one ciphertext."""
        return self.poly_modulus_degree // 2

    def layout(self, layout: Layout, *, sums: bool = False) -> Layout:
        """The arrays of an encrypted model. sums: of an average, which has one prime less."""
        count = sum(math.prod(shape) for _, shape in layout.values())
        rows = max(1, -(-count // self.slots))
        primes = len(self.coeff_mod_bits) - 1 - sums
        width = 2 * primes * self.poly_modulus_degree * 8 + _HEADER_BYTES
        return {VALUES: (np.dtype(np.uint8), (rows, width)), LENGTHS: (np.dtype(np.uint32), (rows,))}

    def check_tensors(self, layout: Layout) -> None:
        """ConfigError for tensors that an average of floating-point numbers would not keep as they are."""
        wrong = [name for name, (dtype, _) in layout.items() if not is_real(dtype)]
        if wrong:
            raise refuse(
                f"HomomorphicCKKS encrypts floating-point tensors, and {wrong[0]!r} is {layout[wrong[0]][0]}",
                f"keep such tensors at the sites: keep_local={wrong[:4]!r}",
            )

    def public_context(self) -> Any:
        """TenSEAL's context with these parameters and without any key."""
        context = self.new_context()
        context.make_context_public()
        return context

    def new_context(self) -> Any:
        """TenSEAL's context with these parameters and fresh keys."""
        tenseal = need_tenseal()
        bits = list(self.coeff_mod_bits)
        context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, self.poly_modulus_degree, -1, bits)
        context.global_scale = 2.0**self.scale_bits
        return context


class Cipher:
    """Encrypts and decrypts the arrays of one site. context: TenSEAL's, with the secret key."""

    def __init__(self, settings: HomomorphicCKKS, context: Any) -> None:
        self.settings, self._context = settings, context

    def encrypt(self, arrays: Arrays, layout: Layout) -> Arrays:
        """arrays: real, finite, as named in `layout`. UpdateRefusedError for numbers that are too large."""
        tenseal, slots = need_tenseal(), self.settings.slots
        spec = self.settings.layout(layout)
        values, lengths = (np.zeros(shape, dtype) for dtype, shape in spec.values())
        flat = _Stream(arrays, layout)
        for row in range(len(lengths)):
            part = flat.next(slots)
            worst = float(np.abs(part).max(initial=0.0))
            if worst >= self.settings.largest:
                raise UpdateRefusedError(
                    f"a weight of size {worst:.3g} cannot be encrypted: the limit is {self.settings.largest:g}",
                    where="HomomorphicCKKS",
                    fix="keep that tensor at the site with keep_local, or use a larger first prime or a smaller scale",
                )
            _put(values, lengths, row, tenseal.ckks_vector(self._context, part).serialize())
        return {VALUES: values, LENGTHS: lengths}

    def decrypt(self, arrays: Arrays, layout: Layout) -> dict[str, Array]:
        """The arrays of `layout` that were encrypted: new ones, the caller's own."""
        tenseal = need_tenseal()
        found = {name: np.empty(shape, dtype) for name, (dtype, shape) in layout.items()}
        targets = [array.reshape(-1) for array in found.values()]
        rows = (
            np.asarray(tenseal.ckks_vector_from(self._context, _taken(arrays, row)).decrypt())
            for row in range(len(arrays[LENGTHS]))
        )
        _spread(rows, targets)
        return found

    def self_test(self) -> None:
        """ConfigError if an average of two does not come out to 1e-7: parameters and key in use together."""
        rng = np.random.default_rng(0)
        layout: Layout = {"w": (np.dtype(np.float64), (self.settings.slots,))}
        first, second = (rng.normal(size=self.settings.slots) * 0.05 for _ in range(2))
        public = self.settings.public_context()
        encrypted = [self.encrypt({"w": part}, layout) for part in (first, second)]
        found = self.decrypt(_weighted(public, encrypted, [0.25, 0.75], self.settings, layout), layout)["w"]
        wanted = 0.25 * first + 0.75 * second
        error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        if error > 1e-7:
            raise refuse(
                f"HomomorphicCKKS: with these parameters and this key an average has a relative error of {error:.1e}",
                "use the key that was made for these parameters, and more scale_bits",
            )


class CiphertextMean:
    """At the server: the weighted mean of encrypted updates, ciphertext by ciphertext. Order of the sites, fixed.

    The shares n_i / N are known only once all updates are there, so the arrays of `add` are read in `result`.
    """

    def __init__(self, settings: HomomorphicCKKS, context: Any, allocate: Allocate) -> None:
        self._settings, self._context, self._allocate = settings, context, allocate
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        self._updates.append(update)

    def result(self) -> tuple[Arrays, Arrays]:
        total = sum(update.weight for update in self._updates)
        shares = [update.weight / total for update in self._updates]
        parts = [update.arrays for update in self._updates]
        rows = len(parts[0][LENGTHS])
        layout: Layout = {"w": (np.dtype(np.float64), (rows * self._settings.slots,))}
        spec = self._settings.layout(layout, sums=True)
        arrays, extras = self._allocate({name: np.empty(shape, dtype) for name, (dtype, shape) in spec.items()}, {})
        _weighted(self._context, parts, shares, self._settings, layout, out=arrays)
        return arrays, extras


def check_ciphertexts(update: Update, settings: HomomorphicCKKS, context: Any) -> None:
    """UpdateRefusedError unless every row is one fresh ciphertext with these parameters."""
    tenseal = need_tenseal()
    primes = len(settings.coeff_mod_bits) - 1
    for row in range(len(update.arrays[LENGTHS])):
        try:
            vector = tenseal.ckks_vector_from(context, _taken(update.arrays, row))
            (text,) = vector.ciphertext()
            good = (text.size(), text.coeff_modulus_size()) == (2, primes) and not text.is_transparent()
            good = good and text.scale == 2.0**settings.scale_bits and vector.size() <= settings.slots
        except (ValueError, RuntimeError, TypeError, AttributeError):
            good = False
        if not good:
            raise UpdateRefusedError(
                f"row {row} is no ciphertext with the parameters of this job",
                where=f"update of {update.site}, round {update.round}",
                fix="use the same parameters and version of TenSEAL at every site",
            )


def is_encrypted(arrays: Arrays) -> bool:
    """Whether these are the arrays of an encrypted model."""
    return VALUES in arrays


def named_in(settings: Settings) -> bool:
    return settings.get("name") == HomomorphicCKKS.__name__


def need_tenseal() -> Any:
    """The module; ConfigError where it is not installed."""
    try:
        import tenseal
    except ImportError:
        raise ConfigError(
            "HomomorphicCKKS needs the package tenseal, which is not installed here",
            where="filters",
            fix='pip install "fl-adapters[he]"',
        ) from None
    return tenseal


def _weighted(
    context: Any,
    parts: Sequence[Arrays],
    shares: Sequence[float],
    settings: HomomorphicCKKS,
    layout: Layout,
    out: Arrays | None = None,
) -> Arrays:
    """sum_i share_i * part_i, row by row, into `out`."""
    tenseal = need_tenseal()
    if out is None:
        out = {n: np.zeros(shape, dtype) for n, (dtype, shape) in settings.layout(layout, sums=True).items()}
    for row in range(len(out[LENGTHS])):
        total = None
        for part, share in zip(parts, shares, strict=True):
            term = tenseal.ckks_vector_from(context, _taken(part, row)) * share
            total = term if total is None else total + term
        assert total is not None
        _put(out[VALUES], out[LENGTHS], row, total.serialize())
    return out


def _put(values: Array, lengths: Array, row: int, data: bytes) -> None:
    if len(data) > values.shape[1]:
        raise ConfigError(
            f"a ciphertext has {len(data)} bytes, more than the {values.shape[1]} of its parameters",
            where="HomomorphicCKKS",
            fix="use the version of TenSEAL that the other sides use",
        )
    values[row, : len(data)] = np.frombuffer(data, np.uint8)
    values[row, len(data) :] = 0
    lengths[row] = len(data)


def _taken(arrays: Arrays, row: int) -> bytes:
    length = min(int(arrays[LENGTHS][row]), arrays[VALUES].shape[1])
    data: bytes = arrays[VALUES][row, :length].tobytes()
    return data


class _Stream:
    """The numbers of all tensors one after the other, as float64; zeros after the last."""

    def __init__(self, arrays: Arrays, layout: Layout) -> None:
        self._flat = [np.asarray(arrays[name]).reshape(-1) for name in layout]
        self._at = 0

    def next(self, count: int) -> Array:
        out, filled = np.zeros(count), 0
        while filled < count and self._flat:
            part = self._flat[0][self._at : self._at + count - filled]
            out[filled : filled + len(part)] = part
            filled, self._at = filled + len(part), self._at + len(part)
            if self._at >= len(self._flat[0]):
                self._flat.pop(0)
                self._at = 0
        return out


def _spread(rows: Any, targets: Sequence[Array]) -> None:
    """Deal out rows of numbers to flat arrays, in order."""
    rest = np.empty(0)
    for target in targets:
        filled = 0
        while filled < len(target):
            if not len(rest):
                rest = next(rows)
            part = rest[: len(target) - filled]
            target[filled : filled + len(part)] = part
            filled, rest = filled + len(part), rest[len(part) :]
