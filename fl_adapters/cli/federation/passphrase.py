"""Where commands take the passphrase of an authority's key from: a file, the environment, or a prompt."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fl_runtime.errors import ConfigError

if TYPE_CHECKING:
    from fl_runtime.trust.authority import Authority


def open_authority(folder: Path, file: Path | None) -> Authority:
    """Open an authority. Its passphrase is asked for at the first signature, if its key has one.

    Args:
        folder: The authority's folder.
        file: File with the passphrase, or None.

    Returns:
        The authority.

    Raises:
        ConfigError: The folder holds no authority.
    """
    from fl_runtime.trust.authority import Authority

    return Authority(folder, present(file))


def present(file: Path | None) -> Callable[[], bytes]:
    """Return the function that finds the passphrase of an existing key."""

    def ask() -> bytes:
        from fl_runtime.trust.passphrase import no_passphrase

        found = given(file)
        if found:
            return found
        if not sys.stdin.isatty():
            return no_passphrase()
        return str(typer.prompt("passphrase of the authority's key", hide_input=True, err=True)).encode()

    return ask


def given(file: Path | None) -> bytes:
    """Return the passphrase in the file, else in the environment, else b"". Raises ConfigError for an empty one."""
    from fl_runtime.trust.files import read_file
    from fl_runtime.trust.passphrase import VARIABLE

    if file is not None:
        return _not_empty(read_file(file, "passphrase").rstrip(b"\r\n"), str(file))
    value = os.environ.get(VARIABLE)
    return b"" if value is None else _not_empty(value.encode(), f"${VARIABLE}")


def fresh(file: Path | None) -> bytes:
    """Return a new passphrase: that in the file, or one typed twice at a prompt. Raises ConfigError without either."""
    from fl_runtime.trust.files import read_file

    if file is not None:
        return _not_empty(read_file(file, "new passphrase").rstrip(b"\r\n"), str(file))
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to type a new passphrase at", fix="pass --new-file FILE, or --remove")
    typed = typer.prompt("new passphrase", hide_input=True, confirmation_prompt=True, err=True)
    return _not_empty(str(typed).encode(), "the prompt")


def _not_empty(passphrase: bytes, where: str) -> bytes:
    if not passphrase:
        raise ConfigError("the passphrase is empty", where=where, fix="write it in the first line")
    return passphrase
