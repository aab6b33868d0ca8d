"""What a torch trainer's callback saves for exact restarts: the live model's part, and what the adapter adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fl_adapters.adapter import Snapshot
from fl_adapters.participant.state_file import State
from fl_adapters.torch.live_model import LiveModel
from fl_adapters.torch.restart import packed, unpacked
from fl_runtime.errors import ConfigError


@dataclass(frozen=True)
class TorchSnapshot:
    """All that outlives a round of one training and does not travel.

    live: the model and its optimizers. stateful: what else has state_dict and load_state_dict, under names of the
    adapter's: schedules, scalers. own: the trainer's position, and whatever else its adapter knows of.
    """

    live: LiveModel
    stateful: Mapping[str, Any]
    own: Snapshot

    def save(self) -> State:
        parts = {name: packed(part.state_dict()) for name, part in self.stateful.items()}
        return {"live": self.live.kept(), "stateful": parts, "own": packed(self.own.save())}

    def load(self, state: State) -> None:
        if state["stateful"].keys() != self.stateful.keys():
            raise ConfigError(
                f"this training has {', '.join(self.stateful) or 'nothing'} beside its optimizers, and that of the "
                f"process before had {', '.join(state['stateful']) or 'nothing'}",
                where="what a restart begins with",
                fix="start the site again with the same script",
            )
        self.live.go_on(state["live"])
        for name, part in self.stateful.items():
            part.load_state_dict(unpacked(state["stateful"][name]))
        self.own.load(unpacked(state["own"]))
