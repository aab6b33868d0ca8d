"""Numbers and facts of a run in words, and the order in which its metrics are shown."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from fl_runtime.errors import FederationError
from fl_runtime.transport.waiting import duration_text


def training_text(data: Mapping[str, Any]) -> str:
    """Which training an event belongs to, as the end of a sentence; "" for the first one."""
    return f", training {data['training']}" if "training" in data else ""


def waiting_text(data: Mapping[str, Any]) -> str:
    """Whom a run waits for, and until when, from the data of a "waiting" event."""
    until = time.strftime("%d %b %H:%M", time.localtime(data["until"]))
    so_far, sites = duration_text(data["waited_s"]), ", ".join(data["sites"])
    return (
        f"waiting for {sites} ({so_far} so far, until {until} at the latest): {data['here']} of the "
        f"{counted(data['needed'], 'site')} that the job needs {'is' if data['here'] == 1 else 'are'} connected"
    )


def event_text(event: Mapping[str, Any]) -> str:
    """Return what an event says, in one line. Texts of sites in it still have to be made printable.

    Args:
        event: Fields of an `Event`.
    """
    of_round = f" in round {event['round']}" if event.get("round") else ""
    data = event.get("data", {})
    if event["kind"] == "log":
        return f"{'warning: ' if data.get('level') == 'warning' else ''}{data.get('text', '')}"
    if event["kind"] == "failed":
        return f"failed{of_round}: {FederationError.from_wire(data['error']).what}"
    facts = ", ".join(f"{key} {value}" for key, value in data.items() if isinstance(value, (str, int, float)) and value)
    return f"{event['kind'].replace('_', ' ')}{of_round}{f': {facts}' if facts else ''}"


def ordered_metrics(metrics: Collection[str], best_metric: str) -> list[str]:
    """Order metrics by how much they matter: the one that decides the best round, the loss, then the others.

    Args:
        metrics: Names of all metrics, in their order.
        best_metric: The metric that decides; "" for none.

    Returns:
        The names. Those of local training (`train_...`) and of traffic (`..._bytes`) come last.
    """
    first = [name for name in (best_metric, "loss") if name in metrics]
    rest = sorted(metrics, key=lambda name: name.startswith("train_") or name.endswith("_bytes"))
    return list(dict.fromkeys([*first, *rest]))


def counted(number: int, thing: str) -> str:
    """A number with its noun: "1 round", "2 rounds"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "no metrics"


def size_text(size_bytes: int) -> str:
    """A size such as "1.2 MB", in decimal units as network tools use them."""
    size, unit = float(size_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
