"""Which versions of server and site work together, and what is said of those that do not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fl_runtime.errors import ProtocolError
from fl_runtime.types import SERVER_SETTINGS
from fl_runtime.version import FIRST_VERSIONS, PROTOCOL_MAX, PROTOCOL_MIN
from fl_runtime.wire.software import FEATURES, OWN, Software, choose_protocol, misfit

ARCHITECTURE = Path(__file__).resolve().parents[3] / "docs" / "architecture.md"


@pytest.mark.parametrize(
    ("server", "site", "chosen"), [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 4), (1, 3), 3), ((4, 6), (1, 4), 4)]
)
def test_the_highest_protocol_that_both_speak_is_chosen(
    server: tuple[int, int], site: tuple[int, int], chosen: int
) -> None:
    assert choose_protocol(Software("0.4.0", *server), Software("0.3.0", *site)) == chosen


def test_a_site_that_is_too_old_is_told_to_what_to_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_runtime.wire.software.FIRST_VERSIONS", {1: "0.1.0", 2: "0.3.0"})
    with pytest.raises(ProtocolError) as refused:
        choose_protocol(Software("0.4.1", 2, 3), Software("0.1.0", 1, 1))
    assert refused.value.what == "the site speaks protocol 1, this server 2 to 3"
    assert refused.value.where == "the site (fl-adapters 0.1.0) and the server (fl-adapters 0.4.1)"
    assert refused.value.fix == "upgrade the site (fl-adapters 0.1.0) to fl-adapters 0.3.0 or later"


def test_a_server_that_is_too_old_is_told_the_version_of_the_site() -> None:
    with pytest.raises(ProtocolError) as refused:
        choose_protocol(Software("0.1.0", 1, 1), Software("0.9.2", 77, 78))
    assert refused.value.fix == "upgrade the server (fl-adapters 0.1.0) to fl-adapters 0.9.2"


@pytest.mark.parametrize(
    ("server", "site", "words"),
    [
        ("0.3.1", "0.2.9", ""),
        ("0.3.1", "0.4.0", ""),
        ("0.3.1", "0.1.0", "Upgrade the site to fl-adapters 0.3.1"),
        ("0.3.1", "0.5.0", "Upgrade the server to fl-adapters 0.5.0"),
        ("1.0.0", "0.9.0", "Upgrade the site to fl-adapters 1.0.0"),
        ("0.3.1", "", ""),
        ("0.3.1", "a copy of mine", ""),
    ],
)
def test_versions_that_are_no_neighbours_are_named(server: str, site: str, words: str) -> None:
    text = misfit(Software(server, 1, 1), Software(site, 1, 1))
    assert (words in text) if words else text == ""


def test_what_a_side_tells_is_read_by_the_other() -> None:
    assert Software.of_json(OWN.to_json()) == OWN


@pytest.mark.parametrize(
    "told",
    [
        None,
        "0.1.0",
        {"version": 1, "protocols": [1, 1]},
        {"version": "0.1.0", "protocols": [1]},
        {"version": "0.1.0", "protocols": [1, True]},
        {"version": "0.1.0", "protocols": [-1, 2**40]},
        {"version": "0.1.0", "protocols": {"0": 1, "1": 1}},
    ],
)
def test_what_is_no_software_counts_as_nothing_told(told: Any) -> None:
    assert Software.of_json(told) is None


def test_text_of_a_hostile_site_is_made_printable_and_bounded() -> None:
    told = {"version": "\x1b[2J" + "9" * 10_000, "protocols": [1, 1], "features": [7, "x" * 10_000], "settings": "name"}
    read = Software.of_json(told)
    assert read is not None and read.version.isprintable() and len(read.version) < 120
    assert (read.features, read.settings) == (frozenset(), frozenset())


def test_every_feature_is_documented_with_what_happens_without_it() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", ARCHITECTURE.read_text("utf-8"), re.MULTILINE))
    assert {name: rows.get(name) for name in OWN.features} == {f.name: f"{f.meaning} | {f.without}" for f in FEATURES}


def test_every_protocol_number_has_the_version_that_began_with_it() -> None:
    assert set(FIRST_VERSIONS) == set(range(1, PROTOCOL_MAX + 1)) and PROTOCOL_MIN >= 1


def test_settings_of_the_server_alone_are_settings() -> None:
    assert OWN.settings >= SERVER_SETTINGS
