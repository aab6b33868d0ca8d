"""Names and folders of the trainings of a job: a script that trains more than once takes part in a run each time."""

from __future__ import annotations

from pathlib import Path


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
