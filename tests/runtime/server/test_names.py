"""Lists of names (labels, vocabularies) are compared at the handshake, and a difference is told in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from federation_bench import Bench, errors_at_once, registered, serving

from fl_runtime.errors import FederationError, HandshakeError, ProtocolError, StateMismatchError
from fl_runtime.server.registration import Registration
from fl_runtime.types import Arrays
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest
from fl_runtime.wire.names import Facts, Names, NamesDigest, names_of

WEIGHTS: Arrays = {"w": np.zeros(3, np.float32)}
LABELS = ("negative", "neutral", "positive")
VOCABULARY = [f"token-{i}" for i in range(100_000)]


def register(bench: Bench, each: list[Facts], weights: list[Arrays] | None = None) -> list[BaseException | None]:
    """Register a site for each entry, and return the error that each gets."""
    sites = [bench.site(name) for name in bench.names]
    for site in sites:
        site.join()
    states = weights or [WEIGHTS] * len(each)
    return errors_at_once(range(len(each)), lambda i: sites[i].register(states[i], **each[i]))


@pytest.mark.parametrize("sockets", [True, False])
@pytest.mark.parametrize(
    ("mine", "other", "told"),
    [
        (LABELS, LABELS[::-1], "labels: 0: 'negative' != 'positive', 2: 'positive' != 'negative'"),
        (LABELS, LABELS[:2], "labels: 3 entries != 2 entries; 2: 'positive' != missing"),
        (["7"], ["8"], "labels: '7' != '8'"),
        (list("abcdefgh"), list("hgfedcba"), "labels: 0: 'a' != 'h', 1: 'b' != 'g', 2: 'c' != 'f', 3: 'd' != 'e', and"),
    ],
)
def test_labels_in_another_order_are_refused_before_round_1(
    tmp_path: Path, *, sockets: bool, mine: list[str], other: list[str], told: str
) -> None:
    with serving(tmp_path, 3, sockets=sockets) as bench:
        for error in register(bench, [{"labels": names_of(entries)} for entries in (mine, mine, other)]):
            assert isinstance(error, HandshakeError)
            assert not isinstance(error, StateMismatchError)
            assert "site-1 and site-3 do not agree" in error.what
            assert told in error.what
            assert "before round 1" in error.where
            assert "agree=False" in error.fix
        assert not bench.watch.all("round_started")


def test_two_swapped_tokens_of_a_large_vocabulary_are_told_in_words(tmp_path: Path) -> None:
    swapped = [*VOCABULARY]
    swapped[64_321], swapped[64_322] = swapped[64_322], swapped[64_321]
    lists = [Names(tuple(VOCABULARY)), Names(tuple(swapped))]
    message = NamesDigest.of(lists[0]).to_proto("vocabulary").SerializeToString()
    assert len(message) < 10_000  # of 1.2 MB
    with serving(tmp_path, 2) as bench:
        for error in register(bench, [{"vocabulary": names} for names in lists]):
            assert isinstance(error, HandshakeError)
            assert "vocabulary: 100000 entries each; 64321: 'token-64321' != 'token-64322'" in error.what


def test_an_added_token_is_told(tmp_path: Path) -> None:
    with serving(tmp_path, 2, sockets=False) as bench:
        lists = names_of(VOCABULARY[:50_257]), names_of([*VOCABULARY[:50_257], "<pad>"])
        error, _ = register(bench, [{"vocabulary": names} for names in lists])
    assert "vocabulary: 50257 entries != 50258 entries; 50257: missing != '<pad>'" in str(error)


def test_entries_from_data_do_not_leave_their_site(tmp_path: Path) -> None:
    secret = [f"patient {i}" for i in range(200)]
    mine, other = names_of(secret, from_data=True), names_of([*secret[:150], "x", *secret[151:]], from_data=True)
    message = NamesDigest.of(mine).to_proto("words")
    assert not message.entries
    assert message.block >= 64  # the digest of a single entry could be guessed
    with serving(tmp_path, 2) as bench:
        error, _ = register(bench, [{"words": mine}, {"words": other}])
    assert "words: the first that differ are among 128 to 191" in str(error)
    assert "patient" not in str(error)


def test_a_site_without_a_list_may_join_those_that_have_it(tmp_path: Path) -> None:
    with serving(tmp_path, 3) as bench:
        assert register(bench, [{}, {"labels": names_of(LABELS)}, {"labels": names_of(LABELS)}]) == [None] * 3


def test_lists_are_compared_with_the_first_site_that_has_one(tmp_path: Path) -> None:
    with serving(tmp_path, 3) as bench:
        errors = register(bench, [{}, {"labels": names_of("ab")}, {"labels": names_of("ba")}])
    assert all("site-2 and site-3 do not agree (site-2 != site-3)" in str(error) for error in errors)


def test_labels_explain_a_head_of_another_size(tmp_path: Path) -> None:
    heads: list[Arrays] = [{"head": np.zeros(3, np.float32)}, {"head": np.zeros(2, np.float32)}]
    with serving(tmp_path, 2) as bench:
        error, _ = register(bench, [{"labels": names_of(LABELS)}, {"labels": names_of(LABELS[:2])}], heads)
    assert isinstance(error, StateMismatchError)
    assert "2: 'positive' != missing" in error.what and "head: float32[3] != float32[2]" in error.what


def test_a_site_that_comes_late_is_compared_too(tmp_path: Path) -> None:
    with serving(tmp_path, 2, min_sites=1) as bench:
        sites = [bench.site(name) for name in bench.names]
        registered(sites, WEIGHTS, labels=names_of(LABELS))
        again = bench.site("site-2")
        again.join()
        with pytest.raises(HandshakeError, match="'negative' != 'positive'"):
            again.register(WEIGHTS, labels=names_of(LABELS[::-1]))


def test_a_restarted_server_knows_the_lists_of_its_sites() -> None:
    names = {"words": NamesDigest.of(names_of(VOCABULARY[:3_000], from_data=True))}
    registration = Registration(b"layout", {}, {}, frozenset(), 1, evaluates=False, names=names)
    assert Registration.from_json(json.loads(json.dumps(registration.to_json()))) == registration


def test_a_server_without_the_feature_gets_texts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_runtime.server.calls.service.FEATURE_NAMES", ("beats",))  # as version 0.1.0 answered
    with serving(tmp_path, 2) as bench:
        assert register(bench, [{"labels": names_of("ab")}, {"labels": names_of("ba")}]) == [None, None]


@pytest.mark.parametrize(
    "broken",
    [
        {"count": 2, "block": 0, "block_digests": b"", "digest": bytes(16)},
        {"count": 2, "block": 1, "block_digests": bytes(8), "digest": bytes(16)},
        {"count": 2**20, "block": 1, "block_digests": bytes(2**23), "digest": bytes(16)},
        {"count": 1, "block": 1, "block_digests": bytes(8), "digest": bytes(15)},
        {"count": 1, "block": 1, "block_digests": bytes(8), "digest": bytes(16), "entries": ["x" * 5_000]},
    ],
)
def test_broken_lists_are_refused(broken: dict[str, object]) -> None:
    with pytest.raises(ProtocolError, match="list of names"):
        NamesDigest.from_proto(pb.NameList(name="labels", **broken))  # type: ignore[arg-type]


def large_model() -> Arrays:
    name = "model.language_model.layers.{}.self_attn.rotary.query_projection.lora_A.default.weight"
    return {name.format(i): np.zeros(1, np.float32) for i in range(100_000)}


def test_a_model_of_100_000_tensors_is_registered(tmp_path: Path) -> None:
    weights = large_model()
    whole = pb.RegisterRequest(manifest=Manifest.of(weights).to_proto())
    assert whole.ByteSize() > 8 * 2**20  # more than gRPC takes in one message
    with serving(tmp_path, 1, rounds=1) as bench:
        site = bench.site("site-1")
        site.join()
        assert site.register(weights, labels=names_of(LABELS)) == 1
        assert bench.watch.wait("registered").data["tensors"] == 100_000


def test_an_old_server_that_cannot_take_so_many_tensors_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_runtime.server.calls.service.FEATURE_NAMES", ("beats",))  # as version 0.1.0 answered
    with serving(tmp_path, 1, rounds=1) as bench:
        site = bench.site("site-1")
        site.join()
        with pytest.raises(ProtocolError, match="too large for gRPC") as error:
            site.register(large_model())
    assert "newer ones register models of any number of tensors" in error.value.fix


@pytest.mark.parametrize("fault", ["no tensors", "too many", "an end"])
def test_a_registration_in_parts_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr("fl_runtime.wire.manifest.MAX_TENSORS", 3)
    tensors = {"no tensors": [], "too many": [pb.Tensor(name=f"t{i}", dtype="float32") for i in range(2)]}
    with serving(tmp_path, 1, sockets=False) as bench:
        site = bench.site("site-1")
        session = pb.Session(job="test", attempt=site.join().attempt)
        first = Manifest.of({"a": np.zeros(1), "b": np.zeros(1)}).to_proto()
        parts = [pb.RegisterRequest(session=session, manifest=first, more=True)]
        if fault in tensors:
            parts.append(pb.RegisterRequest(manifest=pb.Manifest(tensors=tensors[fault]), more=True))
        with pytest.raises(FederationError):
            list(site.transport.call("Register", iter(part.SerializeToString() for part in parts)))
        assert not bench.watch.all("registered")
