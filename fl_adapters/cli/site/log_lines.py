"""The site daemon's own lines: wall clock, level, site and job, as text or JSON, on stderr and in a rotated file."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Literal

from fl_runtime.store.tensorfile import disk_error
from fl_runtime.text import printable

LogFormat = Literal["text", "json"]

_FILE_BYTES = 10_000_000
_OLDER_FILES = 3
_LINE_CHARS = 4000

log = logging.getLogger("fl_adapters.site")


class _Lines(logging.Formatter):
    """Writes a record as one line."""

    def __init__(self, site: str, style: LogFormat) -> None:
        super().__init__()
        self._site, self._form = site, style

    def format(self, record: logging.LogRecord) -> str:
        job, level = str(getattr(record, "job", "")), record.levelname.lower()
        text = printable(record.getMessage(), _LINE_CHARS)
        if record.exc_info:
            text = f"{text}: {printable(repr(record.exc_info[1]), _LINE_CHARS)}"
        if self._form == "json":
            fields = {"time": round(record.created, 3), "level": level, "site": self._site, "job": job, "text": text}
            return json.dumps(fields, ensure_ascii=False)
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{clock} {level} {self._site}{f' {job}' if job else ''}: {text}"


@contextmanager
def written_lines(site: str, style: LogFormat, file: Path | None) -> Iterator[None]:
    """Send the daemon's lines, and warnings of this package, to stderr and into a file, during a `with` block.

    Args:
        site: Name of the site, which every line carries.
        style: "text", or "json" for one object a line with `time` (seconds since the epoch), `level`, `site`, `job`
            and `text`.
        file: The file; beyond 10 MB it is moved to FILE.1, and three older ones are kept. None for none.

    Raises:
        StoreError: The file cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handlers.append(RotatingFileHandler(file, maxBytes=_FILE_BYTES, backupCount=_OLDER_FILES, encoding="utf-8"))
        except OSError as error:
            raise disk_error(error, file) from error
    for handler in handlers:
        handler.setFormatter(_Lines(site, style))
    loggers = [logging.getLogger(name) for name in ("fl_adapters", "fl_runtime")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = handlers, False
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, (own, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = own, propagate
        for handler in handlers:
            handler.close()


def say(text: str, job: str = "", *, warning: bool = False) -> None:
    """Write a line for people at the site.

    Args:
        text: The line.
        job: Name of the job that it is about; "" for none.
        warning: Whether something went wrong.
    """
    log.log(logging.WARNING if warning else logging.INFO, "%s", text, extra={"job": job})
