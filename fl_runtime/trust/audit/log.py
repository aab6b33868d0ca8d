"""Writes an audit log, and compares it with what was signed before each line. `lines.py` has the format."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from fl_runtime.errors import FederationError, StoreError
from fl_runtime.trust.audit.lines import (
    BEGIN,
    COUNTER_FILE,
    DAMAGED,
    HEAD_FILE,
    LOG_FILE,
    Head,
    LineMark,
    checked_line,
    digest_of,
    is_sealed,
    next_mark,
    parsed,
    seal_of,
    signed_text,
)
from fl_runtime.trust.audit.syslog import SyslogSender
from fl_runtime.trust.certificates import (
    PrivateKey,
    PublicKey,
    fingerprint,
    key_pem,
    load,
    read_key,
    sign,
)
from fl_runtime.trust.identity import Identity
from fl_runtime.trust.kits import known_roots

log = logging.getLogger(__name__)

_MAX_CHARS = 2_000
_MAX_HEAD_BYTES = 65_536


@dataclass(frozen=True)
class _Signer:
    """The kit's key and certificate, and the state of their files when they were read."""

    stamp: tuple[int, int]
    key: PrivateKey
    seal_key: bytes
    certificate: bytes


class _OpenFile:
    """A file that stays open between the lines, since opening takes longer than all the rest.

    It is opened again where the path has become another file, and in a forked process, which would share its lock.
    """

    def __init__(self, path: Path, flags: int) -> None:
        self._path, self._flags = str(path), flags
        self._file: IO[bytes] | None = None
        self._owner = 0

    def __call__(self) -> IO[bytes]:
        """Return the file, open for reading and writing, without a buffer; made if missing."""
        if self._file is None or self._owner != os.getpid() or not self._is_at_its_path(self._file):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | self._flags, 0o644)
            self._file, self._owner = os.fdopen(descriptor, "r+b", buffering=0), os.getpid()
        return self._file

    def _is_at_its_path(self, file: IO[bytes]) -> bool:
        try:
            there, here = os.stat(self._path), os.fstat(file.fileno())
        except OSError:
            return False
        return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


class _SignedFile:
    """A file that names the last line: the head or the counter. It is replaced by one write of constant length."""

    def __init__(self, path: Path) -> None:
        self._file = _OpenFile(path, 0)
        self._descriptor = -1
        self._written = b""  # what this process wrote last, which needs no check
        self._mark = BEGIN

    def read(self, signer: _Signer, kit: Path) -> LineMark | None:
        """Return the signed line; BEGIN if the file is empty; None if it was changed by somebody else."""
        self._descriptor = self._file().fileno()
        data = os.pread(self._descriptor, _MAX_HEAD_BYTES, 0)
        if not data or data == self._written:
            return self._mark if data else BEGIN
        head = Head.read(data)
        return head.mark if head is not None and head.valid and _is_own(head.certificate, signer, kit) else None

    def write(self, head: bytes, mark: LineMark) -> None:
        """Replace the contents. `read` has opened the file before."""
        os.pwrite(self._descriptor, head, 0)
        if len(head) != len(self._written):
            os.ftruncate(self._descriptor, len(head))
        self._written, self._mark = head, mark


class _DamageLines:
    """The lines of a log that say that it was changed, as far as they were written since `begin`."""

    def __init__(self, path: Path) -> None:
        self._path, self._looked_at, self._last = path, 0, ""

    def begin(self) -> None:
        self._looked_at = self._path.stat().st_size

    def last(self) -> str:
        """Return what the last of them says; "" if there is none."""
        with open(self._path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._looked_at:
                self._looked_at = 0
            file.seek(self._looked_at)
            for line in file:
                self._looked_at += len(line)
                if DAMAGED.encode() in line:
                    with suppress(ValueError, AttributeError, RecursionError):
                        fields = json.loads(line)
                        self._last = str(fields.get("problem")) if fields.get("action") == DAMAGED else self._last
        return self._last


class AuditLog:
    """Writes an audit log. Threads and processes may share one log.

    A line has been handed to the operating system when a method returns. It survives the death of the process.

    Args:
        folder: Folder of audit.jsonl, audit.head and log-counter.json; created if missing.
        kit: Folder of the startup kit whose key signs the log.

    Raises:
        StoreError: If the log cannot be written.
    """

    def __init__(self, folder: Path, kit: Path) -> None:
        self._log, self._kit = folder / LOG_FILE, kit
        self._key_file, self._certificate_file = str(kit / "key.pem"), str(kit / "certificate.pem")
        self._file = _OpenFile(self._log, os.O_APPEND)
        self._head, self._counter = _SignedFile(folder / HEAD_FILE), _SignedFile(folder / COUNTER_FILE)
        self._lock = threading.Lock()
        self._current: _Signer | None = None
        self._end = (b"", BEGIN)  # the last line as this process wrote it, and its mark
        self._syslog: SyslogSender | None = None
        self._damage = _DamageLines(self._log)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock, self._exclusive() as file:
            self._damage.begin()
            self._checked_end(file)

    def write(self, action: str, who: Identity | None = None, *, rule: str = "", error: str = "", **facts: Any) -> None:
        """Append one line. If the log is not what was signed, a line that says so comes before it.

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
            "who": who.uri if who else "",
            "action": action,
            "outcome": "refused" if rule or error else "done",
            **({"rule": rule[:_MAX_CHARS], "error": error[:_MAX_CHARS]} if rule or error else {}),
            **{name: _plain(value) for name, value in facts.items()},
        }
        with self._lock, self._exclusive() as file:
            end = self._checked_end(file)
            self._append(file, entry, end, end.number + 1)

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
        self.write(action, who, rule=rule_of(error), error=error.what, **facts)

    def last_line(self) -> LineMark:
        """Return the mark of the last line, for somebody else to note it.

        Raises:
            StoreError: If the log cannot be read.
        """
        with self._lock, self._exclusive() as file:
            return self._checked_end(file)

    def fault(self) -> str:
        """Return what is wrong with the log; "" if nothing is.

        The log cannot be written, or somebody else has changed it: this process, or another one that writes the log,
        has found that since this object was made.
        """
        try:
            with open(self._log, "ab"):  # the file that is open already may be on a disk that is read-only now
                pass
            with self._lock, self._exclusive() as file:
                self._checked_end(file)
                changed = self._damage.last()
        except OSError as error:
            return f"the audit log cannot be written: {error.strerror} ({self._log})"
        except StoreError as error:
            return f"{error.what} ({self._log})"
        return f"the audit log was changed: {changed} ({self._log})" if changed else ""

    def copy_to(self, folder: Path) -> None:
        """Copy the log and what signs it, as they are between two lines.

        Args:
            folder: The folder for the copies; created if missing.

        Raises:
            StoreError: If the log cannot be read, or a copy cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock, self._exclusive() as file:
            self._checked_end(file)
            for name in (LOG_FILE, HEAD_FILE, COUNTER_FILE):
                shutil.copyfile(self._log.with_name(name), folder / name)

    def ship_to(self, url: str) -> None:
        """Send every further line to a syslog server, too. It never waits for that server.

        A line of the log says how many lines could not be sent.

        Args:
            url: Such as "udp://logs.example.org"; see `SyslogSender`. Empty: lines are not sent.

        Raises:
            ConfigError: If it is not such an address.
        """
        if url:
            self._syslog = SyslogSender(url, self._record_unsent)

    def close(self) -> None:
        """Wait a moment until the lines are sent to the syslog server. Without one there is nothing to close."""
        if self._syslog is not None:
            self._syslog.close()

    def _record_unsent(self, lines: int, reason: str) -> None:
        self.write("lines not sent to syslog", lines=lines, reason=reason)

    # -- the log and its signature ---------------------------------------------------------------------------

    def _checked_end(self, file: IO[bytes]) -> LineMark:
        """Return the last line, after a line that says so if the log is not what was signed."""
        signer, kit = self._signer(), self._kit
        end = self._own_end(file) or _end(file)
        signed, counted = self._head.read(signer, kit), self._counter.read(signer, kit)
        remembered = self._end[1]
        if end == signed == counted and remembered.number <= end.number:
            if end != remembered:  # another process wrote it
                self._end = b"", end
            return end
        problem, unsigned = _compared(file, end, signed, counted, remembered, signer.seal_key)
        if problem:
            highest = max(mark.number for mark in (end, signed, counted, remembered) if mark is not None)
            log.warning("the audit log %s was changed: %s", self._log, problem)
            entry = {"who": "", "action": DAMAGED, "outcome": "done", "problem": problem}
            return self._append(file, entry, end, highest + 1)
        if unsigned:
            reopened = {"who": "", "action": "audit log reopened", "outcome": "done", "unsigned_lines": unsigned}
            return self._append(file, reopened, end, end.number + 1)
        return end

    def _own_end(self, file: IO[bytes]) -> LineMark | None:
        """Return the last line if it is the one that this process wrote last."""
        line, mark = self._end
        start = os.fstat(file.fileno()).st_size - len(line)
        return mark if line and start >= 0 and os.pread(file.fileno(), len(line), start) == line else None

    def _append(self, file: IO[bytes], entry: Mapping[str, Any], end: LineMark, number: int) -> LineMark:
        """Append a line behind `end`, then sign it. Returns its mark."""
        signer = self._signer()
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = {"number": number, "before": end.digest, "time": time, **entry}
        fields["seal"] = seal_of(fields, signer.seal_key)
        mark = LineMark(number, digest_of(fields))
        text = json.dumps({**fields, "digest": mark.digest})  # ASCII, so that it contains no line break
        line = text.encode() + b"\n"
        begin = os.fstat(file.fileno()).st_size
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:  # a full disk must not leave half a line
            with suppress(OSError):
                file.truncate(begin)
            raise
        self._end = line, mark
        signature = Head(mark, sign(signer.key, signed_text(mark)), signer.certificate).to_bytes()
        self._head.write(signature, mark)
        self._counter.write(signature, mark)
        if self._syslog is not None:
            self._syslog.send(text, refused=entry["outcome"] == "refused")
        return mark

    def _signer(self) -> _Signer:
        """Return the kit's key and certificate. Read again when they were renewed."""
        stamp = os.stat(self._key_file).st_mtime_ns, os.stat(self._certificate_file).st_mtime_ns
        if self._current is None or self._current.stamp != stamp:
            key = read_key(Path(self._key_file).read_bytes(), self._key_file)
            seal_key = hashlib.sha256(b"fl-adapters audit" + key_pem(key)).digest()
            self._current = _Signer(stamp, key, seal_key, Path(self._certificate_file).read_bytes())
        return self._current

    @contextmanager
    def _exclusive(self) -> Iterator[IO[bytes]]:
        """Open the log for reading and appending, locked against other processes."""
        try:
            file = self._file()
            with _locked(file):
                yield file
        except OSError as error:
            raise StoreError(
                f"the audit log cannot be written: {error.strerror}", where=str(self._log), fix="check the disk"
            ) from None


def rule_of(error: FederationError) -> str:
    """The rule by which something was refused: what follows "rule " in the error's `where`, else the error's code."""
    return error.where.removeprefix("rule ") if error.where.startswith("rule ") else error.code


def _is_own(certificate: bytes, signer: _Signer, kit: Path) -> bool:
    """Whether a certificate is one of a kit: for its key, or of a trusted authority for the same participant."""
    try:
        key = load(certificate).public_key()
        if isinstance(key, PublicKey) and fingerprint(key) == fingerprint(signer.key.public_key()):
            return True
        holders = known_roots(kit).holders
        return holders.checked(certificate).identity == holders.read(signer.certificate).identity
    except (FederationError, OSError):
        return False


def _compared(
    file: IO[bytes],
    end: LineMark,
    signed: LineMark | None,
    counted: LineMark | None,
    remembered: LineMark,
    seal_key: bytes,
) -> tuple[str, int]:
    """Compare a log with what was signed.

    Returns:
        The problem, empty if there is none, and the number of lines that were written but not signed, as by a process
        that was killed.
    """
    highest = max((mark for mark in (signed, counted, remembered) if mark is not None), key=lambda mark: mark.number)
    at_highest, unsigned, foreign, counts = BEGIN, 0, 0, False
    mark = BEGIN
    file.seek(0)
    for line in file:
        _, fields = checked_line(line, mark)
        mark = next_mark(fields, mark)
        counts = "seal" in fields  # lines of earlier versions have neither seal nor counter
        if mark.number == highest.number:
            at_highest = mark
        elif mark.number > highest.number:
            unsigned += 1
            if fields and not is_sealed(fields, seal_key):
                foreign = foreign or mark.number
    problems = []
    if signed is None or signed.number < highest.number or (signed == BEGIN and end.number > 1):
        problems.append(f"{HEAD_FILE}, which signs the last line, was removed or changed")
    if counted is None or (counts and end.number > 1 and counted.number < highest.number - 1):
        problems.append(f"{COUNTER_FILE}, which counts the lines, was removed or changed")
    if highest.number > end.number:
        problems.append(_lost(end.number + 1, highest.number))
    elif at_highest != highest:
        problems.append(f"line {highest.number} is not the one that was signed")
    if foreign:
        problems.append(f"line {foreign} was not written with this kit's key")
    return "; ".join(problems), unsigned


def _lost(first: int, last: int) -> str:
    if first == 1:
        return f"all lines were removed: there were {last}"
    return f"line {last} was removed" if first == last else f"lines {first} to {last} were removed"


def _end(file: IO[bytes]) -> LineMark:
    """Return the mark of the last line, after ending a line that a killed process left incomplete."""
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
    if not tail:
        return BEGIN
    if not tail.endswith(b"\n"):
        file.write(b"\n")
    try:
        mark = LineMark.of(parsed(lines[-1]))
    except (ValueError, RecursionError):
        mark = None
    if mark is not None:
        return mark
    mark = BEGIN
    file.seek(0)
    for line in file:
        mark = next_mark(checked_line(line, mark)[1], mark)
    return mark


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
