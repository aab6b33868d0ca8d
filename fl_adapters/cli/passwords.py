"""Passwords for commands: from an environment variable, a file or a prompt, and never from the command line."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import typer

from fl_runtime.errors import ConfigError


def given_password(typed: str, file: Path | None, variable: str) -> str:
    """Return the password that the user has given without a prompt.

    Args:
        typed: What stands after `--password` on the command line, where every user of the machine can read it.
        file: File that holds the password in its first line, or None.
        variable: Name of the environment variable that may hold it.

    Returns:
        The password; "" if none was given.

    Raises:
        ConfigError: If it was typed on the command line, or the file cannot be used.
    """
    if typed:
        raise ConfigError(
            "a password cannot be given on the command line: other users of this machine can read it there, and the "
            "shell keeps it in its history",
            where="--password",
            fix=f"set ${variable}, pass --password-file FILE, or let the command ask; then choose a new password",
        )
    return _first_line(file) if file is not None else os.environ.get(variable, "")


def ask_password(what: str, variable: str, *, confirm: bool = False) -> str:
    """Ask for a password at the terminal, which does not show it.

    Args:
        what: What to ask for, such as "Password of north.zip".
        variable: Name of the environment variable to set where there is no terminal, for the error message.
        confirm: Whether to ask twice, for a new password.

    Returns:
        The password.

    Raises:
        ConfigError: If there is no terminal.
    """
    if not sys.stdin.isatty():
        raise ConfigError(
            "a password is needed, and there is no terminal to ask at",
            where=what,
            fix=f"set ${variable}, or pass --password-file FILE",
        )
    return str(typer.prompt(what, hide_input=True, confirmation_prompt=confirm, err=True))


def _first_line(file: Path) -> str:
    try:
        status = file.stat()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the password file cannot be read: {error}", where=str(file), fix="check the path") from None
    mode = stat.S_IMODE(status.st_mode)
    if os.name == "posix" and stat.S_ISREG(status.st_mode) and mode & 0o077:
        raise ConfigError(
            f"the password file can be read by others (mode {mode:04o})", where=str(file), fix=f"chmod 600 {file}"
        )
    if not lines or not lines[0]:
        raise ConfigError("the password file has no password in its first line", where=str(file), fix="write it there")
    return lines[0]
