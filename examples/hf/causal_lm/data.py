"""The text of this site, and the held-out text that is the same for everybody.

The text is cut into paragraphs, in order. The first part belongs to the base model and to no site. The rest is dealt
out in one piece per site, so that the sites hold different plays (or different chapters); every tenth paragraph of
it is held out for testing, and of what a site has left every tenth is its validation text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import fl_adapters

CHARACTERS = 600_000  # of the text that is used; keeps the example quick
BASE_SHARE = 0.4  # of them, for pretraining
HELD_OUT = 10  # every tenth paragraph


@dataclass(frozen=True)
class Data:
    """Paragraphs. test: of the text of all sites."""

    base: list[str]
    train: list[str]
    validation: list[str]
    test: list[str]


def load(shard: str | None = None) -> Data:
    """The text of one site.

    shard: "2/3" for the second of three parts; None: the part of the site that this process is, or everything.
    """
    paragraphs = list(dict.fromkeys(read()))  # no paragraph twice, so none is both trained on and tested
    cut = int(len(paragraphs) * BASE_SHARE)
    rest = paragraphs[cut:]
    training = [text for i, text in enumerate(rest) if i % HELD_OUT]
    index, count = place(shard)
    mine = training[len(training) * index // count : len(training) * (index + 1) // count]
    return Data(
        base=paragraphs[:cut],
        train=[text for i, text in enumerate(mine) if i % HELD_OUT],
        validation=mine[::HELD_OUT],
        test=rest[::HELD_OUT],
    )


def place(shard: str | None) -> tuple[int, int]:
    """(index, count) of the part to train on: as `shard` says, else this site's place in the federation."""
    if shard is None:
        site = fl_adapters.site()  # outside of a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it like 2/3, the second of three parts")
    return int(number) - 1, int(count)


def read() -> list[str]:
    """The paragraphs of Shakespeare's plays where that data set is at hand, else of Python's language reference."""
    beside_the_project = Path(__file__).resolve().parents[4] / "shared" / "data"
    folder = Path(os.environ.get("FL_ADAPTERS_DATA", beside_the_project))
    plays = folder / "tiny_shakespeare" / "input.txt"
    if plays.is_file():
        text = plays.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics  # the chapters behind Python's help()

        text = "\n\n".join(topics.values())
    return [paragraph.strip() for paragraph in text[:CHARACTERS].split("\n\n") if paragraph.strip()]
