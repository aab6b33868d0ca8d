"""What a strategy may ask of local training: how a server says it, and how a site reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from fl_runtime.errors import ProtocolError
from fl_runtime.types import Array, Arrays, Settings

_CONTROL = "control/"


@dataclass(frozen=True)
class LocalTerms:
    """How local steps differ from those of the script alone; travels in a task's config.

    proximal_mu: each gradient g becomes g + mu (w - w_global). control_variates: it becomes g + c - c_i, and the site
    sends how its c_i changes. personal_mu: each round has a second phase, with the proximal term of this mu, for a
    model of the site's own; None: it has not.
    """

    proximal_mu: float = 0.0
    control_variates: bool = False
    personal_mu: float | None = None

    def to_config(self) -> Settings:
        """JSON values; only what is asked for."""
        return {name: value for name, value in asdict(self).items() if value != getattr(LocalTerms, name)}

    @classmethod
    def from_config(cls, config: Settings) -> Self:
        """What `config` asks for. Raises ProtocolError for values that no strategy gives."""
        personal = config.get("personal_mu")
        return cls(
            _mu(config.get("proximal_mu", 0.0)),
            bool(config.get("control_variates", False)),
            None if personal is None else _mu(personal),
        )

    @property
    def corrects(self) -> bool:
        """Whether the gradients of the global model are changed."""
        return self.proximal_mu > 0 or self.control_variates


def control_extras(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Control variates by the names under which they travel beside the weights."""
    return {_CONTROL + name: array for name, array in arrays.items()}


def control_of(extras: Arrays) -> dict[str, Array]:
    """The control variates among what travelled beside the weights, by parameter name."""
    return {name.removeprefix(_CONTROL): array for name, array in extras.items() if is_control(name)}


def without_control(names: Iterable[str]) -> list[str]:
    """The names of what else travelled beside the weights."""
    return [name for name in names if not is_control(name)]


def is_control(name: str) -> bool:
    """Whether an extra of this name is a control variate."""
    return name.startswith(_CONTROL)


def _mu(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ProtocolError(f"a task asks for a proximal term of mu={value!r}", fix="mu is a number of at least 0")
    return float(value)
