"""A hostile server, colluding sites and broken messages: a site keeps its rules, and nobody opens another's secrets."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from secure_sums import CONTEXT, Sums

from fl_runtime.errors import ConfigError, PermissionDeniedError, ProtocolError, RoundFailedError
from fl_runtime.secure_sum import Context, Ring, ServerSums, SiteSums, SumRules
from fl_runtime.secure_sum.masks import add_masks
from fl_runtime.secure_sum.messages import RevealMessage, SharesMessage
from fl_runtime.secure_sum.shamir import combine

RING = Ring(64, 16)
NAMES = ["a", "b", "c", "d", "e"]


def vectors() -> dict[str, dict[str, Any]]:
    return {name: {"w": RING.encode(np.arange(4.0))} for name in NAMES}


def masked(round: int = 1, stage: str = "update", rules: SumRules | None = None) -> Sums:
    """Five sites that have masked their vectors."""
    sums = Sums(NAMES, rules or SumRules())
    sums.begin(round, stage)
    sums.mask(vectors(), RING)
    return sums


def test_other_survivors_for_other_sites_open_nothing() -> None:
    sums = masked()
    first, second = NAMES, NAMES[:4]
    signed = {name: sums.sites[name].agree(1, "update", first if name in "abc" else second) for name in NAMES}
    for site in sums.sites.values():
        with pytest.raises(PermissionDeniedError, match=r"holders must have signed the same survivors.*something else"):
            site.reveal(1, "update", signed)


@pytest.mark.parametrize("for_all", range(6))
def test_signing_all_and_then_fewer_opens_one_sum_at_most(for_all: int) -> None:
    """All have signed that all survive. Some reveal for that; the server asks the others to sign that e is lost."""
    sums = masked()
    everybody = {name: sums.sites[name].sign_all(1, "update") for name in NAMES}
    revealed = [sums.sites[name].reveal(1, "update", everybody) for name in NAMES[:for_all]]
    for name in NAMES[:for_all]:
        with pytest.raises(PermissionDeniedError, match="one set of survivors a stage"):
            sums.sites[name].agree(1, "update", NAMES[:4])
    fewer = {name: sums.sites[name].agree(1, "update", NAMES[:4]) for name in NAMES[for_all:]}
    for name in NAMES[for_all:]:
        with contextlib.suppress(PermissionDeniedError):
            revealed.append(sums.sites[name].reveal(1, "update", fewer))
        with pytest.raises(PermissionDeniedError):
            sums.sites[name].reveal(1, "update", everybody)
    messages = [json.loads(message) for message in revealed]
    own, pairs = (sum("e" in message[kind] for message in messages) for kind in ("own", "pairs"))
    assert own == for_all
    assert pairs == (4 - for_all if for_all <= 1 else 0)  # four must sign the shorter list, and e is no help
    assert own < 4 or pairs == 0


def test_a_sum_of_all_is_written_down_before_shares_leave_and_holds_after_a_restart() -> None:
    sums, written = masked(), list[Any]()
    sums.sites["a"]._keep = written.append
    everybody = {name: sums.sites[name].sign_all(1, "update") for name in NAMES}
    assert not written
    sums.sites["a"].reveal(1, "update", everybody)
    assert [list(record["signed"]) for record in written] == [["1"]]
    site = SiteSums("a", CONTEXT, sums.rules, record=written[0], attempt=2)
    publics = {name: sums.publics[name] for name in "bcd"} | {"a": site.public}
    with pytest.raises(PermissionDeniedError, match="one set of survivors a round"):
        site.begin(1, "again", publics)


def test_signatures_of_all_count_for_one_cohort() -> None:
    """The server delivers the shares of e to some sites alone. Their signatures do not add up."""
    sums = Sums(NAMES)
    server = sums.begin()
    for name in NAMES[:4]:
        received = server.deliver(name)
        if name in "ab":
            del received["e"]
        sums.sites[name].mask(1, "update", received, vectors()[name], RING)
    signed = {name: sums.sites[name].sign_all(1, "update") for name in NAMES[:4]}
    for name in NAMES[:4]:
        with pytest.raises(PermissionDeniedError, match="something else"):
            sums.sites[name].reveal(1, "update", signed)


def test_in_a_sparse_graph_nobody_signs_ahead() -> None:
    names = [f"site-{number}" for number in range(40)]
    sums = Sums(names)
    sums.begin()
    sums.mask({name: {"w": RING.zeros((2,))} for name in names}, RING)
    assert {site.sign_all(1, "update") for site in sums.sites.values()} == {b""}


def test_survivors_without_neighbours_are_refused() -> None:
    """The server calls all neighbours of a site lost, so that nothing but its own seed would hide its vector."""
    names = [f"site-{number}" for number in range(80)]
    sums = Sums(names)
    sums.begin()
    sums.mask({name: {"w": RING.zeros((2,))} for name in names}, RING)
    roster = sums.sites["site-0"]._stages[1, "update"].roster
    lonely = [name for name in names if name not in roster.neighbours("site-0")]
    assert len(lonely) >= sums.rules.min_cohort
    for site in sums.sites.values():
        with pytest.raises(PermissionDeniedError, match="holders of .* survive, and it takes"):
            site.agree(1, "update", lonely)


def test_both_kinds_of_shares_are_never_revealed() -> None:
    sums = masked()
    survivors = sums.agree()
    sums.reveal(survivors)
    with pytest.raises(PermissionDeniedError, match="one set of survivors a stage"):
        sums.sites["a"].agree(1, "update", NAMES[:4])
    again = sums.sites["a"].reveal(1, "update", sums.server.signatures("a"))
    assert RevealMessage.parse("a", again, 1, "update", 5).pairs == {}


@pytest.mark.parametrize("restarted", [False, True])
def test_another_stage_of_a_signed_round_needs_the_same_sites(restarted: bool) -> None:
    sums = masked()
    sums.agree()
    record = json.loads(json.dumps(sums.sites["a"].record()))
    if restarted:
        sums.sites["a"] = SiteSums("a", CONTEXT, sums.rules, record=record, attempt=2)
    fewer = {name: public for name, public in sums.publics.items() if name != "e"}
    site = sums.sites["a"]
    with pytest.raises(PermissionDeniedError, match="one set of survivors a round"):
        site.begin(1, "again", fewer)
    site.begin(1, "again", sums.publics)  # all of them
    site.begin(2, "update", fewer)  # the next round


def test_a_stage_begun_before_cannot_be_signed_with_other_survivors() -> None:
    sums = masked()
    sums.begin(1, "again")
    sums.mask(vectors(), RING)
    sums.sites["a"].agree(1, "update", NAMES)
    with pytest.raises(PermissionDeniedError, match="one set of survivors a round"):
        sums.sites["a"].agree(1, "again", NAMES[:4])


def test_rounds_go_forward_over_restarts() -> None:
    sums = masked(round=20)
    sums.agree()
    site = SiteSums("a", CONTEXT, sums.rules, record=sums.sites["a"].record(), attempt=2)
    publics = sums.publics | {"a": site.public}
    with pytest.raises(PermissionDeniedError, match="rounds go forward"):
        site.begin(12, "update", publics)
    with pytest.raises(PermissionDeniedError, match="one set of survivors a round"):
        site.begin(20, "update", {name: publics[name] for name in "abcd"})
    assert len(site.record()["signed"]) == 1


def test_what_is_signed_is_written_before_the_signature_leaves() -> None:
    sums, written = masked(), list[Any]()

    def full(record: Any) -> None:
        written.append(record)
        raise OSError("the disk is full")

    sums.sites["a"]._keep = full
    with pytest.raises(OSError, match="the disk is full"):
        sums.sites["a"].agree(1, "update", NAMES)
    assert written == [sums.sites["a"].record()] and list(written[0]["signed"]) == ["1"]


def test_the_server_cannot_call_a_later_process_the_first() -> None:
    sums = masked()
    sums.agree()
    for attempt in (1, 0):
        with pytest.raises(PermissionDeniedError, match="number 1 has signed sums of round 1 already"):
            SiteSums("a", CONTEXT, sums.rules, record=sums.sites["a"].record(), attempt=attempt)


def test_vectors_are_masked_once() -> None:
    sums = masked()
    with pytest.raises(PermissionDeniedError, match="a vector is masked once a stage: 'w' was"):
        sums.sites["a"].mask(1, "update", sums.server.deliver("a"), vectors()["a"], RING)
    fewer = {name: part for name, part in sums.server.deliver("a").items() if name != "e"}
    with pytest.raises(PermissionDeniedError, match="one cohort"):
        sums.sites["a"].mask(1, "update", fewer, {"v": RING.zeros((1,))}, RING)


def test_a_stage_begins_with_one_set_of_keys() -> None:
    sums = masked()
    other = SiteSums("e", CONTEXT, sums.rules).public
    with pytest.raises(PermissionDeniedError, match="a stage begins once"):
        sums.sites["a"].begin(1, "update", sums.publics | {"e": other})


def test_keys_swapped_for_one_site_alone_stop_it() -> None:
    """The server shows b other keys of a than all others: b opens no share."""
    sums = Sums(NAMES)
    forged = sums.publics | {"a": SiteSums("a", CONTEXT, sums.rules).public}
    server = ServerSums(CONTEXT, 1, "update", sums.publics)
    messages = {name: sums.sites[name].begin(1, "update", forged if name == "b" else sums.publics) for name in NAMES}
    with pytest.raises(ProtocolError, match="b has begun with other participants or keys"):
        server.add_shares("b", messages["b"])
    sealed = {name: json.loads(messages[name])["sealed"].get("b", "") for name in NAMES}
    parts = {name: base64.b64decode(text) for name, text in sealed.items() if name != "a"}
    with pytest.raises(ProtocolError, match="the shares of c for b were changed"):
        sums.sites["b"].mask(1, "update", parts, vectors()["b"], RING)


def test_a_site_is_shown_its_own_keys() -> None:
    sums = Sums(NAMES)
    with pytest.raises(PermissionDeniedError, match="this site with its own keys"):
        sums.sites["a"].begin(1, "update", sums.publics | {"a": SiteSums("a", CONTEXT, sums.rules).public})
    same = json.dumps(json.loads(sums.publics["b"]) | {"site": "c"}).encode()
    with pytest.raises(ProtocolError, match="the same key"):
        sums.sites["a"].begin(1, "update", sums.publics | {"c": same})


def test_weak_keys_are_refused() -> None:
    sums = Sums(NAMES)
    fields = json.loads(sums.publics["b"]) | {"exchange": "A" * 43 + "="}
    with pytest.raises(ProtocolError, match="the key of b .* not a usable X25519 key"):
        sums.sites["a"].begin(1, "update", sums.publics | {"b": json.dumps(fields).encode()})


@pytest.mark.parametrize(("round", "stage"), [(1, "update"), (2, "metrics")])
def test_messages_of_another_stage_are_refused(round: int, stage: str) -> None:
    sums = masked(round, stage)
    old_shares, old_parts = sums.sites["a"].begin(round, stage, sums.publics), sums.server.deliver("b")
    old_signatures = {name: sums.sites[name].agree(round, stage, NAMES) for name in NAMES}
    old_reveal = sums.sites["a"].reveal(round, stage, old_signatures)
    server = sums.begin(2, "update")
    with pytest.raises(ProtocolError, match="says (round|stage)"):
        ServerSums(CONTEXT, 2, "update", sums.publics).add_shares("a", old_shares)
    with pytest.raises(ProtocolError, match="were changed, or are not of round 2, stage update"):
        sums.sites["b"].mask(2, "update", old_parts, vectors()["b"], RING)
    sums.mask(vectors(), RING)
    survivors = server.survivors(NAMES)
    with pytest.raises(ProtocolError, match="has signed other survivors"):
        server.add_signature("a", old_signatures["a"])
    sums.sites["a"].agree(2, "update", survivors)
    with pytest.raises(PermissionDeniedError, match="something else"):
        sums.sites["a"].reveal(2, "update", old_signatures)
    with pytest.raises(ProtocolError, match="says (round|stage)"):
        server.add_reveal("a", old_reveal)


def test_keys_of_another_run_do_not_fit() -> None:
    """Without certificates too: shares of another run do not open."""
    sums, other = Sums(NAMES), Sums(NAMES)
    other.sites = {name: SiteSums(name, Context("job", "", "run-2"), SumRules()) for name in NAMES}
    sums.begin()
    message = other.sites["b"].begin(1, "update", other.publics)
    with pytest.raises(ProtocolError, match="other participants or keys"):
        ServerSums(CONTEXT, 1, "update", sums.publics).add_shares("b", message)


Rule = Callable[[Sums], object]
RULES: dict[str, tuple[str, Rule]] = {
    "few participants": (
        "min_cohort=4 of this site: only 3 participate",
        lambda sums: sums.sites["a"].begin(2, "update", {name: sums.publics[name] for name in "abc"}),
    ),
    "few survivors": ("min_cohort=4 of this site: 3", lambda sums: sums.sites["a"].agree(1, "update", ["a", "b", "c"])),
    "strange survivors": ("members of the cohort", lambda sums: sums.sites["a"].agree(1, "update", [*NAMES, "x"])),
    "named twice": ("each named once", lambda sums: sums.sites["a"].agree(1, "update", [*NAMES, "a"])),
    "not agreed": ("after this site has agreed", lambda sums: sums.sites["a"].reveal(1, "update", {})),
}


@pytest.mark.parametrize("case", RULES)
def test_a_site_keeps_its_rules(case: str) -> None:
    message, attempt = RULES[case]
    with pytest.raises(PermissionDeniedError, match=message):
        attempt(masked(rules=SumRules(min_cohort=4)))


def test_a_site_that_sent_nothing_is_no_survivor() -> None:
    sums = Sums(NAMES)
    sums.begin()
    sums.mask({name: {} for name in NAMES}, RING)
    with pytest.raises(PermissionDeniedError, match="has masked no vector"):
        sums.sites["a"].agree(1, "update", NAMES)


def test_thresholds_are_the_sites_own() -> None:
    with pytest.raises(ConfigError, match="threshold=0.4"):
        SumRules(threshold=0.4)
    with pytest.raises(ConfigError, match="min_cohort=1"):
        SumRules(min_cohort=1)
    sums = masked(rules=SumRules(threshold=0.79))  # 4 of 5
    signed = {name: sums.sites[name].agree(1, "update", NAMES) for name in NAMES[:3]}
    with pytest.raises(PermissionDeniedError, match="threshold=0.79 of this site: 4 of its 5 holders"):
        sums.sites["a"].reveal(1, "update", signed)
    lowered = json.loads(sums.sites["a"].begin(1, "update", sums.publics)) | {"threshold": 2}
    with pytest.raises(ProtocolError, match="a has a threshold of 2 for 5 holders"):
        ServerSums(CONTEXT, 1, "update", sums.publics).add_shares("a", json.dumps(lowered).encode())


def test_t_minus_1_colluding_sites_and_the_server_open_nothing() -> None:
    """They put together all shares that they hold of e's secrets: 3 of the 4 that are needed."""
    sums = masked()
    message = SharesMessage.parse("e", sums.sites["e"].begin(1, "update", sums.publics), 1, "update", 5)
    assert message.threshold == 4
    colluding = {number: sums.sites[name]._stages[1, "update"].shares["e"] for number, name in enumerate("abc", 1)}
    for kind in (0, 1):
        shares = {number: both[kind] for number, both in colluding.items()}
        with pytest.raises(ValueError, match="3 shares do not open a secret; 4 are needed"):
            combine(shares, 4)
    everything = b"".join(sums.sites[name].begin(1, "update", sums.publics) for name in "abcde")
    state = sums.sites["e"]._stages[1, "update"]
    assert state.seed not in everything and state.seed.hex().encode() not in everything


def test_t_minus_1_colluding_sites_and_the_server_see_uniform_numbers_of_the_others() -> None:
    """a, b and c tell the server all that they hold. It removes every mask of e that it knows, and interpolates."""
    sums = Sums(NAMES)
    sums.begin()
    constant = RING.encode(np.full(200_000, 0.5))
    sums.mask({name: {"w": constant} for name in NAMES}, RING)
    states = {name: sums.sites[name]._stages[1, "update"] for name in NAMES}

    def left_of(site: str, helpers: str, seed: bytes | None) -> np.ndarray:
        """The vector of a site without the pair masks that helpers tell of, and without the mask of a seed."""
        vector = sums.masked[site]["w"].copy()
        pairs = {name: states[name].pair_seeds[site] for name in helpers if name != site}
        added = [own for name, own in pairs.items() if name < site]
        subtracted = [own for name, own in pairs.items() if name > site] + ([seed] if seed else [])
        add_masks(vector, RING, CONTEXT, "w", added, subtracted)
        return vector

    def opened(helpers: str) -> bytes:
        points = {number: states[name].shares["e"][0] for number, name in enumerate(NAMES, 1) if name in helpers}
        return (combine(points, len(points)) % 2**256).to_bytes(32, "big")

    def uniform(vector: np.ndarray) -> bool:
        counts = np.array([np.bincount(column, minlength=256) for column in vector.view(np.uint8).reshape(-1, 8).T])
        mean = vector.size / 256
        statistics = ((counts - mean) ** 2 / mean).sum(axis=1)
        return bool((statistics > 150).all() and (statistics < 390).all())  # both tails are below 1e-6

    for seed in (None, opened("abc"), opened("abc"[1:])):
        assert uniform(left_of("e", "abc", seed))
    sums.reveal(sums.agree())  # the server learns every site's own seed, as it does in every round
    seeds = dict(zip(NAMES, sums.server._open_all()[1], strict=True))
    assert seeds["e"] == states["e"].seed == opened("abcd"), "t sites open it: the attack is a true one"
    honest = {name: left_of(name, "abc", seeds[name]) for name in "de"}
    assert all(map(uniform, honest.values())), "the mask of the pair d, e is left on both"
    assert np.array_equal(honest["d"] + honest["e"], 2 * constant), "their sum is what the result tells anyway"
    assert np.array_equal(left_of("e", "abcd", seeds["e"]), constant)


def test_colluding_sites_cannot_sign_for_others() -> None:
    sums = masked()
    signed = {name: sums.sites[name].agree(1, "update", NAMES) for name in "ab"}
    forged = signed | dict.fromkeys("cde", signed["b"])
    with pytest.raises(PermissionDeniedError, match="the signatures of c, d, e are of something else"):
        sums.sites["a"].reveal(1, "update", forged)
    with pytest.raises(ProtocolError, match="has 3 bytes"):
        sums.sites["a"].reveal(1, "update", {"b": b"abc"})


def test_wrong_shares_are_noticed() -> None:
    sums = masked()
    sums.agree()
    for name in NAMES[:4]:
        message = json.loads(sums.sites[name].reveal(1, "update", sums.server.signatures(name)))
        if name == "b":
            message["own"]["e"] = message["own"]["a"]
        sums.server.add_reveal(name, json.dumps(message).encode())
    with pytest.raises(RoundFailedError, match="do not open the secret of e"):
        sums.server.unmask(sums.totals(RING), RING)


@pytest.fixture(scope="module")
def whole() -> tuple[Sums, dict[str, bytes]]:
    """A stage with each kind of message that a site sends."""
    sums = masked()
    shares = sums.sites["a"].begin(1, "update", sums.publics)
    sums.agree()
    return sums, {
        "keys": sums.publics["a"],
        "shares": shares,
        "reveal": sums.sites["a"].reveal(1, "update", sums.server.signatures("a")),
    }


def read(sums: Sums, kind: str, message: bytes) -> None:
    match kind:
        case "keys":
            ServerSums(CONTEXT, 1, "update", sums.publics | {"a": message})
        case "shares":
            ServerSums(CONTEXT, 1, "update", sums.publics).add_shares("a", message)
        case _:
            sums.server.add_reveal("a", message)


KINDS = ["keys", "shares", "reveal"]
TEXT = st.text("ab=\x00\u0394", max_size=5)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(TEXT, PLAIN, max_size=3)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
def test_broken_messages_are_refused_as_such(
    whole: tuple[Sums, dict[str, bytes]], kind: str, data: st.DataObject
) -> None:
    sums, messages = whole
    message = messages[kind]
    fields = json.loads(message)
    match data.draw(st.sampled_from(["cut", "bytes", "field", "missing"])):
        case "cut":
            broken = message[: data.draw(st.integers(0, len(message) - 1))]
        case "bytes":
            broken = data.draw(st.binary(max_size=200))
        case "field":
            name = data.draw(st.sampled_from(sorted(fields)))
            fields[name] = data.draw(JSON)
            broken = json.dumps(fields).encode()
        case _:
            del fields[data.draw(st.sampled_from(sorted(fields)))]
            broken = json.dumps(fields).encode()
    allowed = kind == "keys" or "threshold" in fields  # another attempt or threshold may be a valid one
    with contextlib.suppress(ProtocolError):
        read(sums, kind, broken)
        assert json.loads(broken) == json.loads(message) or allowed


@pytest.mark.parametrize("kind", KINDS)
def test_huge_messages_are_refused(whole: tuple[Sums, dict[str, bytes]], kind: str) -> None:
    sums, messages = whole
    huge = json.dumps(json.loads(messages[kind]) | {"more": "x" * 2**20}).encode()
    with pytest.raises(ProtocolError, match="the limit is"):
        read(sums, kind, huge)


def test_a_record_that_cannot_be_read_is_an_error() -> None:
    for record in [
        {},
        {"version": 1},
        {"version": 2, "newest": 0, "signed": {}},
        {"version": 1, "newest": 0, "signed": 3},
    ]:
        with pytest.raises(ConfigError, match="cannot be read"):
            SiteSums("a", CONTEXT, SumRules(), record=record)


def test_a_restarted_site_says_that_it_takes_part_from_the_next_stage_on() -> None:
    sums = masked()
    site = SiteSums("a", CONTEXT, SumRules(), record=sums.sites["a"].record(), attempt=2)
    with pytest.raises(ProtocolError, match="this process has not begun the secure sum of round 1"):
        site.agree(1, "update", NAMES)
