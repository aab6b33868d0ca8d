"""A PostgreSQL of the test's own: Debian's package, run by an unprivileged user on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

START_S = 60.0


def programs() -> Path | None:
    """Return the folder with initdb and postgres, or None if PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "/none")]
    return found[-1].parent if found[-1].exists() else None


def _user() -> str | None:
    """PostgreSQL refuses to run as root: the user to run it as, or None for this one."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@contextmanager
def postgres() -> Iterator[str]:
    """Run PostgreSQL for the block, and yield the URL of a database. Skips the test if it is not installed."""
    pytest.importorskip("psycopg")
    if programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with running_postgres() as server:
        yield server.url


class Postgres:
    """A PostgreSQL that runs, and can be restarted.

    Attributes:
        url: URL of a database in it.
    """

    def __init__(self, command: list[str], run: dict[str, Any], url: str) -> None:
        self.url, self._command, self._run = url, command, run
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, **self._run)
        _until_it_answers(self.url, self._process)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it: SIGINT breaks its connections, SIGQUIT does not even write what is in its memory."""
        self._process.send_signal(number)
        self._process.wait(START_S)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Run PostgreSQL, which is installed, for the block."""
    folder = programs()
    assert folder is not None
    data = Path(tempfile.mkdtemp(prefix="fl-pg-", dir="/tmp"))
    user = _user()
    if user:
        shutil.chown(data, user)
    run = {"user": user, "cwd": data, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    subprocess.run(
        [folder / "initdb", "-D", data / "db", "-U", "test", "--auth=trust", "--no-sync", "-E", "UTF8", "--locale=C"],
        check=True,
        timeout=START_S,
        **run,  # type: ignore[call-overload]
    )
    command = [str(folder / "postgres"), "-D", str(data / "db"), "-k", str(data), "-c", "listen_addresses=", "-c"]
    server = Postgres([*command, "fsync=off"], run, f"postgresql://test@/postgres?host={data}")
    try:
        yield server
    finally:
        server.stop(signal.SIGINT)
        shutil.rmtree(data, ignore_errors=True)


def _until_it_answers(url: str, server: subprocess.Popen[bytes]) -> None:
    import psycopg

    deadline, answers = time.monotonic() + START_S, False
    while not answers:
        assert server.poll() is None, "PostgreSQL ended"
        assert time.monotonic() < deadline, f"PostgreSQL does not answer after {START_S:g} s"
        time.sleep(0.05)
        with suppress(psycopg.OperationalError):
            psycopg.connect(url).close()
            answers = True


@contextmanager
def database(url: str, name: str) -> Iterator[str]:
    """Make an empty database for the block, and yield its URL."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield url.replace("/postgres?", f"/{name}?")
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
