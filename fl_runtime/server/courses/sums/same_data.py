"""A hint after round 1 that all sites may read the same data, as a script does that ignores which site it is."""

from __future__ import annotations

from collections.abc import Sequence

from fl_runtime.filters.server import applied_filters
from fl_runtime.server.records.site_metrics import ShownMetrics
from fl_runtime.server.state import Accepted, RunState
from fl_runtime.types import Update

_DECIMALS = 4
"""A metric with more decimals than these is a measurement. An accuracy of 0.5 may be equal at two sites by chance."""

_CHANGES_NOTHING = "ExcludeVars"


def hint_at_same_data(state: RunState, accepted: Sequence[Accepted], shown: ShownMetrics) -> None:
    """Emit a warning if the updates of round 1 look as if all sites had trained on the same data.

    They do if all have the same number of examples and the same bits in all training metrics. Updates without metrics
    that an adapter has encoded, such as trees, must have the same bits themselves. Filters that change metrics or
    tensors rule it out.

    Args:
        state: The run's state.
        accepted: The updates of the round that has just been committed.
        shown: Says whether the values may be in the warning.
    """
    updates = [item.update for item in accepted]
    if len({update.site for update in updates}) < 2 or any(map(_is_filtered, updates)):
        return
    first = updates[0]
    if any((u.num_examples, u.metrics) != (first.num_examples, first.metrics) for u in updates):
        return
    if first.metrics:
        measured = [f"{name} {value!r}" for name, value in first.metrics.items() if _is_measurement(value)]
        same = f"the same {measured[0]}" if measured else ""
    else:
        equal = first.content == "encoded" and bool(accepted[0].digest) and len({item.digest for item in accepted}) == 1
        same = "the same update" if equal else ""
    if same:
        examples = "equally many" if shown.pooled_alone else str(first.num_examples)
        same = "the same metrics" if shown.pooled_alone else same
        text = (
            f"all {len(updates)} sites trained on {examples} examples, with exactly {same}: does each site "
            "read its own data? fl_adapters.site() tells a script which site it is"
        )
        state.events.emit("warning", first.round, text=text)


def _is_measurement(value: object) -> bool:
    return isinstance(value, float) and value != round(value, _DECIMALS)


def _is_filtered(update: Update) -> bool:
    return any(item.get("name") != _CHANGES_NOTHING for item in applied_filters(update.encoding))
