"""Which run a message of a secure sum belongs to, the rules of a site, and who signs and verifies its keys."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fl_runtime.errors import ConfigError
from fl_runtime.trainings import job_of
from fl_runtime.types import Settings

DEFAULT_THRESHOLD = 0.6


@dataclass(frozen=True)
class Context:
    """The run that keys, shares and signatures belong to; they are valid in no other.

    Attributes:
        job: Name of the job.
        training: Name of the training within the job.
        run_id: Identifier of the run.
    """

    job: str
    training: str
    run_id: str


@dataclass(frozen=True)
class SumRules:
    """What a site demands of a secure sum; the server cannot lower it.

    Attributes:
        min_cohort: Smallest number of sites whose vectors may be summed, at least 2. With 2 sites each learns the
            other's vector from the total.
        threshold: Share of a site's holders needed to open one of its secrets, from 0.5: t = floor(threshold * holders)
            + 1. A higher one tolerates more colluding sites and fewer dropouts.

    Raises:
        ConfigError: If a rule is out of range.
    """

    min_cohort: int = 3
    threshold: float = DEFAULT_THRESHOLD

    def __post_init__(self) -> None:
        if self.min_cohort < 2:
            raise ConfigError(
                f"min_cohort={self.min_cohort!r}: a sum over one site is that site's own vector", fix="use 2 or more"
            )
        if not 0.5 <= self.threshold < 1:
            raise ConfigError(
                f"threshold={self.threshold!r} of a secure sum is out of range",
                fix="use at least 0.5, so that no two groups of holders can open different secrets, and less than 1",
            )

    def needed(self, holders: int) -> int:
        """Return how many holders open a secret.

        Args:
            holders: Number of holders, the site itself among them.

        Returns:
            The threshold t.
        """
        return needed_holders(self.threshold, holders)


def needed_holders(threshold: float, holders: int) -> int:
    """Return t = floor(threshold * holders) + 1."""
    return math.floor(threshold * holders + 1e-9) + 1  # 0.6 * 55 is 32.999... in float64


def noise_sharers(sites: int) -> int:
    """Return among how many sites the noise of a secure sum is divided.

    Args:
        sites: Number of sites that are asked for a round.

    Returns:
        How many of them the default threshold takes. A sum over fewer has too little noise.
    """
    return needed_holders(DEFAULT_THRESHOLD, sites)


def distributed_noise(filters: Iterable[Settings]) -> list[Settings]:
    """Return the filters of a job whose noise is divided among its sites.

    Args:
        filters: Settings of the job's filters.

    Returns:
        Those of `GaussianDP` with `distributed`.
    """
    return [dict(item) for item in filters if item.get("name") == "GaussianDP" and item.get("distributed")]


def context_of(job: str, filters: Iterable[Settings] = ()) -> Context:
    """Return the run that masks belong to.

    Sites whose jobs ask for other shares of noise are in other runs, so no sum has less noise than a site was told.

    Args:
        job: Name of the training, such as "diagnosis" or "diagnosis/2".
        filters: The job's filters.

    Returns:
        Its context: one training is one run.
    """
    shared = distributed_noise(filters)
    return Context(job_of(job), job, json.dumps(shared, sort_keys=True) if shared else "")


class Signer(Protocol):
    """Signs with the private key of a site's certificate.

    Attributes:
        certificate: The certificate as PEM, and after it those that lead to the root.
    """

    @property
    def certificate(self) -> bytes:
        """The certificate as PEM, and after it those that lead to the root."""
        ...

    def sign(self, statement: bytes) -> bytes:
        """Return the signature of a statement."""
        ...


class Verifier(Protocol):
    """Knows which certificates belong to the sites of a federation."""

    def verify(self, site: str, statement: bytes, signature: bytes, certificate: bytes) -> None:
        """Check that a site has signed a statement.

        Args:
            site: Name of the site.
            statement: What should have been signed.
            signature: The signature.
            certificate: Certificate of the signer as PEM, and after it those that lead to the root.

        Raises:
            PermissionDeniedError: If that site's certificate is not valid here, or did not sign the statement.
        """
        ...


def label(purpose: str, context: Context, *parts: object) -> bytes:
    """Return bytes that name one use of a key: no two uses have the same.

    Args:
        purpose: What the key is for.
        context: The run.
        parts: Texts, numbers and lists of both that tell this use from others.

    Returns:
        A JSON text.
    """
    fields = ["fl-adapters secure sum 1", purpose, context.job, context.training, context.run_id, *parts]
    return json.dumps(fields, separators=(",", ":")).encode()
