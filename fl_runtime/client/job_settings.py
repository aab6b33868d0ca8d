"""The settings of a job as its server sends them, read for this version."""

from __future__ import annotations

import math
from dataclasses import fields

from fl_runtime.errors import ProtocolError
from fl_runtime.text import printable
from fl_runtime.types import RunSettings, Settings


def run_settings(job: Settings) -> RunSettings:
    """Return the settings of a job, without those that this version does not know.

    Args:
        job: The fields of `RunSettings`, as JSON values.

    Returns:
        The settings.

    Raises:
        ProtocolError: They cannot be read, or no round could be made of them.
    """
    try:
        known = {field.name: job[field.name] for field in fields(RunSettings) if field.name in job}
        settings = RunSettings(**known | {"sites": tuple(job["sites"])})
        factors = [float(settings.site_weights.get(name, 1.0)) for name in settings.sites]
        if not factors or not all(0 < factor < math.inf for factor in factors):
            raise ValueError("it has no sites, or weights that are not above zero")
        if not 0 < settings.fraction <= 1:
            raise ValueError(f"its fraction is {settings.fraction}")
        return settings
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ProtocolError(
            f"the job's settings cannot be read: {printable(str(error), 200)}",
            where=f"what the server sent about {printable(str(job.get('name', 'the job')), 100)}",
            fix="ask the server's operator",
        ) from None
