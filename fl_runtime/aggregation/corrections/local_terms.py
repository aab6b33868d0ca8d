"""Local-training changes required by a strategy (FedProx, SCAFFOLD, Ditto), as they travel in a task's config."""

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
    """Changes to the local training of a round.

    Attributes:
        proximal_mu: Each gradient g becomes g + proximal_mu (w - w_global); 0 for no proximal term.
        control_variates: Each gradient g becomes g + c - c_i, and the site sends the change of its c_i.
        personal_mu: Proximal term of a second phase, in which the site trains its personal model; None for no such
            phase.
    """

    proximal_mu: float = 0.0
    control_variates: bool = False
    personal_mu: float | None = None

    def to_config(self) -> Settings:
        """Return the changes as JSON values; those that are not required are left out."""
        return {name: value for name, value in asdict(self).items() if value != getattr(LocalTerms, name)}

    @classmethod
    def from_config(cls, config: Settings) -> Self:
        """Read the changes from a task's config.

        Args:
            config: `Task.config`.

        Returns:
            The changes.

        Raises:
            ProtocolError: If a value is not a number of at least 0.
        """
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
    """Return control variates under their names as extras: parameter name -> "control/" + name."""
    return {_CONTROL + name: array for name, array in arrays.items()}


def control_of(extras: Arrays) -> dict[str, Array]:
    """Return the control variates among an update's extras, by parameter name."""
    return {name.removeprefix(_CONTROL): array for name, array in extras.items() if is_control(name)}


def without_control(names: Iterable[str]) -> list[str]:
    """Return the names of extras that are not control variates."""
    return [name for name in names if not is_control(name)]


def is_control(name: str) -> bool:
    """Whether an extra of this name is a control variate."""
    return name.startswith(_CONTROL)


def _mu(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ProtocolError(f"a task has a proximal term of mu={value!r}", fix="give a number of at least 0 for mu")
    return float(value)
