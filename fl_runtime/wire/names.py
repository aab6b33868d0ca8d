"""Lists of names that must mean the same at all sites (labels, vocabularies, features), and how they travel.

At the handshake a list travels as digests: one of the whole, and one of each block of entries. A short list travels as
text too. Where two sites differ, the server asks both for the entries of the first block that differs. So a vocabulary
of any length costs at most 10 KiB, and its first difference is still told in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import xxhash

from fl_runtime.errors import ConfigError, ProtocolError
from fl_runtime.wire.fl.v1 import federation_pb2 as pb

MAX_LISTS = 256
MAX_COUNT = 2**31
MAX_NAME_CHARS = 200
MAX_BLOCKS = 1_024
MAX_ALL_BLOCKS = 2**16
"""Most blocks of all lists of a site together: 512 KiB of digests."""
MAX_EXCERPT = 1_024
"""Most entries that one excerpt brings."""

TENSORS_OF = "tensors of "
"""Prefix of a list of tensors, each as "<digest> <name>", that details a text: the digest of all of them together.

The text "base.fingerprint" has the list "tensors of base.fingerprint". Where both differ between sites, the list is
told in place of the text, without digests.
"""

_INLINE_ENTRIES, _INLINE_CHARS = 256, 4_096
_ENTRY_CHARS = 120
_BLOCK_OF_DATA = 64  # so that the digest of a block cannot be guessed entry by entry
_DIGEST_BYTES, _BLOCK_DIGEST_BYTES = 16, 8
_SHOWN = 4


@dataclass(frozen=True)
class Names:
    """A list of names whose order counts: entry i stands for class i, token i, column i.

    Attributes:
        entries: The names, in order.
        from_data: Whether they were collected from this site's own data, as the vocabulary of an adapted layer is.
            Then only digests leave the site.
    """

    entries: tuple[str, ...]
    from_data: bool = False


Facts: TypeAlias = Mapping[str, str | Names]
"""What a site declares at the handshake: texts that all sites must give alike, and lists of names that must be equal
at all sites that give them."""


@dataclass(frozen=True)
class Excerpt:
    """Entries of a list of names, shortened.

    Attributes:
        start: Index of the first one in the list.
        entries: The entries.
    """

    start: int
    entries: tuple[str, ...]

    @classmethod
    def from_proto(cls, message: pb.NameExcerpt) -> Excerpt:
        """Read an excerpt, which may come from a hostile peer. Raises ProtocolError if it is too long."""
        if len(message.entries) > MAX_EXCERPT or any(len(entry) > _ENTRY_CHARS for entry in message.entries):
            raise ProtocolError(f"an excerpt of a list of names has more than {MAX_EXCERPT} entries, or a long one")
        return cls(message.start, tuple(message.entries))

    def to_proto(self, name: str) -> pb.NameExcerpt:
        """Return the protobuf message of an excerpt of the list with this name."""
        return pb.NameExcerpt(name=name, start=self.start, entries=self.entries)


@dataclass(frozen=True)
class Question:
    """A question to a site about a list of names that it registered.

    Attributes:
        name: Name of the list.
        entries: Indices of the entries that are asked for.
    """

    name: str
    entries: range

    def to_proto(self) -> pb.NameQuestion:
        """Return the protobuf message of the question."""
        return pb.NameQuestion(name=self.name, start=self.entries.start, stop=self.entries.stop)


@dataclass(frozen=True)
class NamesDigest:
    """What the handshake says of a list of names.

    Attributes:
        count: Number of entries.
        digest: xxh3-128 of all entries, 16 bytes.
        block: Number of entries behind each digest of a block.
        blocks: xxh3-64 of each block, 8 bytes each.
        entries: The entries, if they are few and short and were not collected from data; else empty.
        from_data: Whether the entries never leave their site.
    """

    count: int
    digest: bytes
    block: int
    blocks: bytes
    entries: tuple[str, ...] = ()
    from_data: bool = False

    @classmethod
    def of(cls, names: Names) -> NamesDigest:
        """Compute the digests of a list.

        Args:
            names: The list.

        Returns:
            Its digests, with the entries if they are few and short.
        """
        data = [f"{entry}\0".encode("utf-8", "surrogatepass") for entry in names.entries]
        block = 1
        while len(data) > block * MAX_BLOCKS:
            block *= 2  # so that lists of similar lengths have comparable blocks
        if names.from_data:
            block = max(block, _BLOCK_OF_DATA)
        blocks = (b"".join(data[at : at + block]) for at in range(0, len(data), block))
        short = len(data) <= _INLINE_ENTRIES and sum(map(len, data)) <= _INLINE_CHARS
        return cls(
            count=len(data),
            digest=xxhash.xxh3_128_digest(b"".join(data)),
            block=block,
            blocks=b"".join(map(xxhash.xxh3_64_digest, blocks)),
            entries=tuple(map(_shortened, names.entries)) if short and not names.from_data else (),
            from_data=names.from_data,
        )

    @classmethod
    def from_proto(cls, message: pb.NameList) -> NamesDigest:
        """Read the message of a list of names, which may come from a hostile peer.

        Args:
            message: The message as received.

        Returns:
            What it says.

        Raises:
            ProtocolError: If a limit is exceeded, or numbers and digests do not fit together.
        """
        blocks = -(-message.count // message.block) if message.block else -1
        sizes_fit = len(message.block_digests) == blocks * _BLOCK_DIGEST_BYTES and len(message.digest) == _DIGEST_BYTES
        complete = len(message.entries) in (0, message.count) and len(message.entries) <= _INLINE_ENTRIES
        readable = len(message.name) <= MAX_NAME_CHARS and all(len(entry) <= _ENTRY_CHARS for entry in message.entries)
        if not (sizes_fit and complete and readable and message.count <= MAX_COUNT and blocks <= MAX_BLOCKS):
            raise ProtocolError(f"the list of names {message.name[:60]!r} of a registration cannot be read")
        return cls(
            message.count,
            message.digest,
            message.block,
            message.block_digests,
            tuple(message.entries),
            message.from_data,
        )

    def to_proto(self, name: str) -> pb.NameList:
        """Return the protobuf message of the list with this name."""
        return pb.NameList(
            name=name,
            count=self.count,
            digest=self.digest,
            block=self.block,
            block_digests=self.blocks,
            entries=self.entries,
            from_data=self.from_data,
        )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> NamesDigest:
        """Return what `to_json` was called on."""
        digests = {name: bytes.fromhex(fields[name]) for name in ("digest", "blocks")}
        return cls(**{**fields, **digests, "entries": tuple(fields["entries"])})

    def to_json(self) -> dict[str, Any]:
        """Return the digests as JSON values, for the journal."""
        return {**asdict(self), "digest": self.digest.hex(), "blocks": self.blocks.hex(), "entries": list(self.entries)}

    @property
    def tells_entries(self) -> bool:
        """Whether the entries themselves are known."""
        return len(self.entries) == self.count

    def first_difference(self, other: NamesDigest) -> range | None:
        """Return the indices of the first entries that differ from those of another list, as far as digests tell.

        Args:
            other: The list of another site.

        Returns:
            Indices of one block, or from the end of the shorter list on; None if the lists are equal.
        """
        if (self.count, self.digest) == (other.count, other.digest):
            return None
        longest = max(self.count, other.count)
        if self.block != other.block:  # lists of very different lengths
            return range(longest)
        mine, theirs = self._block_digests(), other._block_digests()
        same = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), len(mine))
        start = min(same, len(theirs)) * self.block
        return range(min(start, longest), min(start + self.block, longest))

    def _block_digests(self) -> list[bytes]:
        return [self.blocks[at : at + _BLOCK_DIGEST_BYTES] for at in range(0, len(self.blocks), _BLOCK_DIGEST_BYTES)]


def excerpt_of(names: Names, start: int, stop: int) -> Excerpt:
    """Return the entries of a list that a question asks for.

    Args:
        names: The list.
        start: Index of the first entry.
        stop: Index after the last entry. At most `MAX_EXCERPT` entries are returned.

    Returns:
        The entries, shortened; none of a list that was collected from data.
    """
    if names.from_data:
        return Excerpt(start, ())
    return Excerpt(start, tuple(map(_shortened, names.entries[start : min(stop, start + MAX_EXCERPT)])))


def describe_difference(
    name: str, left: NamesDigest, right: NamesDigest, excerpts: tuple[Excerpt, Excerpt] | None = None
) -> str:
    """Say in one line how two lists differ.

    Args:
        name: What the lists are.
        left: The list of one site.
        right: The list of another site; not equal to `left`.
        excerpts: Entries of both around the first difference, if the sites were asked for them.

    Returns:
        The first entries that differ, "labels: 0: 'no' != 'yes', 1: 'yes' != 'no'", with the numbers of entries.
    """
    counts = f"{left.count} entries != {right.count} entries"
    if left.count == right.count:
        counts = f"{left.count} entries each" if left.count > _INLINE_ENTRIES else ""
    whole = left.tells_entries and right.tells_entries
    if whole:
        excerpts = Excerpt(0, left.entries), Excerpt(0, right.entries)
    if name.startswith(TENSORS_OF):
        return _describe_tensors(name.removeprefix(TENSORS_OF), counts, _differing_tensors(*excerpts or ()))
    if left.count == right.count == 1 and whole:
        return f"{name}: {left.entries[0]!r} != {right.entries[0]!r}"
    shown = _differing(*excerpts) if excerpts else []
    if shown:
        more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
        told = ", ".join(shown[:_SHOWN] + (more if whole else ["..."]))
    else:
        where = left.first_difference(right) or range(0)
        told = f"the first that differ are among {where.start} to {where.stop - 1}"
        told = told if left.block == right.block else "they differ"
        told += " (their text stays at the sites)" if left.from_data or right.from_data else ""
    return f"{name}: {'; '.join(filter(None, (counts, told)))}"


def _differing(left: Excerpt, right: Excerpt) -> list[str]:
    lines = []
    for i in range(max(len(left.entries), len(right.entries))):
        a, b = (repr(e.entries[i]) if i < len(e.entries) else "missing" for e in (left, right))
        if a != b:
            lines.append(f"{left.start + i}: {a} != {b}")
    return lines


def _describe_tensors(what: str, counts: str, names: list[str]) -> str:
    told = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{what}: {'; '.join(filter(None, (counts, f'these tensors differ: {told}' if told else '')))}"


def _differing_tensors(*excerpts: Excerpt) -> list[str]:
    """Names of the tensors that two excerpts do not have alike."""
    digests = [dict(entry.split(" ", 1)[::-1] for entry in excerpt.entries if " " in entry) for excerpt in excerpts]
    names = dict.fromkeys(name for found in digests for name in found)
    return [name for name in names if len({found.get(name) for found in digests}) > 1]


def names_of(entries: Iterable[object], *, from_data: bool = False) -> Names:
    """Return a list of names from values of any type.

    Args:
        entries: The values, in order.
        from_data: See `Names`.

    Returns:
        The list, with the text of each value.
    """
    return Names(tuple(str(entry) for entry in entries), from_data)


def ordered(value: Any) -> list[str]:
    """Return names in the order of their numbers.

    Args:
        value: A list of names, a dict of name to number, a dict of number to name, or any object.

    Returns:
        The names; with their numbers where those are not 0, 1, 2 and so on. Empty for anything else, as for the labels
        of rows, which repeat.
    """
    if isinstance(value, Mapping):
        numbered = _numbered(value)
        complete = [number for number, _ in numbered] == list(range(len(numbered)))
        return [name if complete else f"{number} = {name}" for number, name in numbered]
    if isinstance(value, list | tuple) and value and all(isinstance(entry, str) for entry in value):
        return list(value) if len(set(value)) == len(value) else []
    return []


def _numbered(names: Mapping[Any, Any]) -> list[tuple[int, str]]:
    """(number, name) in the order of the numbers, from a dict in either direction; empty if it is neither."""
    items: Iterable[tuple[Any, Any]] = names.items()
    if all(isinstance(key, str) and _is_number(value) for key, value in items):
        return sorted((int(value), key) for key, value in items)
    if all(isinstance(value, str) and (_is_number(key) or str(key).isdigit()) for key, value in items):
        return sorted((int(key), value) for key, value in items)
    return []


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def facts_of(given: Mapping[str, object]) -> dict[str, str | Names]:
    """Return facts from a user's values.

    Args:
        given: Name -> a text, a list or array of values in their order, or `Names`.

    Returns:
        The facts.

    Raises:
        ConfigError: A value is neither.
    """
    facts: dict[str, str | Names] = {}
    for name, value in given.items():
        if isinstance(value, Names):
            facts[name] = value
            continue
        if not isinstance(value, str) and (isinstance(value, Mapping) or not isinstance(value, Iterable)):
            raise ConfigError(
                f"{name!r} is {value!r}, which is neither a text nor a list of names",
                where="agreement",
                fix="write agreement={'labels': ['cat', 'dog'], 'task': 'pets'}",
            )
        facts[name] = value if isinstance(value, str) else names_of(value)
    return facts


def checked_lists(messages: Sequence[pb.NameList]) -> dict[str, NamesDigest]:
    """Read the lists of names of a registration.

    Args:
        messages: The messages as received.

    Returns:
        Name -> digests.

    Raises:
        ProtocolError: There are too many, or one cannot be read.
    """
    if len(messages) > MAX_LISTS:
        raise ProtocolError(f"a registration has {len(messages)} lists of names; the limit is {MAX_LISTS}")
    digests = {message.name: NamesDigest.from_proto(message) for message in messages}
    if sum(len(digest.blocks) for digest in digests.values()) > MAX_ALL_BLOCKS * _BLOCK_DIGEST_BYTES:
        raise ProtocolError(f"the lists of names of a registration have more than {MAX_ALL_BLOCKS} blocks")
    return digests


def _shortened(entry: str) -> str:
    """Readable text of an entry, which protobuf can hold."""
    text = entry.encode("utf-8", "replace").decode()
    return text if len(text) <= _ENTRY_CHARS else f"{text[: _ENTRY_CHARS - 4]} ..."
