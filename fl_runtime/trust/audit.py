"""The audit log: what was done and what was refused, as JSON lines that each carry the digest of the line before.

A line that is edited, removed or moved breaks the chain. Lines taken off the end do not, and whoever may write the
file could write a whole new chain: so audit.head names the last line, signed with the kit's private key.
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
_LONGEST = 2_000
_HEAD_BYTES = 4096


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a log. line: counted from 1; 0 for the log as a whole."""

    line: int
    what: str


class AuditLog:
    """Appends to folder/audit.jsonl. Threads and processes may share it; a line is on its way to disk on return.

    kit: folder of the startup kit whose key signs. Raises StoreError where the log cannot be written.
    """

    def __init__(self, folder: Path, kit: Path) -> None:
        self._log, self._head, self._kit = folder / LOG_FILE, folder / HEAD_FILE, kit
        self._lock = threading.Lock()
        self._key: tuple[int, PrivateKey] | None = None  # when its file was written, and the key
        self._end = (-1, 0, _FIRST)  # size of the log after the last line, that line's number and digest
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone() as file:
            unsigned = _count(file) - _signed_count(self._head)
        if unsigned > 0:  # whoever wrote them was killed before it could sign
            self.write("audit log reopened", unsigned_lines=unsigned)

    def write(self, action: str, who: Identity | None = None, *, rule: str = "", error: str = "", **facts: Any) -> None:
        """Put one thing on record. who: None for this process itself. rule, error: of a refusal."""
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": who.uri if who else "",
            "action": action,
            "outcome": "refused" if rule or error else "done",
            **({"rule": rule[:_LONGEST], "error": error[:_LONGEST]} if rule or error else {}),
            **{name: _plain(value) for name, value in facts.items()},
        }
        with self._lock, self._alone() as file:
            number, last = self._end[1:] if file.seek(0, os.SEEK_END) == self._end[0] else _last(file)
            entry = {"number": number + 1, "before": last, **entry}
            digest = _digest(entry)
            line = json.dumps({**entry, "digest": digest})  # ASCII: no line end but our own
            begin = file.seek(0, os.SEEK_END)
            try:
                file.write(line.encode() + b"\n")  # at the end, wherever the file was read
                file.flush()
            except OSError:  # a full disk: no half of a line
                with suppress(OSError):
                    file.truncate(begin)
                raise
            self._end = (file.tell(), number + 1, digest)
            self._sign(number + 1, digest)

    def refused(self, who: Identity | None, action: str, error: FederationError, **facts: Any) -> None:
        """Put a refusal on record, with the rule that it names."""
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
        # one write of always the same length: a kill leaves the old head or the new one; renaming costs ten times more
        descriptor = os.open(self._head, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, json.dumps(head).encode().ljust(_HEAD_BYTES))
        finally:
            os.close(descriptor)

    @contextmanager
    def _alone(self) -> Iterator[Any]:
        """The log, opened for reading and appending, while no other process has it."""
        try:
            with open(self._log, "a+b") as file, _locked(file):
                yield file
        except OSError as error:
            raise StoreError(
                f"the audit log cannot be written: {error.strerror}", where=str(self._log), fix="check the disk"
            ) from None


def verify(folder: Path, kit: Path | None = None) -> tuple[int, list[Finding]]:
    """(number of lines, what is wrong). kit: its authority and identity must be those of the signature.

    Raises ConfigError where there is no log.
    """
    log, head_file = folder / LOG_FILE, folder / HEAD_FILE
    if not log.exists():
        raise ConfigError("there is no audit log here", where=str(log), fix="name the folder that holds audit.jsonl")
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
    """The lines of a log, as they stand."""
    return [json.loads(line) for line in (folder / LOG_FILE).read_text("utf-8").splitlines()]


def _checked(line: bytes, number: int, before: str) -> tuple[str, Mapping[str, Any]]:
    try:
        entry = json.loads(line)
        digest = entry.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError):
        return "is not an entry", {}
    found = {**entry, "digest": digest}
    if digest != _digest(entry):
        return "was edited", found
    if entry.get("number") != number or entry.get("before") != before:
        return "does not follow the line before it: one was removed, added or moved", found
    return "", found


def _head_problems(path: Path, digests: Mapping[int, str], count: int, kit: Path | None) -> Iterator[str]:
    try:
        head = json.loads(path.read_text("utf-8"))
        number, digest, certificate = int(head["number"]), str(head["digest"]), str(head["certificate"]).encode()
        good = signed_by(certificate, f"{number} {digest}".encode(), base64.b64decode(head["signature"]))
    except (OSError, ValueError, KeyError, TypeError, FederationError):
        yield f"{HEAD_FILE}, which signs the last line, is missing or cannot be read"
        return
    if not good:
        yield f"the signature in {HEAD_FILE} does not hold"
    if number > count:
        yield f"{number - count} lines are missing at the end: line {number} was signed"
    elif digests.get(number) != digest:
        yield f"line {number} is not the one that was signed"
    if number < count:
        yield f"{count - number} lines after the last signed one"
    if kit is not None:
        yield from _signer_problems(certificate, kit)


def _signer_problems(certificate: bytes, kit: Path) -> Iterator[str]:
    try:
        check_issued_by(certificate, (kit / "ca.pem").read_bytes())
        mine = read_certificate((kit / "certificate.pem").read_bytes()).identity
        if read_certificate(certificate).identity != mine:
            yield f"{HEAD_FILE} was not signed by {mine}"
    except (OSError, FederationError) as error:
        yield f"the signer of {HEAD_FILE} cannot be checked: {error}"


def _digest(entry: Mapping[str, Any]) -> str:
    text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _count(file: Any) -> int:
    return _last(file)[0]


def _last(file: Any) -> tuple[int, str]:
    """(number, digest) of the last whole line. A line that a killed process left torn is ended, and so found out."""
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
    if os.name != "posix":  # one process at a time there
        yield
        return
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _plain(value: Any) -> Any:
    """JSON values, strings of a bounded length: what is logged may come from the network."""
    if isinstance(value, Mapping):
        return {str(name)[:200]: _plain(item) for name, item in list(value.items())[:100]}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value[:100]]
    if isinstance(value, (int, float, bool, type(None))):
        return value if value == value and value not in (float("inf"), float("-inf")) else str(value)
    return str(value)[:_LONGEST]
