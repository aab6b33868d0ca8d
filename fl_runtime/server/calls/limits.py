"""Per-site limits on server memory, journal, history and disk. All are far above what an honest site sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar, get_args

from fl_runtime.errors import ProtocolError, UpdateRefusedError
from fl_runtime.server.registration import Member
from fl_runtime.text import METRIC_NAMES, is_metric_name, printable
from fl_runtime.types import CohortRules, OwnPart, Update
from fl_runtime.wire.manifest import Manifest

T = TypeVar("T")

MAX_METRICS = 1_000
MAX_ENTRIES = 256
MAX_TEXT_CHARS = 4_096
MAX_ENCODING_CHARS = 2**16
MAX_COUNT = 2**53
"""Most examples and steps of one round. More would fit neither a double nor the journal."""

MAX_ROUNDS = 2**31 - 1
"""Largest number of rounds that a script may propose to wait for a better one."""

MAX_DESCRIBED = 500_000
"""Most tensors that one site may describe in one run, over all its manifests."""

MAX_METRIC_NAMES = 2_000
"""Most different names of metrics that one site may use in one run."""

_EXTRA_TIMES, _EXTRA_BYTES = 8, 2**27
_EXTRA_TENSORS = 1_000


class MetricNames:
    """The names of metrics that sites have used in a run. Each gets a column of the history and a curve."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, str]] = {}

    def known(self, site: str, metrics: Mapping[str, T]) -> dict[str, T]:
        """Note the names of a site's metrics.

        Args:
            site: Name of the site.
            metrics: Metrics by name.

        Returns:
            The metrics, under one text object per name, so that memory does not grow with every message.

        Raises:
            ProtocolError: The site has used too many names.
        """
        names = self._names.setdefault(site, {})
        new = [name for name in metrics if name not in names]
        if len(names) + len(new) > MAX_METRIC_NAMES:
            raise ProtocolError(
                f"{site} has given its metrics more than {MAX_METRIC_NAMES} different names in this run",
                fix="use the same names in every round",
            )
        names.update(zip(new, new, strict=True))
        return {names[name]: value for name, value in metrics.items()}


def checked_table(fields: Mapping[str, str], what: str) -> dict[str, str]:
    """Limit the number and length of the free fields of a registration, and return them as printable text."""
    if len(fields) > MAX_ENTRIES or any(len(k) + len(v) > MAX_TEXT_CHARS for k, v in fields.items()):
        raise ProtocolError(
            f"{what} of a registration has more than {MAX_ENTRIES} entries, or an entry of more than {MAX_TEXT_CHARS} "
            "characters"
        )
    return {printable(key): printable(value, lines=True) for key, value in fields.items()}


def checked_rules(
    min_cohort: int, max_share: float, *, own_model_stays: bool, stays: Sequence[str] = ()
) -> CohortRules:
    """The rules of a registration, in which 0 stands for no rule. Unknown parts that stay are left out."""
    if not 0 <= max_share <= 1:  # not a number is neither
        raise ProtocolError(f"a registration asks for max_share={max_share:g}; a share lies between 0 and 1")
    kept = tuple(part for part in get_args(OwnPart) if part in stays)
    return CohortRules(max(min_cohort, 1), max_share or None, own_model_stays, kept)


def check_text(text: str, what: str, limit_chars: int = 200) -> str:
    if len(text) > limit_chars:
        raise ProtocolError(f"{what} is {len(text)} characters long; the limit is {limit_chars}")
    if not text.isprintable():
        raise ProtocolError(f"{what} is not printable")
    return text


def check_count(count: int, what: str) -> int:
    if count > MAX_COUNT:
        raise ProtocolError(f"{what} is {count}; the limit is {MAX_COUNT}")
    return count


def check_metrics(metrics: object) -> None:
    """Limit the number of metrics in a message, and what they may be called: names end up in tables and on screens."""
    if not isinstance(metrics, dict):
        return
    if len(metrics) > MAX_METRICS:
        raise ProtocolError(f"a message has {len(metrics)} metrics; the limit is {MAX_METRICS}")
    wrong = [name for name in metrics if not is_metric_name(name)]
    if wrong:
        raise ProtocolError(f"a metric cannot be called {str(wrong[0])[:50]!r}", fix=METRIC_NAMES)


def check_tensor_count(count: int, agreed: Manifest | None) -> None:
    """Refuse a manifest that cannot be one of this run's by the number of its tensors, before they are read."""
    if agreed is not None and count > _EXTRA_TIMES * len(agreed.tensors) + _EXTRA_TENSORS:
        raise ProtocolError(
            f"a message describes {count} tensors; the model that the sites agreed on has {len(agreed.tensors)}",
            fix="build the same model at every site",
        )


def check_described(member: Member, manifest: Manifest) -> None:
    """Count the tensors of a manifest that the server has not seen before. Called under the run's lock."""
    member.described += len(manifest.tensors)
    if member.described > MAX_DESCRIBED:
        raise ProtocolError(
            f"{member.name} has described more than {MAX_DESCRIBED} tensors in this run",
            fix="the model must not change its parameters during a run",
        )


def check_size(manifest: Manifest, model_bytes: int) -> None:
    """Limit the size of an update. Moments and control variates may exceed the weights; trees and factors may grow."""
    most = _EXTRA_TIMES * model_bytes + _EXTRA_BYTES
    if manifest.nbytes > most:
        raise ProtocolError(
            f"an update has {manifest.nbytes} bytes for a model of {model_bytes}; the limit is {most}",
            fix="send no more than the weights and the state that travels beside them",
        )


def check_extras(update: Update, accepted: Sequence[Update], participants: int) -> None:
    """Raise UpdateRefusedError if most of a round's sites have sent other extra tensors than those of an update.

    While they are not most, the sum of the round decides: one site that calls first cannot have the others refused.
    """
    others = [other for other in accepted if not _same_extras(update, other)]
    if 2 * len(others) > participants:
        check_same_extras(update, others[0])


def check_same_extras(update: Update, other: Update) -> None:
    """Raise UpdateRefusedError if two updates that are to be summed have different extra tensors."""
    if not _same_extras(update, other):
        raise UpdateRefusedError(
            f"extra tensors differ between sites: {list(update.extras)[:4]} and {list(other.extras)[:4]}",
            where=f"{update.site}, round {update.round}",
            fix="use the same optimizer and optimizer_state setting at every site",
        )


def _same_extras(one: Update, other: Update) -> bool:
    if not one.content == other.content == "weights":
        return True
    parts = ({name: (array.dtype, array.shape) for name, array in update.extras.items()} for update in (one, other))
    return next(parts) == next(parts) and tuple(one.extras) == tuple(other.extras)
