"""Runs a secure sum among sites in this process, with sites that drop out in any phase."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from fl_runtime.secure_sum import Context, Ring, ServerSums, SiteSums, SumRules

CONTEXT = Context("job", "", "run-1")


@dataclass
class Sums:
    """Sites and their server, and what passes between them.

    Attributes:
        names: The sites.
        sites: Site -> its side.
        server: The server's side of the last stage.
        masked: Site -> its masked vectors in the last stage.
    """

    names: list[str]
    rules: SumRules = field(default_factory=SumRules)
    sites: dict[str, SiteSums] = field(default_factory=dict)
    masked: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.names:
            self.sites.setdefault(name, SiteSums(name, CONTEXT, self.rules))

    @property
    def publics(self) -> dict[str, bytes]:
        return {name: site.public for name, site in self.sites.items()}

    def begin(self, round: int = 1, stage: str = "update", lost: Collection[str] = ()) -> ServerSums:
        """Open a stage and take the shares of all but the lost sites."""
        self.server = ServerSums(CONTEXT, round, stage, self.publics)
        self.round, self.stage = round, stage
        for name in self.names:
            if name not in lost:
                self.server.add_shares(name, self.sites[name].begin(round, stage, self.publics))
        return self.server

    def mask(self, vectors: Mapping[str, Mapping[str, Any]], ring: Ring, lost: Collection[str] = ()) -> None:
        """Mask the vectors of the cohort, without those of lost sites."""
        self.masked = {}
        for name in self.server.cohort:
            if name not in lost:
                mine = {key: vector.copy() for key, vector in vectors[name].items()}
                self.sites[name].mask(self.round, self.stage, self.server.deliver(name), mine, ring)
                self.masked[name] = mine

    def sign_all(self, lost: Collection[str] = ()) -> tuple[str, ...]:
        """Have all that masked sign that nobody drops out, and return the survivors."""
        for name in self.masked:
            if name not in lost:
                signature = self.sites[name].sign_all(self.round, self.stage)
                if signature:
                    self.server.add_signature_of_all(name, signature)
        return self.server.survivors(list(self.masked))

    def agree(self, lost: Collection[str] = ()) -> tuple[str, ...]:
        """Have the survivors signed by all that are there."""
        survivors = self.server.survivors(list(self.masked))
        for name in self.masked:
            if name not in lost:
                self.server.add_signature(name, self.sites[name].agree(self.round, self.stage, survivors))
        return survivors

    def reveal(self, names: Collection[str]) -> None:
        """Have sites reveal their shares."""
        for name in names:
            signatures = self.server.signatures(name)
            self.server.add_reveal(name, self.sites[name].reveal(self.round, self.stage, signatures))

    def totals(self, ring: Ring) -> dict[str, Any]:
        """Return the sums of the masked vectors of the survivors."""
        first, *others = (self.masked[name] for name in self.server.survivors(list(self.masked)))
        found = {key: vector.copy() for key, vector in first.items()}
        for vectors in others:
            for key in found.keys() & vectors.keys():
                ring.add_into(found[key], vectors[key])
        return found
