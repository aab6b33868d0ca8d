"""The audit log: a signed record of what was done and what was refused.

Format of audit.jsonl, one JSON object a line:

    number    number of the line, from 1
    before    digest of the line before; 64 zeros in the first line
    time      ISO 8601, UTC, milliseconds
    who       identity (URI) of the caller; empty for the process itself
    action    what was asked for
    outcome   "done" or "refused"
    rule, error   of a refusal: the rule that applied, and the message
    ...       further facts of the action
    digest    SHA-256 (hexadecimal) of the other fields as JSON with sorted keys, without blanks, in ASCII

A line that is edited, removed or moved breaks the chain of digests. Removing lines from the end would not, and anyone
with write access could make a new chain. Therefore audit.head names the last line, signed with the kit's private key:
a JSON object with number, digest, signature (base64, ECDSA with SHA-256 over "NUMBER DIGEST") and certificate (PEM).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_runtime.errors import ConfigError, FederationError, StoreError
from fl_runtime.trust.certificates import PrivateKey, check_issued_by, read_certificate, read_key, sign, signed_by
from fl_runtime.trust.identity import Identity

LOG_FILE, HEAD_FILE = "audit.jsonl", "audit.head"
_FIRST = "0" * 64
_MAX_CHARS = 2_000
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Finding:
    """A problem in an audit log.

    Attributes:
        line: Number of the line, from 1; 0 for the log as a whole.
        what: Description of the problem.
    """

    line: int
    what: str


class AuditLog:
    """Writes an audit log. Threads and processes may share one log.

    A line has been handed to the operating system when a method returns. It survives the death of the process.

    Args:
        folder: Folder of audit.jsonl and audit.head; created if missing.
        kit: Folder of the startup kit whose key signs the log.

    Raises:
        StoreError: If the log cannot be written.
    """

    def __init__(self, folder: Path, kit: Path) -> None:
        self._log, self._head, self._kit = folder / LOG_FILE, folder / HEAD_FILE, kit
        self._lock = threading.Lock()
        self._key: tuple[int, PrivateKey] | None = None  # modification time of the key file, and the key
        self._end = (-1, 0, _FIRST)  # size of the log after the last line, and that line's number and digest
        folder.mkdir(parents=True, exist_ok=True)
        with self._exclusive() as file:
            unsigned = _count(file) - _signed_count(self._head)
        if unsigned > 0:  # the process that wrote them was killed before it could sign
            self.write("audit log reopened", unsigned_lines=unsigned)

    def write(self, action: str, who: Identity | None = None, *, rule: str = "", error: str = "", **facts: Any) -> None:
        """Append one line.

        Args:
            action: What was done or asked for.
            who: Who asked for it; None for this process itself.
            rule: The rule by which it was refused; empty if it was done.
            error: The message with which it was refused; empty if it was done.
            facts: Further fields of the line. Long texts and lists are cut, since they may come from the network.

        Raises:
            StoreError: If the log cannot be written.
        """
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": who.uri if who else "",
            "action": action,
            "outcome": "refused" if rule or error else "done",
            **({"rule": rule[:_MAX_CHARS], "error": error[:_MAX_CHARS]} if rule or error else {}),
            **{name: _plain(value) for name, value in facts.items()},
        }
        with self._lock, self._exclusive() as file:
            number, last = self._end[1:] if file.seek(0, os.SEEK_END) == self._end[0] else _last(file)
            entry = {"number": number + 1, "before": last, **entry}
            digest = _digest(entry)
            line = json.dumps({**entry, "digest": digest})  # ASCII, so that it contains no line break
            begin = file.seek(0, os.SEEK_END)
            try:
                file.write(line.encode() + b"\n")
                file.flush()
            except OSError:  # a full disk must not leave half a line
                with suppress(OSError):
                    file.truncate(begin)
                raise
            self._end = (file.tell(), number + 1, digest)
            self._sign(number + 1, digest)

    def refused(self, who: Identity | None, action: str, error: FederationError, **facts: Any) -> None:
        """Append a refusal.

        Args:
            who: Who was refused; None for this process itself.
            action: What was asked for.
            error: The refusal. If its `where` begins with "rule ", the rest of it is recorded as the rule.
            facts: Further fields of the line.

        Raises:
            StoreError: If the log cannot be written.
        """
        rule = error.where.removeprefix("rule ") if error.where.startswith("rule ") else error.code
        self.write(action, who, rule=rule, error=error.what, **facts)

    def _sign(self, number: int, digest: str) -> None:
        stamp = (self._kit / "key.pem").stat().st_mtime_ns
        if self._key is None or self._key[0] != stamp:  # a renewed certificate may come with a new key
            self._key = stamp, read_key((self._kit / "key.pem").read_bytes())
        text = f"{number} {digest}"
        head = {
            "number": number,
            "digest": digest,
            "signature": base64.b64encode(sign(self._key[1], text.encode())).decode(),
            "certificate": (self._kit / "certificate.pem").read_text("ascii"),
        }
        # one write of constant length leaves the old head or the new one after a kill; renaming takes ten times as long
        descriptor = os.open(self._head, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(head).encode().ljust(_HEAD_BYTES))
        finally:
            os.close(descriptor)

    @contextmanager
    def _exclusive(self) -> Iterator[Any]:
        """Open the log for reading and appending, locked against other processes."""
        try:
            with open(self._log, "a+b") as file, _locked(file):
                yield file
        except OSError as error:
            raise StoreError(
                f"the audit log cannot be written: {error.strerror}", where=str(self._log), fix="check the disk"
            ) from None


def verify(folder: Path, kit: Path | None = None) -> tuple[int, list[Finding]]:
    """Verify an audit log.

    Args:
        folder: Folder of audit.jsonl and audit.head.
        kit: Folder of the kit that should have signed it. None: any signer is accepted.

    Returns:
        Number of lines, and the problems; an empty list if the log is intact.

    Raises:
        ConfigError: If there is no log in the folder.
    """
    log, head_file = folder / LOG_FILE, folder / HEAD_FILE
    if not log.exists():
        raise ConfigError("there is no audit log here", where=str(log), fix="pass the folder that holds audit.jsonl")
    findings, count, digest = [], 0, _FIRST
    digests = {0: _FIRST}
    for count, line in enumerate(log.read_bytes().splitlines(), 1):
        problem, entry = _checked(line, count, digest)
        if problem:
            findings.append(Finding(count, problem))
        digest = str(entry.get("digest", ""))
        digests[count] = digest
    findings += [Finding(0, text) for text in _head_problems(head_file, digests, count, kit)]
    return count, findings


def entries(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a log without verifying them.

    Args:
        folder: Folder of audit.jsonl.

    Returns:
        The fields of each line.
    """
    return [json.loads(line) for line in (folder / LOG_FILE).read_text("utf-8").splitlines()]


def _checked(line: bytes, number: int, previous: str) -> tuple[str, Mapping[str, Any]]:
    try:
        entry = json.loads(line)
        digest = entry.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        return "is not an entry", {}
    line_fields = {**entry, "digest": digest}
    if digest != _digest(entry):
        return "was edited", line_fields
    if entry.get("number") != number or entry.get("before") != previous:
        return "does not follow the line before it: one was removed, added or moved", line_fields
    return "", line_fields


def _head_problems(path: Path, digests: Mapping[int, str], count: int, kit: Path | None) -> Iterator[str]:
    try:
        head = json.loads(path.read_text("utf-8"))
        number, digest, certificate = int(head["number"]), str(head["digest"]), str(head["certificate"]).encode()
        valid = signed_by(certificate, f"{number} {digest}".encode(), base64.b64decode(head["signature"]))
    except (OSError, ValueError, KeyError, TypeError, FederationError):
        yield f"{HEAD_FILE}, which signs the last line, is missing or cannot be read"
        return
    if not valid:
        yield f"the signature in {HEAD_FILE} is not valid"
    if number > count:
        yield f"{number - count} lines are missing at the end: line {number} was signed"
    elif digests.get(number) != digest:
        yield f"line {number} is not the one that was signed"
    if number < count:
        yield f"{count - number} lines follow the last signed one"
    if kit is not None:
        yield from _signer_problems(certificate, kit)


def _signer_problems(certificate: bytes, kit: Path) -> Iterator[str]:
    try:
        check_issued_by(certificate, (kit / "ca.pem").read_bytes())
        owner = read_certificate((kit / "certificate.pem").read_bytes()).identity
        if read_certificate(certificate).identity != owner:
            yield f"{HEAD_FILE} was not signed by {owner}"
    except (OSError, FederationError) as error:
        yield f"the signer of {HEAD_FILE} cannot be checked: {error}"


def _digest(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _count(file: Any) -> int:
    return _last(file)[0]


def _last(file: Any) -> tuple[int, str]:
    """Return (number, digest) of the last line, after ending a line that a killed process left incomplete."""
    end = file.seek(0, os.SEEK_END)
    size = 4096
    while True:
        start = max(0, end - size)
        file.seek(start)
        tail = file.read(end - start)
        lines = tail.rstrip(b"\n").split(b"\n")
        if start == 0 or len(lines) > 1:
            break
        size *= 4
    if end and not tail.endswith(b"\n"):
        file.write(b"\n")
    if not tail:
        return 0, _FIRST
    try:
        entry = json.loads(lines[-1])
        return int(entry["number"]), str(entry["digest"])
    except (ValueError, KeyError, TypeError):
        file.seek(0)
        return sum(1 for _ in file), ""


def _signed_count(head: Path) -> int:
    try:
        return int(json.loads(head.read_text("utf-8"))["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextmanager
def _locked(file: Any) -> Iterator[None]:
    if os.name != "posix":  # other systems: only one process may use the log
        yield
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _plain(value: Any) -> Any:
    """Return JSON values of bounded length, since what is logged may come from the network."""
    if isinstance(value, Mapping):
        return {str(name)[:200]: _plain(item) for name, item in list(value.items())[:100]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value[:100]]
    if isinstance(value, (int, float, bool, type(None))):
        return value if value == value and value not in (float("inf"), float("-inf")) else str(value)
    return str(value)[:_MAX_CHARS]
