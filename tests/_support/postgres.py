"""A PostgreSQL of the test's own: Debian's package, run by an unprivileged user on a socket in a folder of its own."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
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
    server = subprocess.Popen(
        [folder / "postgres", "-D", data / "db", "-k", data, "-c", "listen_addresses=", "-c", "fsync=off"],
        **run,  # type: ignore[call-overload]
    )
    try:
        url = f"postgresql://test@/postgres?host={data}"
        _until_it_answers(url, server)
        yield url
    finally:
        server.terminate()
        server.wait(START_S)
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
