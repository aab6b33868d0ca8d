"""Data of the example: the text of one site, and held-out text that is the same for all sites.

The text is split into paragraphs, in order. The first part pretrains the base model and belongs to no site. Every tenth
paragraph of the rest is held out for testing. What remains is divided into one piece per site, so that sites hold
different plays (or chapters). Every tenth paragraph of a site is its validation text.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import fl_adapters

CHARACTERS = 600_000  # of the text; the rest is not used, to keep the example quick
BASE_SHARE = 0.4  # share of the paragraphs for pretraining
HELD_OUT = 10  # every tenth paragraph is held out


@dataclass(frozen=True)
class Data:
    """Paragraphs for pretraining, of one site for training and validation, and of all sites for testing."""

    base: list[str]
    train: list[str]
    validation: list[str]
    test: list[str]


def load(shard: str | None = None) -> Data:
    """Load the text of one site.

    Args:
        shard: Part to train on, such as "2/3" for the second of three. None takes the part of this site, or everything
            outside a federation.

    Returns:
        Paragraphs for pretraining, training, validation and testing.
    """
    paragraphs = list(dict.fromkeys(read()))  # without duplicates, which could be both trained on and tested
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
    """Index and number of parts: those that `shard` names, else this site's index and the number of sites."""
    if shard is None:
        site = fl_adapters.site()  # outside a federation: index 0 of 1
        return site.index, site.count
    number, _, count = shard.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise SystemExit(f"--shard {shard}: write it as 2/3 for the second of three parts")
    return int(number) - 1, int(count)


def read() -> list[str]:
    """Paragraphs of Shakespeare's plays if that data set is found, else of Python's language reference."""
    beside_the_project = Path(__file__).resolve().parents[4] / "shared" / "data"
    folder = Path(os.environ.get("FL_ADAPTERS_DATA", beside_the_project))
    plays = folder / "tiny_shakespeare" / "input.txt"
    if plays.is_file():
        text = plays.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics  # the chapters behind Python's help()

        text = "\n\n".join(topics.values())
    return [paragraph.strip() for paragraph in text[:CHARACTERS].split("\n\n") if paragraph.strip()]
