"""Verification of an audit log against somebody whom the reader trusts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.trust.audit.lines import (
    BEGIN,
    COUNTER_FILE,
    DAMAGED,
    HEAD_FILE,
    LOG_FILE,
    NOTED,
    Head,
    LineMark,
    checked_line,
    next_mark,
)
from fl_runtime.trust.certificates import (
    PublicKey,
    fingerprint,
    load,
    read_certificate,
)
from fl_runtime.trust.files import read_file
from fl_runtime.trust.kits import known_roots
from fl_runtime.trust.roots.outside import Holders


@dataclass(frozen=True)
class Finding:
    """A problem in an audit log.

    Attributes:
        line: Number of the line in the file, from 1; 0 for the log as a whole.
        what: Description of the problem.
    """

    line: int
    what: str


@dataclass(frozen=True)
class Anchor:
    """Whom the reader of an audit log trusts: a kit, an authority, or a public key. Exactly one of them.

    Attributes:
        kit: Folder of the kit that must have signed the log.
        authority: File of an authority's certificate (PEM). Any participant that it certifies may have signed.
        key: File of the signer's public key, or of a certificate with it (PEM).

    Raises:
        ConfigError: None of them is given, or more than one.
    """

    kit: Path | None = None
    authority: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.kit, self.authority, self.key)) != 1:
            raise ConfigError(
                "an audit log is checked against exactly one signer that you trust; anyone can write a log that is "
                "consistent in itself",
                where="--kit, --authority, --key",
                fix="pass --kit with the kit that wrote the log, --authority with the authority's certificate "
                "(ca.pem of any kit), or --key with the signer's public key or certificate",
            )

    def problem(self, certificate: bytes) -> str:
        """Return why this anchor does not vouch for the certificate of a signer. Empty if it does.

        Args:
            certificate: The certificate, as PEM.

        Returns:
            The problem.

        Raises:
            ConfigError: A file of the anchor cannot be read.
        """
        if self.key is not None:
            key = _public_key(self.key)
            return "" if _key_of(certificate) == key else f"{HEAD_FILE} was not signed with the key in {self.key}"
        holders = self._holders()
        try:
            signer = holders.checked(certificate).identity
        except FederationError as error:
            return f"{HEAD_FILE} was not signed by a participant of this authority: {error.what}"
        if self.kit is not None:
            owner = holders.read(read_file(self.kit / "certificate.pem", "certificate")).identity
            return "" if signer == owner else f"{HEAD_FILE} was not signed by {owner}, but by {signer}"
        return ""

    def holder(self, certificate: bytes) -> str:
        """Return who signed a log, as a URI.

        Args:
            certificate: The signer's certificate, as PEM.

        Returns:
            The URI of its identity.

        Raises:
            FederationError: If this anchor cannot tell.
        """
        holders = Holders(certificate) if self.key is not None else self._holders()
        return holders.read(certificate).identity.uri

    def _holders(self) -> Holders:
        """Who holds certificates, by the kit or the authority's certificate."""
        if self.authority is None:
            return known_roots(Path(self.kit or "")).holders
        pem = read_file(self.authority, "authority's certificate")
        load(pem, str(self.authority))
        return Holders(pem)


def verify(folder: Path, anchor: Anchor, witnesses: Sequence[Path] = ()) -> tuple[int, list[Finding]]:
    """Verify an audit log.

    Args:
        folder: Folder of audit.jsonl and audit.head; log-counter.json is checked if it is there.
        anchor: Whom the reader trusts.
        witnesses: Audit logs of other participants, or their folders. What they noted of this log must be in it.

    Returns:
        Number of lines, and the problems; an empty list if the log is intact.

    Raises:
        ConfigError: There is no log in the folder, or a file of the anchor or a witness cannot be read.
    """
    log = log_file(folder)
    findings, count, mark = [], 0, BEGIN
    digests = {0: BEGIN.digest}
    with open(log, "rb") as file:
        for count, line in enumerate(file, 1):
            problem, fields = checked_line(line, mark)
            if problem:
                findings.append(Finding(count, problem))
            if fields.get("action") == DAMAGED:
                findings.append(Finding(count, f"was written over damage at {fields.get('time')}: {fields['problem']}"))
            mark = next_mark(fields, mark)
            digests[mark.number] = mark.digest
    head = Head.read(_contents(folder / HEAD_FILE))
    findings += [Finding(0, text) for text in _head_problems(head, digests, mark.number, anchor)]
    if (folder / COUNTER_FILE).exists():
        counter = Head.read(_contents(folder / COUNTER_FILE))
        findings += [Finding(0, text) for text in _counter_problems(counter, head, anchor)]
    for witness in witnesses:
        findings += [Finding(0, text) for text in _witness_problems(witness, digests, head, anchor)]
    return count, findings


def log_file(folder: Path) -> Path:
    """Return the path of the log in a folder.

    Args:
        folder: Folder of audit.jsonl.

    Returns:
        Its path.

    Raises:
        ConfigError: There is no log in the folder.
    """
    path = folder / LOG_FILE
    if not path.exists():
        raise ConfigError("there is no audit log here", where=str(path), fix="pass the folder that holds audit.jsonl")
    return path


def signer(folder: Path) -> str:
    """Return who signed a log, for people to read. Empty if that is not known.

    Args:
        folder: Folder of audit.head.

    Returns:
        The identity in the signer's certificate.
    """
    head = Head.read(_contents(folder / HEAD_FILE))
    return "" if head is None else _signer_of(head)


def entries(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a log without verifying them.

    Args:
        folder: Folder of audit.jsonl.

    Returns:
        The fields of each line, without lines that `verify` reports as no entries.
    """
    read = []
    for line in (folder / LOG_FILE).read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            fields = json.loads(line)
            if isinstance(fields, dict):
                read.append(fields)
    return read


def _head_problems(head: Head | None, digests: Mapping[int, str], last: int, anchor: Anchor) -> Iterator[str]:
    if head is None:
        yield f"{HEAD_FILE}, which signs the last line, is missing or cannot be read"
        return
    number = head.mark.number
    if not head.valid:
        yield f"the signature in {HEAD_FILE} is not valid"
    if number > last:
        yield f"{number - last} lines are missing at the end: line {number} was signed"
    elif digests.get(number) != head.mark.digest:
        yield f"line {number} is not the one that was signed"
    if number < last:
        yield f"{last - number} lines follow the last signed one"
    if problem := anchor.problem(head.certificate):
        yield problem


def _counter_problems(counter: Head | None, head: Head | None, anchor: Anchor) -> Iterator[str]:
    if counter is None or not counter.valid or anchor.problem(counter.certificate):
        yield f"{COUNTER_FILE}, which counts the lines, was changed"
    elif head is not None and _signer_of(counter) != _signer_of(head):
        yield f"{COUNTER_FILE} was signed by {_signer_of(counter)}, {HEAD_FILE} by {_signer_of(head)}"
    elif head is not None and counter.mark.number > head.mark.number:
        yield f"{COUNTER_FILE} has counted {counter.mark.number} lines; {HEAD_FILE} signs line {head.mark.number}"


def _witness_problems(path: Path, digests: Mapping[int, str], head: Head | None, anchor: Anchor) -> Iterator[str]:
    """Compare a log with what another participant noted of it."""
    file = path / LOG_FILE if path.is_dir() else path
    try:
        owner = anchor.holder(head.certificate) if head else ""
    except FederationError:
        yield f"nobody can tell whose log {file} has noted: pass --kit with the kit that wrote this one"
        return
    for line in read_file(file, "audit log").splitlines():
        try:
            fields = json.loads(line)
            mark = LineMark.of(fields["line"]) if fields["action"] == NOTED and fields["of"] == owner else None
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if mark is not None and digests.get(mark.number) != mark.digest:
            yield f"line {mark.number} is not the one that {file} noted at {fields.get('time')}"


def _signer_of(head: Head) -> str:
    try:
        return str(read_certificate(head.certificate).identity)
    except FederationError:
        return ""


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _public_key(path: Path) -> str:
    pem = read_file(path, "public key")
    try:
        key = load(pem).public_key() if b"CERTIFICATE" in pem else load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm, FederationError):
        key = None
    if not isinstance(key, PublicKey):
        raise ConfigError(
            "this is neither a public key nor a certificate with a P-256 key, in PEM",
            where=str(path),
            fix="pass the signer's certificate.pem, or what `openssl x509 -pubkey -noout` prints of it",
        )
    return fingerprint(key)


def _key_of(certificate: bytes) -> str:
    try:
        key = load(certificate).public_key()
    except FederationError:
        return ""
    return fingerprint(key) if isinstance(key, PublicKey) else ""
