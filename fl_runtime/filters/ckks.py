"""The filter `HomomorphicCKKS`: the server averages encrypted weights that only the sites can decrypt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fl_runtime.errors import ConfigError, RoundFailedError, UpdateRefusedError
from fl_runtime.filters.base import AUX, FilterSettings, Layout, Point, check_number, is_real, refuse
from fl_runtime.types import Allocate, Array, Arrays, Settings, Update

VALUES, LENGTHS = f"ckks{AUX}values", f"ckks{AUX}lengths"
KEY_FILE = "ckks.key"
_MAX_BITS = {4096: 109, 8192: 218, 16384: 438, 32768: 881}
_PRIME_BITS, _EXACT_BITS = 60, 44
_HEADER_BYTES = 1024  # of a serialized ciphertext, besides its coefficients


@dataclass(frozen=True)
class HomomorphicCKKS(FilterSettings):
    """Encrypts the weights at the sites with CKKS, so that the server averages them without reading them.

    The weights of all tensors form one row of numbers, which is cut into ciphertexts ct. The server computes
    sum_i (n_i / N) ct_i, with n_i the weight of site i and N their sum. The sites decrypt the result.

    All sites hold one secret key: `ckks.key` in the startup kit, made by `fl-adapters ckks-key`. In a simulation the
    first site makes it. The server knows only the parameters. It sees numbers of examples, metrics, tensor names and
    shapes, but neither updates nor the model. A site that got hold of another site's ciphertexts could read them. The
    filter protects against the server only and does not replace `GaussianDP`, which may run before it.

    Only floating-point tensors travel; keep integers and booleans at the site with `keep_local`. A number takes
    2 (len(coeff_mod_bits) - 1) n 8 / (n / 2) bytes on the way up: 64 with the defaults, and 32 on the way down. The
    strategy must be `fedavg` without arguments. `Quantize`, `TopK`, `ExcludeVars` and all filters at the server are
    refused, since the server must read their result. Needs the extra `[he]` at the sites and at the server.

    Decrypted values must not go back to anyone who has the ciphertexts, because their rounding error reveals facts
    about the key (Li and Micciancio 2021, "On the security of homomorphic encryption on approximate numbers").

    Sources: Cheon, Kim, Kim, Song 2017, "Homomorphic encryption for arithmetic of approximate numbers"; TenSEAL
    (Benaissa et al. 2021) on Microsoft SEAL.

    Attributes:
        poly_modulus_degree: The degree n: 4096, 8192, 16384 or 32768. A ciphertext holds n / 2 numbers.
        coeff_mod_bits: Sizes of the primes in bits, at least three of 20 to 60 bits each. Their sum must leave 128 bits
            of security (for n = 8192 the Homomorphic Encryption Standard allows 218). The average takes one
            multiplication, so the primes in the middle must have `scale_bits` bits. The last must be the largest.
        scale_bits: Precision, from 44 to 60. Numbers must stay below 2^(first prime - scale_bits - 1), 512 with the
            defaults. The relative error of an average is about 1e-10 with 50 bits, and below 1e-6 with 44.

    Raises:
        ConfigError: If the parameters are out of range or do not fit together.
    """

    points: ClassVar[tuple[Point, ...]] = ("site_out",)
    poly_modulus_degree: int = 8192
    coeff_mod_bits: tuple[int, ...] = (60, 50, 60)
    scale_bits: int = 50

    def __post_init__(self) -> None:
        if self.poly_modulus_degree not in _MAX_BITS:
            degrees = ", ".join(map(str, _MAX_BITS))
            raise refuse(
                f"HomomorphicCKKS: poly_modulus_degree is {self.poly_modulus_degree!r}", f"use one of {degrees}"
            )
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
                f"HomomorphicCKKS: coeff_mod_bits of {sum(bits)} bits in all leave less than 128 bits of security",
                f"use at most {limit} bits with poly_modulus_degree {self.poly_modulus_degree}, or a larger degree",
            )
        if len(bits) < 3 or any(middle != self.scale_bits for middle in bits[1:-1]):
            raise refuse(
                f"HomomorphicCKKS: with primes of {bits} bits, an average at a scale of 2^{self.scale_bits} cannot be "
                "rescaled",
                f"use three primes or more, and give those in the middle {self.scale_bits} bits",
            )
        if bits[-1] < max(bits) or self.largest < 2:
            raise refuse(
                f"HomomorphicCKKS: primes of {bits} bits leave no room above a scale of 2^{self.scale_bits}",
                "make the first and the last prime the largest, and the first larger than scale_bits",
            )

    def settings(self) -> dict[str, Any]:
        """Return the name and the arguments as JSON holds them: `coeff_mod_bits` is a list."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in super().settings().items()}

    @property
    def largest(self) -> float:
        """Bound that the absolute values of all numbers must stay below."""
        return float(2.0 ** (self.coeff_mod_bits[0] - self.scale_bits - 1))

    @property
    def slots(self) -> int:
        """Count of numbers in one ciphertext."""
        return self.poly_modulus_degree // 2

    def layout(self, layout: Layout, *, sums: bool = False) -> Layout:
        """Return the layout of an encrypted model.

        Args:
            layout: Layout of the weights.
            sums: Whether it is an average made by the server, whose ciphertexts have one prime less.

        Returns:
            `ckks|values`, a row of bytes per ciphertext, and `ckks|lengths`, the used length of each row.
        """
        count = sum(math.prod(shape) for _, shape in layout.values())
        rows = max(1, -(-count // self.slots))
        primes = len(self.coeff_mod_bits) - 1 - sums
        width = 2 * primes * self.poly_modulus_degree * 8 + _HEADER_BYTES
        return {VALUES: (np.dtype(np.uint8), (rows, width)), LENGTHS: (np.dtype(np.uint32), (rows,))}

    def check_tensors(self, layout: Layout) -> None:
        """Check that all tensors are real floating-point tensors.

        Args:
            layout: Layout of the weights.

        Raises:
            ConfigError: If one is not; the message names it.
        """
        wrong = [name for name, (dtype, _) in layout.items() if not is_real(dtype)]
        if wrong:
            raise refuse(
                f"HomomorphicCKKS encrypts only floating-point tensors, but {wrong[0]!r} is {layout[wrong[0]][0]}",
                f"keep such tensors at the sites: keep_local={wrong[:4]!r}",
            )

    def public_context(self) -> Any:
        """Make a TenSEAL context with these parameters and without a secret key."""
        context = self.new_context()
        context.make_context_public()
        return context

    def new_context(self) -> Any:
        """Make a TenSEAL context with these parameters and new keys."""
        tenseal = need_tenseal()
        bits = list(self.coeff_mod_bits)
        context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, self.poly_modulus_degree, -1, bits)
        context.global_scale = 2.0**self.scale_bits
        return context


class Cipher:
    """Encrypts and decrypts the weights of one site.

    Args:
        settings: Parameters of the encryption.
        context: TenSEAL's context with the secret key.

    Attributes:
        settings: Parameters of the encryption.
    """

    def __init__(self, settings: HomomorphicCKKS, context: Any) -> None:
        self.settings, self._context = settings, context

    def encrypt(self, arrays: Arrays, layout: Layout) -> Arrays:
        """Encrypt weights.

        Args:
            arrays: Real and finite arrays, as named in `layout`.
            layout: Layout of the weights.

        Returns:
            The arrays of the encrypted model, see `HomomorphicCKKS.layout`.

        Raises:
            UpdateRefusedError: If a number is too large.
        """
        tenseal, slots = need_tenseal(), self.settings.slots
        spec = self.settings.layout(layout)
        values, lengths = (np.zeros(shape, dtype) for dtype, shape in spec.values())
        flat = _NumberStream(arrays, layout)
        for row in range(len(lengths)):
            part = flat.next(slots)
            largest = float(np.abs(part).max(initial=0.0))
            if largest >= self.settings.largest:
                raise UpdateRefusedError(
                    f"a weight of size {largest:.3g} cannot be encrypted: the limit is {self.settings.largest:g}",
                    where="HomomorphicCKKS",
                    fix="keep its tensor at the site with keep_local, or use a larger first prime or fewer scale_bits",
                )
            _put(values, lengths, row, tenseal.ckks_vector(self._context, part).serialize())
        return {VALUES: values, LENGTHS: lengths}

    def decrypt(self, arrays: Arrays, layout: Layout) -> dict[str, Array]:
        """Decrypt weights.

        Args:
            arrays: The arrays of an encrypted model.
            layout: Layout of the weights.

        Returns:
            New arrays of this layout.
        """
        tenseal = need_tenseal()
        decrypted = {name: np.empty(shape, dtype) for name, (dtype, shape) in layout.items()}
        targets = [array.reshape(-1) for array in decrypted.values()]
        rows = (
            np.asarray(tenseal.ckks_vector_from(self._context, _ciphertext(arrays, row)).decrypt())
            for row in range(len(arrays[LENGTHS]))
        )
        _fill(targets, rows)
        return decrypted

    def self_test(self) -> None:
        """Average two encrypted vectors and check the result.

        Raises:
            ConfigError: If its relative error exceeds 1e-7.
        """
        rng = np.random.default_rng(0)
        layout: Layout = {"w": (np.dtype(np.float64), (self.settings.slots,))}
        first, second = (rng.normal(size=self.settings.slots) * 0.05 for _ in range(2))
        public = self.settings.public_context()
        encrypted = [self.encrypt({"w": part}, layout) for part in (first, second)]
        mean = self.decrypt(_weighted(public, encrypted, [0.25, 0.75], self.settings, layout), layout)["w"]
        exact = 0.25 * first + 0.75 * second
        error = float(np.linalg.norm(mean - exact) / np.linalg.norm(exact))
        if error > 1e-7:
            raise refuse(
                f"HomomorphicCKKS: with these parameters and this key an average has a relative error of {error:.1e}",
                "use the key that was made for these parameters, and more scale_bits",
            )


class CiphertextMean:
    """The aggregator for encrypted updates: their weighted mean, ciphertext by ciphertext, in the order of `add`.

    The shares n_i / N are known only when all updates are there, so `result` reads the arrays given to `add`.

    Args:
        settings: Parameters of the encryption.
        context: TenSEAL's context without a secret key.
        allocate: Makes the arrays of the next global model.
    """

    def __init__(self, settings: HomomorphicCKKS, context: Any, allocate: Allocate) -> None:
        self._settings, self._context, self._allocate = settings, context, allocate
        self._updates: list[Update] = []

    def add(self, update: Update) -> None:
        """Take one encrypted update; its arrays must stay valid until `result` has returned."""
        self._updates.append(update)

    def result(self) -> tuple[Arrays, Arrays]:
        """Return (arrays, extras) of the encrypted mean; there are no extras.

        Raises:
            RoundFailedError: If the share of a site is too small for the precision of the encryption.
        """
        total = sum(update.weight for update in self._updates)
        shares = [update.weight / total for update in self._updates]
        for update, share in zip(self._updates, shares, strict=True):
            self._check_share(update, share)
        parts = [update.arrays for update in self._updates]
        rows = len(parts[0][LENGTHS])
        layout: Layout = {"w": (np.dtype(np.float64), (rows * self._settings.slots,))}
        spec = self._settings.layout(layout, sums=True)
        arrays, extras = self._allocate({name: np.empty(shape, dtype) for name, (dtype, shape) in spec.items()}, {})
        _weighted(self._context, parts, shares, self._settings, layout, out=arrays)
        return arrays, extras

    def _check_share(self, update: Update, share: float) -> None:
        """Refuse a share that CKKS, which multiplies by a whole number of units of 2^-scale_bits, would round to 0."""
        bits = self._settings.scale_bits
        if share < 2.0 ** -(bits + 1):
            raise RoundFailedError(
                f"site {update.site} has a share of {share:.2g} in the average, and HomomorphicCKKS cannot multiply by "
                f"less than 2^-{bits + 1} with scale_bits={bits}",
                fix="bring the sites' numbers of examples and site_weights closer together, for example with the "
                "filter Examples",
            )


def check_ciphertexts(update: Update, settings: HomomorphicCKKS, context: Any) -> None:
    """Check the ciphertexts of an update.

    Args:
        update: The update.
        settings: Parameters of the encryption.
        context: TenSEAL's context without a secret key.

    Raises:
        UpdateRefusedError: If a row is not a single, freshly encrypted ciphertext with these parameters.
    """
    tenseal = need_tenseal()
    primes = len(settings.coeff_mod_bits) - 1
    for row in range(len(update.arrays[LENGTHS])):
        try:
            vector = tenseal.ckks_vector_from(context, _ciphertext(update.arrays, row))
            (text,) = vector.ciphertext()
            valid = (text.size(), text.coeff_modulus_size()) == (2, primes) and not text.is_transparent()
            valid = valid and text.scale == 2.0**settings.scale_bits and vector.size() <= settings.slots
        except (ValueError, RuntimeError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise UpdateRefusedError(
                f"row {row} is not a ciphertext with the parameters of this job",
                where=f"update of {update.site}, round {update.round}",
                fix="install the same version of TenSEAL at every site",
            )


def is_encrypted(arrays: Arrays) -> bool:
    """Whether arrays are those of an encrypted model."""
    return VALUES in arrays


def named_in(settings: Settings) -> bool:
    """Whether settings are those of `HomomorphicCKKS`."""
    return settings.get("name") == HomomorphicCKKS.__name__


def need_tenseal() -> Any:
    """Import the package `tenseal`.

    Returns:
        The module.

    Raises:
        ConfigError: If it is not installed; the message names the extra `[he]`.
    """
    try:
        import tenseal
    except ImportError:
        raise ConfigError(
            "HomomorphicCKKS needs the package tenseal, which is not installed",
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
    """Write sum_i share_i * part_i into `out`, row by row."""
    tenseal = need_tenseal()
    if out is None:
        out = {n: np.zeros(shape, dtype) for n, (dtype, shape) in settings.layout(layout, sums=True).items()}
    for row in range(len(out[LENGTHS])):
        total = None
        for part, share in zip(parts, shares, strict=True):
            term = tenseal.ckks_vector_from(context, _ciphertext(part, row)) * share
            total = term if total is None else total + term
        assert total is not None
        _put(out[VALUES], out[LENGTHS], row, total.serialize())
    return out


def _put(values: Array, lengths: Array, row: int, data: bytes) -> None:
    if len(data) > values.shape[1]:
        raise ConfigError(
            f"a ciphertext has {len(data)} bytes, more than the {values.shape[1]} expected for its parameters",
            where="HomomorphicCKKS",
            fix="install the same version of TenSEAL at the server and at every site",
        )
    values[row, : len(data)] = np.frombuffer(data, np.uint8)
    values[row, len(data) :] = 0
    lengths[row] = len(data)


def _ciphertext(arrays: Arrays, row: int) -> bytes:
    length = min(int(arrays[LENGTHS][row]), arrays[VALUES].shape[1])
    data: bytes = arrays[VALUES][row, :length].tobytes()
    return data


class _NumberStream:
    """The numbers of all tensors one after the other, as float64, followed by zeros."""

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


def _fill(targets: Sequence[Array], rows: Any) -> None:
    """Fill flat arrays with the numbers in rows, in order."""
    rest = np.empty(0)
    for target in targets:
        filled = 0
        while filled < len(target):
            if not len(rest):
                rest = next(rows)
            part = rest[: len(target) - filled]
            target[filled : filled + len(part)] = part
            filled, rest = filled + len(part), rest[len(part) :]
