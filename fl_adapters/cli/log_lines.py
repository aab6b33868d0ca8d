"""The own lines of a server or a site daemon: wall clock, level, job and site, on stderr and in rotated files."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.store.tensorfile import disk_error
from fl_runtime.text import printable

LogFormat = Literal["text", "json"]

_OURS = ("fl_adapters", "fl_runtime")
_LINE_CHARS = 4000

log = logging.getLogger("fl_adapters.lines")


@dataclass(frozen=True)
class LogOptions:
    """Where the lines go, and in which form.

    Attributes:
        style: "text", or "json" for one object a line with `time` (seconds since the epoch), `level`, `from` (who
            writes it), `site`, `job` and `text`.
        file: File that they are also written to; None for none.
        file_bytes: Size from which the file is moved to FILE.1, and that to FILE.2.
        older_files: Number of such older files that are kept.
    """

    style: LogFormat = "text"
    file: Path | None = None
    file_bytes: int = 10_000_000
    older_files: int = 3

    @classmethod
    def of(cls, style: str, file: Path | None, file_mb: float, older_files: int) -> LogOptions:
        """Return the options as they were typed.

        Args:
            style: "text" or "json".
            file: See the attribute.
            file_mb: Size from which the file is moved, in millions of bytes.
            older_files: See the attribute.

        Raises:
            ConfigError: The form is another one.
        """
        if style not in ("text", "json"):
            raise ConfigError(f"--log-format cannot be {style!r}", fix="use text or json")
        return cls("json" if style == "json" else "text", file, max(int(file_mb * 1e6), 1), older_files)


STDERR = LogOptions()
"""Lines of text on stderr alone."""


class _Lines(logging.Formatter):
    """Writes a record as one line, with the escapes of everything that is not printable."""

    def __init__(self, who: str, site: str, style: LogFormat) -> None:
        super().__init__()
        self._who, self._site, self._form = who, site, style

    def format(self, record: logging.LogRecord) -> str:
        job, level = str(getattr(record, "job", "")), record.levelname.lower()
        text = printable(record.getMessage(), _LINE_CHARS)
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text}: {printable(_described(record.exc_info[1]), _LINE_CHARS)}"
        if self._form == "json":
            site = str(getattr(record, "site", "")) or self._site
            fields = {"time": round(record.created, 3), "level": level, "from": self._who, "site": site, "job": job}
            return json.dumps({**fields, "text": text}, ensure_ascii=False)
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{clock} {level} {self._who}{f' {printable(job, 200)}' if job else ''}: {text}"


class _LogFile(RotatingFileHandler):
    """A rotated file that says once if it cannot be written, since a full disk would repeat that for every line."""

    _failed = False

    def emit(self, record: logging.LogRecord) -> None:
        before, self._failed = self._failed, False
        super().emit(record)
        if self._failed and not before:
            print(f"the log file {self.baseFilename} cannot be written: {self._why}", file=sys.stderr, flush=True)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the base class calls it so)
        self._failed, self._why = True, sys.exc_info()[1]

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was told
            super().close()


def _is_shown(record: logging.LogRecord) -> bool:
    """Whether a record is one of ours, or a warning of another package."""
    return record.name.partition(".")[0] in _OURS or record.levelno >= logging.WARNING


def _described(error: BaseException) -> str:
    """An error, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{error!r} at {frames[-1].filename}:{frames[-1].lineno}" if frames else repr(error)


def _log_thread_error(ended: threading.ExceptHookArgs) -> None:
    """Write the error that has ended a thread as a line."""
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        name = ended.thread.name if ended.thread else "unknown"
        log.error("the thread %s has ended with an error", name, exc_info=ended.exc_value)


@contextmanager
def written_lines(who: str, options: LogOptions, *, site: str = "") -> Iterator[None]:
    """Send this process's own lines, and all warnings, to stderr and into a file, during a `with` block.

    The error that ends the block is written to the file, too; the command shows it on stderr. Errors that threads do
    not catch become lines as well.

    Args:
        who: Name of the server or site, which every line carries.
        options: Where the lines go, and in which form.
        site: The site that a line is about unless it says another one.

    Raises:
        StoreError: The file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if (file := options.file) is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(
                _LogFile(file, maxBytes=options.file_bytes, backupCount=options.older_files, encoding="utf-8")
            )
        except OSError as error:
            raise disk_error(error, file) from error
    for handler in handlers:
        handler.setFormatter(_Lines(who, site, options.style))
        handler.addFilter(_is_shown)
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in _OURS]
    before = [(logger, logger.handlers, logger.propagate) for logger in (root, *ours)]
    root.handlers = handlers
    for logger in ours:
        logger.handlers, logger.propagate = [], True
    log.setLevel(logging.INFO)
    hook_before, threading.excepthook = threading.excepthook, _log_thread_error
    try:
        yield
    except FederationError as error:
        for handler in handlers[1:]:
            handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "%s", (error,), None))
        raise
    finally:
        threading.excepthook = hook_before
        for logger, own, propagate in before:
            logger.handlers, logger.propagate = own, propagate
        for handler in handlers:
            handler.close()


def say(text: str, job: str = "", site: str = "", *, warning: bool = False) -> None:
    """Write a line for the people who run this process.

    Args:
        text: The line.
        job: Name of the job that it is about; "" for none.
        site: Name of the site that it is about; "" for none.
        warning: Whether something went wrong.
    """
    log.log(logging.WARNING if warning else logging.INFO, "%s", text, extra={"job": job, "site": site})
