"""What a run consists of while it goes on: models, the open round, offers. Changed only under the run's lock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fl_runtime.server.members import Member
from fl_runtime.store.blobs import Blob
from fl_runtime.store.journal import ModelEntry
from fl_runtime.types import Settings, TaskKind, Update

Phase = Literal["joining", "initial", "training", "final", "done", "failed"]
Status = Literal["used", "late", "carried", "duplicate"]


@dataclass
class Model:
    """A committed global model. `leases` counts the calls that are streaming it; it is recycled after the last.

    kept: what the strategy keeps at the server beside the newest model.
    messages: whole task messages of a small model, so that it is encoded once for all sites.
    """

    entry: ModelEntry
    blob: Blob
    kept: Blob | None = None
    leases: int = 0
    retired: bool = False
    messages: dict[tuple[str, str, bool], bytes] = field(default_factory=dict)

    @property
    def version(self) -> int:
        return self.entry.version


@dataclass(frozen=True)
class Accepted:
    update: Update
    blob: Blob
    digest: bytes


@dataclass
class OpenRound:
    """The round under way. bytes_down, bytes_up: per site, as counted by the service.

    closing: it takes no more updates; the last of them are being summed. drawn: the participants are a sample, and
    nobody else joins them. answers: how many updates it waits for, None: for all of them. stage: "" for the first
    try at the round, then "2", "3".
    """

    round: int
    participants: list[str]
    config: Settings
    began: float
    stage: str = ""
    accepted: dict[str, Accepted] = field(default_factory=dict)
    bytes_down: dict[str, int] = field(default_factory=dict)
    bytes_up: dict[str, int] = field(default_factory=dict)
    closing: bool = False
    drawn: bool = False
    answers: int | None = None

    def takes(self, name: str) -> bool:
        """Whether a site may contribute."""
        return not self.drawn or name in self.participants


@dataclass(frozen=True)
class Offer:
    """A task for one site. `model` is leased: whoever takes the offer calls Run.release(model)."""

    kind: TaskKind
    round: int
    config: Settings
    model: Model | None
    layout_known: bool
    stage: str = ""


def stage_of(failed_tries: int) -> str:
    """What tells the tries at a round apart: "" for the first."""
    return str(failed_tries + 1) if failed_tries else ""


def leased(kind: TaskKind, round: int, config: Settings, model: Model | None, member: Member, stage: str = "") -> Offer:
    """An offer of this model, which cannot be recycled until it is released. Call it under the run's lock."""
    assert model is not None
    model.leases += 1
    layout = model.blob.manifest.layout
    known = layout in member.layouts
    member.layouts.add(layout)
    return Offer(kind, round, config, model, known, stage)
