"""Averages of encrypted weights equal plain averages, and the server cannot read them."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fl_adapters as fl
from fl_adapters.participant.kit import read_kit
from fl_adapters.testing import LocalFederation, Place
from fl_runtime.aggregation import CoordinateMedian, FedAvg
from fl_runtime.aggregation.shares import within_cap
from fl_runtime.errors import ConfigError, HandshakeError, RoundFailedError, UpdateRefusedError
from fl_runtime.filters import check_filters
from fl_runtime.filters.base import FilterHost
from fl_runtime.filters.ckks import LENGTHS, VALUES, Cipher, CiphertextMean, HomomorphicCKKS, check_ciphertexts
from fl_runtime.filters.ckks_key import make_key, read_key
from fl_runtime.filters.site import SiteFilters
from fl_runtime.store.tensorfile import read_tensors
from fl_runtime.types import Array, Arrays, Task, Update

tenseal = pytest.importorskip("tenseal")

HE: dict[str, Any] = {"name": "HomomorphicCKKS"}
LAYOUT = {
    "w": (np.dtype(np.float32), (130, 70)),
    "h": (np.dtype(ml_dtypes.bfloat16), (600,)),
    "none": (np.dtype(np.float32), (0,)),
    "b": (np.dtype(np.float64), ()),
}


def arrays(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape) * 0.05).astype(dtype) for name, (dtype, shape) in LAYOUT.items()}


def allocate(given: Arrays, extras: Arrays) -> tuple[Arrays, Arrays]:
    return {name: np.empty_like(array) for name, array in given.items()}, {}


def update(content: Arrays, num_examples: int, site: str = "site-1") -> Update:
    return Update("job", 1, "", site, 1, 0, content, num_examples, content="encoded")


@pytest.fixture(scope="module")
def settings() -> HomomorphicCKKS:
    return HomomorphicCKKS()


@pytest.fixture(scope="module")
def cipher(settings: HomomorphicCKKS) -> Cipher:
    return Cipher(settings, settings.new_context())


def mean_of(cipher: Cipher, parts: list[Arrays], examples: list[int]) -> Arrays:
    server = CiphertextMean(cipher.settings, cipher.settings.public_context(), allocate)
    for part, count in zip(parts, examples, strict=True):
        server.add(update(part, count))
    return server.result()[0]


def distance(found: Arrays, wanted: Arrays) -> float:
    """Return the relative L2 distance over all tensors."""

    def total(of: Callable[[str], Any]) -> float:
        return math.sqrt(sum(float(np.sum(np.asarray(of(name), np.float64) ** 2)) for name in wanted))

    return total(lambda n: found[n].astype(np.float64) - wanted[n]) / total(lambda n: wanted[n])


# -- the mean ------------------------------------------------------------------------------------------------


def test_a_weighted_mean_equals_the_plain_one(cipher: Cipher) -> None:
    examples = [1, 40_000, 977, 3]
    parts = [{name: a.astype(np.float64) for name, a in arrays(seed).items()} for seed in range(4)]
    wide = {name: (np.dtype(np.float64), shape) for name, (_, shape) in LAYOUT.items()}
    found = cipher.decrypt(mean_of(cipher, [cipher.encrypt(p, wide) for p in parts], examples), wide)
    wanted = {n: sum(e * p[n] for e, p in zip(examples, parts, strict=True)) / sum(examples) for n in wide}
    assert distance(found, wanted) < 1e-9  # the promise is 1e-6


def test_a_weighted_mean_keeps_to_a_cap_on_shares(cipher: Cipher) -> None:
    parts, examples = [arrays(seed) for seed in range(3)], [3, 1, 10**9]
    updates = [update(cipher.encrypt(p, LAYOUT), n, f"s{n}") for p, n in zip(parts, examples, strict=True)]
    capped, names = within_cap(updates, FedAvg().weights_of(updates), 0.4)
    server = CiphertextMean(cipher.settings, cipher.settings.public_context(), allocate)
    for item in capped:
        server.add(item)
    found = cipher.decrypt(server.result()[0], LAYOUT)
    wanted = {n: sum(s * p[n].astype(np.float64) for s, p in zip((0.4, 0.2, 0.4), parts, strict=True)) for n in LAYOUT}
    assert names == ("s1000000000",)
    assert distance(found, wanted) < 1e-3  # of bfloat16, in which one of the tensors is


def test_one_packing_over_all_tensors(settings: HomomorphicCKKS, cipher: Cipher) -> None:
    total = 130 * 70 + 600 + 1
    encrypted = cipher.encrypt(arrays(0), LAYOUT)
    assert {n: (a.dtype, a.shape) for n, a in encrypted.items()} == settings.layout(LAYOUT)
    assert len(encrypted[LENGTHS]) == math.ceil(total / 4096)
    back = cipher.decrypt(encrypted, LAYOUT)
    assert {n: (a.dtype, a.shape) for n, a in back.items()} == LAYOUT
    assert all(np.allclose(back[n].astype(float), a.astype(float), atol=1e-9) for n, a in arrays(0).items())


def test_the_same_updates_in_the_same_order_give_the_same_bits(cipher: Cipher) -> None:
    parts = [cipher.encrypt(arrays(seed), LAYOUT) for seed in range(3)]
    assert len({mean_of(cipher, parts, [1, 2, 3])[VALUES].tobytes() for _ in range(2)}) == 1


def test_what_is_too_large_for_the_parameters_is_refused(cipher: Cipher) -> None:
    with pytest.raises(UpdateRefusedError, match="the limit is 512"):
        cipher.encrypt({"w": np.array([512.0])}, {"w": (np.dtype(np.float64), (1,))})
    near = cipher.encrypt({"w": np.array([511.0, -511.0])}, {"w": (np.dtype(np.float64), (2,))})
    found = cipher.decrypt(mean_of(cipher, [near, near], [1, 1]), {"w": (np.dtype(np.float64), (2,))})["w"]
    np.testing.assert_allclose(found, [511, -511], rtol=1e-9)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"poly_modulus_degree": 1000}, "poly_modulus_degree is 1000"),
        ({"coeff_mod_bits": [60, 60]}, "cannot be rescaled"),
        ({"coeff_mod_bits": [60, 40, 60]}, "cannot be rescaled"),
        ({"coeff_mod_bits": [60, 40, 60], "scale_bits": 40}, "scale_bits is 40"),
        ({"coeff_mod_bits": [60, 50, 50, 60]}, "less than 128 bits of security"),
        ({"coeff_mod_bits": [51, 50, 51]}, "leave no room"),
        ({"coeff_mod_bits": [60, 50, 55]}, "leave no room"),
        ({"coeff_mod_bits": "many"}, "coeff_mod_bits is 'many'"),
        ({"poly_modulus_degree": 4096}, "use at most 109 bits with poly_modulus_degree 4096"),
    ],
)
def test_parameters_without_the_depth_the_precision_or_the_security_are_refused(
    changed: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        check_filters([{**HE, **changed}])


def test_a_larger_ring_with_a_prime_to_spare_works_too() -> None:
    settings = HomomorphicCKKS(poly_modulus_degree=16384, coeff_mod_bits=(60, 46, 46, 60), scale_bits=46)
    Cipher(settings, settings.new_context()).self_test()


@pytest.mark.parametrize("bits", [[60, 48, 60], (60, 48, 60)])
def test_a_run_with_parameters_of_ones_own_equals_the_plain_one(bits: Any) -> None:
    own = {**HE, "coeff_mod_bits": bits, "scale_bits": 48}
    with LocalFederation(sites=2, rounds=2) as federation:
        plain = federation.run(loop)["site-1"]
    with LocalFederation(sites=2, rounds=2, filters=(own,)) as federation:
        found = federation.run(loop)["site-1"]
        federation.result()
    assert distance({"w": found["w"]}, {"w": plain["w"].astype(np.float64)}) < 1e-6


@pytest.mark.parametrize(("degree", "bits", "scale"), [(8192, (60, 50, 60), 50), (16384, (60, 46, 46, 60), 46)])
def test_a_share_that_would_be_rounded_to_0_is_refused_by_name(degree: int, bits: tuple[int, ...], scale: int) -> None:
    settings = HomomorphicCKKS(degree, bits, scale)
    cipher, layout = Cipher(settings, settings.new_context()), {"w": (np.dtype(np.float64), (settings.slots,))}
    values = [np.random.default_rng(seed).normal(size=settings.slots) for seed in (1, 2)]
    encrypted = [cipher.encrypt({"w": value}, layout) for value in values]

    def mean(examples: int) -> Array:
        aggregator = CiphertextMean(settings, settings.public_context(), allocate)
        aggregator.add(update(encrypted[0], 1))
        aggregator.add(update(encrypted[1], examples, "site-2"))
        return cipher.decrypt(aggregator.result()[0], layout)["w"]

    largest = 2 ** (scale + 1) - 1  # the first share is then exactly 2^-(scale_bits + 1)
    share = Fraction(1, largest + 1)
    np.testing.assert_allclose(mean(largest), float(share) * values[0] + float(1 - share) * values[1], atol=1e-6)
    with pytest.raises(RoundFailedError, match=r"site site-1 has a share of .* HomomorphicCKKS"):
        mean(2 ** (scale + 2))


@pytest.mark.parametrize(
    ("others", "text"),
    [
        ([{"name": "Quantize"}], "Quantize at site_out"),
        ([{"name": "TopK"}], "TopK at site_out"),
        ([{"name": "ExcludeVars", "names": ["w"]}], "ExcludeVars at site_out"),
        ([{"name": "GaussianDP", "noise_multiplier": 1.0, "at": "server_in"}], "GaussianDP at server_in"),
        ([{"name": "Quantize", "at": "server_out"}], "Quantize at server_out"),
        ([HE], "HomomorphicCKKS at site_out"),
    ],
)
def test_filters_that_need_plaintext_are_refused(others: list[dict[str, Any]], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_filters([HE, *others])


def test_strategies_that_need_plaintext_are_refused_when_the_job_is_built() -> None:
    check_filters([HE], None, FedAvg())
    with pytest.raises(ConfigError, match="CoordinateMedian needs the updates themselves"):
        check_filters([HE], None, CoordinateMedian())
    with pytest.raises(ConfigError, match="CoordinateMedian needs the updates themselves"):
        fl.Job(app="train.py", strategy="median", sites=3, filters=(HE,))
    with pytest.raises(ConfigError, match="moments"):
        check_filters([HE], "average")
    with pytest.raises(ConfigError, match="control variates"):
        fl.Job(app="train.py", strategy="scaffold", filters=({"name": "GaussianDP", "noise_multiplier": 1.0},))


def test_what_a_site_alone_cannot_decide_or_encrypt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ask for it in the job"):
        SiteFilters([], [HE], FilterHost())
    with pytest.raises(ConfigError, match="leave out Quantize or HomomorphicCKKS"):
        SiteFilters([HE], [{"name": "Quantize"}], FilterHost())
    with pytest.raises(ConfigError, match="keep_local=.'steps'"):
        SiteFilters([HE], [], FilterHost()).agree({"w": np.zeros(3), "steps": np.array(1)})


# -- the key -------------------------------------------------------------------------------------------------


def test_the_key_is_for_its_owner_alone_and_never_overwritten(tmp_path: Path, settings: HomomorphicCKKS) -> None:
    path = tmp_path / "kit" / "ckks.key"
    fingerprint = make_key(path, settings)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key(path, settings)[1] == fingerprint
    with pytest.raises(ConfigError, match="this file exists already"):
        make_key(path, settings)
    with pytest.raises(ConfigError, match="the job asks for"):
        read_key(path, HomomorphicCKKS(coeff_mod_bits=(60, 48, 60), scale_bits=48))
    os.chmod(path, 0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        read_key(path, settings)
    for content in (b"", path.read_bytes()[:2000], b"x" * 4000):
        broken = tmp_path / "broken"
        broken.write_bytes(content)
        broken.chmod(0o600)
        with pytest.raises(ConfigError, match="not a key"):
            read_key(broken, settings)
    with pytest.raises(ConfigError, match="fl-adapters ckks-key"):
        read_key(tmp_path / "nothing", settings)


# -- whole runs ----------------------------------------------------------------------------------------------


def loop(place: Place) -> Arrays:
    with fl.connect(kit=place.kit) as site:
        for task in site.tasks(initial=arrays(77)):
            moved = {n: np.asarray(a + arrays(place.index)[n]).astype(a.dtype) for n, a in task.arrays.items()}
            task.submit(moved, num_examples=3 + 4 * place.index, metrics={"loss": 1.0 / task.round})
        return site.arrays


def test_a_run_equals_the_plain_one_and_the_server_cannot_read_it(tmp_path: Path) -> None:
    with LocalFederation(sites=3, rounds=3, folder=tmp_path / "plain") as federation:
        plain = federation.run(loop)["site-1"]
    with LocalFederation(sites=3, rounds=3, folder=tmp_path / "run", sockets=True, filters=(HE,)) as federation:
        found = federation.run(loop)
        federation.result()
        state = federation.server.trainings.newest.run.state
        assert state.models.newest is not None
        held, context = state.models.newest.blob.views()[0], state.filters._context
    for final in found.values():
        assert {n: (a.dtype, a.shape) for n, a in final.items()} == LAYOUT
        real = {n: a for n, a in final.items() if n != "h"}  # bfloat16 rounds to 2^-8
        assert distance(real, {n: plain[n].astype(np.float64) for n in real}) < 1e-6
        np.testing.assert_allclose(final["h"].astype(float), plain["h"].astype(float), rtol=0.02, atol=0.002)
    saved = read_tensors(tmp_path / "run" / "model" / "model.safetensors")  # by a site, since the server cannot
    assert all(saved[n].tobytes() == a.tobytes() for n, a in found["site-1"].items())
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()

    # what the server has: its files, its context, its events, what passed through it
    assert context.is_public() and not context.is_private()
    text = held[VALUES][0, : held[LENGTHS][0]].tobytes()
    vector = tenseal.ckks_vector_from(context, text)
    with pytest.raises(ValueError, match="secret_key"):
        vector.decrypt()
    wanted = np.concatenate([a.reshape(-1).astype(np.float64) for a in found["site-1"].values()])[:4096]
    other = HomomorphicCKKS().new_context()  # a key of its own, with the same parameters
    try:
        guess = np.array(tenseal.ckks_vector_from(other, text).decrypt())
    except (ValueError, RuntimeError):
        guess = np.full(len(wanted), np.inf)
    assert not np.linalg.norm(guess - wanted) < 1e3 * np.linalg.norm(wanted)

    key, _ = read_key(tmp_path / "run" / "sites" / "ckks.key", HomomorphicCKKS())
    np.testing.assert_allclose(tenseal.ckks_vector_from(key, text).decrypt()[: len(wanted)], wanted, atol=0.01)
    secret = (tmp_path / "run" / "sites" / "ckks.key").read_bytes()
    files = [path for path in (tmp_path / "run" / "server").rglob("*") if path.is_file()]
    pieces = [secret[at : at + 32] for at in range(1000, len(secret) - 32, 9_000)]
    pieces += [found["site-1"]["w"][row, :8].tobytes() for row in range(0, 130, 10)]
    everything = b"".join(path.read_bytes() for path in files)
    assert len(everything) > 5 * 10**5  # the models; updates are deleted at the end of a run
    assert not [piece for piece in pieces if piece in everything]
    assert secret.hex()[-64:] not in json.dumps([e.data for e in federation.events], default=str)


def test_noise_may_come_before_encryption() -> None:
    pytest.importorskip("dp_accounting")
    dp = {"name": "GaussianDP", "clip": 0.5, "noise_multiplier": 1e-6}
    with LocalFederation(sites=2, rounds=1, filters=(dp, HE)) as federation:
        found = federation.run(loop)["site-1"]
        (ran, _) = [e.data["filters"] for e in federation.events if e.kind == "update"]
    assert [item["name"] for item in ran] == ["GaussianDP", "HomomorphicCKKS"] and "spent" in ran[0]
    parts = [{n: a.astype(np.float64) for n, a in arrays(seed).items()} for seed in (0, 1)]
    norms = [math.sqrt(sum(float((a**2).sum()) for a in part.values())) for part in parts]
    wanted = arrays(77)["w"] + sum(
        share * 0.5 / norm * part["w"] for share, norm, part in zip((0.3, 0.7), norms, parts, strict=True)
    )
    np.testing.assert_allclose(found["w"], wanted, atol=2e-4)


def test_sites_with_different_keys_are_refused_before_round_1(tmp_path: Path) -> None:
    with LocalFederation(sites=2, rounds=1, filters=(HE,), folder=tmp_path) as federation:
        for place in federation.places:
            replace(read_kit(place.kit), simulated=False).save(Path(place.kit))
            make_key(Path(place.kit) / "ckks.key", HomomorphicCKKS())
        outcomes = federation.outcomes({"site-1": loop, "site-2": loop}, check=False)
    for outcome in outcomes.values():
        assert isinstance(outcome.error, HandshakeError) and "ckks_key" in str(outcome.error)


# -- liars ---------------------------------------------------------------------------------------------------


def test_what_is_no_fresh_ciphertext_of_these_parameters_is_refused(settings: HomomorphicCKKS, cipher: Cipher) -> None:
    context = settings.public_context()
    honest = cipher.encrypt(arrays(0), LAYOUT)
    check_ciphertexts(update(honest, 1), settings, context)

    def row(data: bytes) -> Arrays:
        values, lengths = honest[VALUES].copy(), honest[LENGTHS].copy()
        values[1, : len(data)] = np.frombuffer(data, np.uint8)
        lengths[1] = len(data)
        return {VALUES: values, LENGTHS: lengths}

    other = settings.new_context()
    other.global_scale = 2.0**40
    small = HomomorphicCKKS(coeff_mod_bits=(60, 48, 60), scale_bits=48).new_context()
    good = honest[VALUES][1, : honest[LENGTHS][1]].tobytes()
    used = (tenseal.ckks_vector_from(context, good) * 0.5).serialize()
    lies = {
        "nothing": b"",
        "noise": b"\7" * 5000,
        "cut off": good[:-7],
        "another scale": tenseal.ckks_vector(other, [1.0] * 4096).serialize(),
        "other parameters": tenseal.ckks_vector(small, [1.0] * 4096).serialize(),
        "a used one": used,
        "two": tenseal.ckks_vector(cipher._context, [0.0] * 4097).serialize()[: honest[VALUES].shape[1]],
    }
    taken = []
    for name, data in lies.items():
        with contextlib.suppress(UpdateRefusedError):
            check_ciphertexts(update(row(data), 1), settings, context)
            taken.append(name)
    assert taken == []
    huge = {VALUES: honest[VALUES], LENGTHS: np.full_like(honest[LENGTHS], 2**32 - 1)}
    with contextlib.suppress(UpdateRefusedError):  # a length that lies is cut to the row
        check_ciphertexts(update(huge, 1), settings, context)
    changed = good[:900] + b"\xff" * 64 + good[964:]  # nonsense, which may be a ciphertext all the same: of nonsense
    with contextlib.suppress(UpdateRefusedError):
        check_ciphertexts(update(row(changed), 1), settings, context)


def test_a_plain_update_in_an_encrypted_run_is_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    from fl_runtime.client import SiteClient
    from fl_runtime.server import Server
    from fl_runtime.transport.memory import MemoryTransport
    from fl_runtime.types import RunSettings
    from fl_runtime.wire.manifest import Manifest

    names = ("site-1", "site-2")
    server = Server(RunSettings("test", names, 2, rounds=1, filters=(HE,)), tmp_path, {})
    server.begin()
    home = FilterHost("", "test", None, shared=tmp_path / "sites")
    clients = {name: SiteClient(MemoryTransport(server.service, name), 30.0) for name in names}
    filters = {name: SiteFilters((HE,), (), home) for name in names}
    attempts = {name: client.join().attempt for name, client in clients.items()}

    def register(name: str) -> None:
        filters[name].agree(arrays(0))
        clients[name].register(
            Manifest.of(arrays(0)),
            agreement=filters[name].agreement,
            info={},
            capabilities=frozenset(),
            rounds=0,
            evaluates=False,
        )

    threads = [threading.Thread(target=register, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def made(name: str, task: Task, content: Arrays) -> Update:
        return Update("test", task.round, "", name, attempts[name], task.version, content, 1)

    start = clients["site-1"].next_task()
    with pytest.raises(UpdateRefusedError, match="not encrypted|is encrypted with"):
        clients["site-1"].submit(made("site-1", start, arrays(0)))
    clients["site-1"].submit(filters["site-1"].initial(made("site-1", start, arrays(0))))
    for name in itertools.chain(names):
        task = filters[name].received(clients[name].next_task())
        plain = made(name, task, arrays(3))
        with pytest.raises(UpdateRefusedError):
            clients[name].submit(plain)
        honest = filters[name].outgoing(plain, task)
        spoilt = {**honest.arrays, VALUES: honest.arrays[VALUES] ^ np.uint8(1)}
        with pytest.raises(UpdateRefusedError, match="not a ciphertext"):
            clients[name].submit(replace(honest, arrays=spoilt))
        assert clients[name].submit(honest) == "used"
    final = filters["site-2"].received(clients["site-2"].next_task())
    assert final.kind == "final"
    assert distance(final.arrays, {"w": arrays(3)["w"]}) < 1e-6
    server.close()
