"""Names, folders and files of the trainings of a job: a script that trains more than once has a run each time."""

from __future__ import annotations

from pathlib import Path

EVENTS = "events.jsonl"
"""File in the folder of a training with what happened, a line for each event."""
HISTORY = "history.csv"
"""File in the folder of a training with a row for each round and site."""
_DIGITS = 6  # of the number of a training


def training_name(job: str, number: int) -> str:
    """Return the name of a training, by which messages, audit logs and privacy ledgers refer to it.

    Args:
        job: Name of the job.
        number: Number of the training, from 1.

    Returns:
        The job's name for the first training, then "job/2", "job/3", and so on.
    """
    return job if number == 1 else f"{job}/{number}"


def training_folder(folder: Path, number: int) -> Path:
    """Return the folder of a training below the folder of its job.

    Args:
        folder: Folder of the job, such as runs/<job>.
        number: Number of the training, from 1.

    Returns:
        `folder` itself for the first training, then the folders 2, 3, and so on in it.
    """
    return folder if number == 1 else folder / str(number)


def parsed_name(name: str) -> tuple[str, int] | None:
    """Take the name of a training apart, which another participant may have sent.

    Args:
        name: The name. Its job is not checked.

    Returns:
        The job and the number of the training; None if what follows the job is no number of a training.
    """
    job, _, digits = name.partition("/")
    if not digits:
        return job, 1
    return (job, int(digits)) if len(digits) <= _DIGITS and digits.isascii() and digits.isdecimal() else None


def job_of(name: str) -> str:
    """Return the job of a training.

    Args:
        name: Name of a training, from `training_name`.

    Returns:
        The job's own name.
    """
    return name.partition("/")[0]


def number_of(name: str) -> int:
    """Return the number of a training.

    Args:
        name: Name of a training, from `training_name`.

    Returns:
        Its number, from 1.
    """
    number = name.partition("/")[2]
    return int(number) if number.isdecimal() else 1


def first_folder(folder: Path, name: str) -> Path:
    """Return the folder of the same part of the job's first training, which all trainings may share.

    Args:
        folder: A folder in the folder of a training, such as runs/<job>/2/server.
        name: Name of the training, from `training_name`.

    Returns:
        The folder of the first training, such as runs/<job>/server.
    """
    return folder if number_of(name) == 1 else folder.parents[1] / folder.name
