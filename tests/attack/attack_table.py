"""What a hostile variant is: who sends what, when, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Who = Literal["evil", "greedy", "mina", "lena", "lars", "ada", "stranger", "server", "mail"]
"""Whose part the attacker plays.

It is a site of the job (evil), another one that calls without a pause (greedy), an observer (mina), a lead (lena), a
lead of another organisation (lars), the project's admin (ada), somebody without a kit, the server of a site, or
somebody whose files a careless admin opens.
"""


@dataclass(frozen=True)
class Attack:
    """One hostile variant.

    Attributes:
        kind: What it is aimed at, such as "uploads".
        name: What is sent; unique within its kind.
        who: Who sends it.
        send: Sends it, given what the attacker holds. Returns what the attacker got, or raises its refusal.
        gets: Regular expression that must be found in what the attacker got.
        quick: Whether it costs so little that `make test` may send it.
        phase: "run": sent while the honest sites train; "idle": while no job runs; "apart": without their server.
    """

    kind: str
    name: str
    who: Who
    send: Callable[[Any], object]
    gets: str
    quick: bool = True
    phase: Literal["run", "idle", "apart"] = "run"

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What came of a variant.

    Attributes:
        attack: The variant.
        got: What the attacker got: the words of the refusal, or the answer.
        fault: What went wrong, or "" if nobody but the attacker noticed.
    """

    attack: Attack
    got: str
    fault: str = ""
