"""The server's side of one stage of a secure sum. It passes messages on and removes the masks that are left."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import NoReturn

from fl_runtime.errors import ProtocolError, RoundFailedError
from fl_runtime.secure_sum.context import Context, needed_holders
from fl_runtime.secure_sum.masks import add_masks
from fl_runtime.secure_sum.messages import KeysMessage, RevealMessage, SharesMessage, checked_signature
from fl_runtime.secure_sum.primitives import SEAL_BYTES, SEED_BYTES, check_available, unseal
from fl_runtime.secure_sum.ring import Ring
from fl_runtime.secure_sum.roster import Roster
from fl_runtime.secure_sum.shamir import combine
from fl_runtime.types import Array


class ServerSums:
    """One stage of one round at the server. It holds no secret.

    The order of calls: `add_shares` for each site, `deliver` to each, `add_signature_of_all` for those that send one,
    `survivors` when the vectors are in, `add_signature` for each unless all of them `may_reveal`, `signatures` to each,
    `add_reveal` until there are `enough`, `unmask`.

    Args:
        context: The run.
        round: Number of the round.
        stage: Name of the stage.
        publics: Participant -> its `SiteSums.public`.

    Raises:
        ProtocolError: If a public message cannot be read.
        ConfigError: If `cryptography` is not installed.
    """

    def __init__(self, context: Context, round: int, stage: str, publics: Mapping[str, bytes]) -> None:
        check_available("server")
        keys = {name: KeysMessage.parse(name, public) for name, public in publics.items()}
        self._roster = Roster(context, round, stage, keys)
        self._messages: dict[str, bytes] = {}
        self._shares: dict[str, SharesMessage] = {}
        self._delivered = False
        self._survivors: tuple[str, ...] | None = None
        self._agreement = b""
        self._signatures: dict[str, bytes] = {}
        self._signatures_of_all: dict[str, bytes] = {}
        self._reveals: dict[str, RevealMessage] = {}
        self._opened: tuple[list[bytes], list[bytes]] | None = None

    @property
    def cohort(self) -> tuple[str, ...]:
        """The sites whose shares have arrived, in order. Fixed from the first `deliver` on."""
        return tuple(name for name in self._roster.names if name in self._shares)

    def add_shares(self, site: str, message: bytes) -> None:
        """Take a site's shares.

        Args:
            site: Who sent the message.
            message: What its `SiteSums.begin` returned. The same one again is ignored.

        Raises:
            ProtocolError: If the site does not participate, the message is not one of this stage, or it is late.
        """
        roster = self._known(site)
        if self._messages.get(site) == message:
            return
        if site in self._messages or self._delivered:
            self._refuse(site, "sent its shares too late, or twice")
        shares = SharesMessage.parse(site, message, roster.round, roster.stage, len(roster.names))
        partners = roster.neighbours(site)
        holders = len(partners) + 1
        if shares.roster != roster.digest:
            self._refuse(site, "has begun with other participants or keys")
        if set(shares.sealed) != set(partners):
            self._refuse(site, "has not sealed shares for its neighbours")
        if len(shares.pairs) != len(partners) * SEED_BYTES + SEAL_BYTES:
            self._refuse(site, "has not sent a pair seed for each neighbour")
        if not needed_holders(0.5, holders) <= shares.threshold <= holders:
            self._refuse(site, f"has a threshold of {shares.threshold} for {holders} holders")
        self._messages[site], self._shares[site] = bytes(message), shares

    def deliver(self, site: str) -> dict[str, bytes]:
        """Return what `SiteSums.mask` of a site needs. The first call fixes the cohort.

        Args:
            site: A member of the cohort.

        Returns:
            Member of the cohort -> the shares that it has sealed for this site; empty for itself and those that are
            not its neighbours.

        Raises:
            ProtocolError: If the site has sent no shares.
        """
        self._member(site)
        self._delivered = True
        return {name: self._shares[name].sealed.get(site, b"") for name in self.cohort}

    def survivors(self, sent: Collection[str]) -> tuple[str, ...]:
        """Fix whose vectors are in the sum. Sites agree to one set alone, so call it once all vectors are in.

        Args:
            sent: The sites whose vectors are in.

        Returns:
            Those of the cohort, in order.

        Raises:
            ProtocolError: If it differs from an earlier call and a site has already signed that.
        """
        found = tuple(name for name in self.cohort if name in set(sent))
        if self._signatures and found != self._survivors:
            raise ProtocolError(
                "the survivors of a secure sum cannot change once a site has signed them", where=self._where
            )
        self._delivered = True
        self._survivors, self._agreement = found, self._roster.agreement(self.cohort, found)
        if found == self.cohort:
            self._signatures = self._signatures_of_all | self._signatures
        return found

    def add_signature_of_all(self, site: str, signature: bytes) -> None:
        """Take a site's signature that the whole cohort survives. It counts if `survivors` finds them all.

        Args:
            site: Who sent it.
            signature: What its `SiteSums.sign_all` returned.

        Raises:
            ProtocolError: If it is not that site's signature of the cohort.
        """
        self._member(site)
        agreement = self._roster.agreement(self.cohort, self.cohort)
        if not self._delivered or not self._roster.has_agreed(site, agreement, checked_signature(site, signature)):
            self._refuse(site, "has signed another cohort, or with another key")
        self._signatures_of_all[site] = bytes(signature)

    def add_signature(self, site: str, signature: bytes) -> None:
        """Take a site's signature of the survivors.

        Args:
            site: Who sent it.
            signature: What its `SiteSums.agree` returned.

        Raises:
            ProtocolError: If it is not that site's signature of these survivors.
        """
        self._member(site)
        self._settled()
        if not self._roster.has_agreed(site, self._agreement, checked_signature(site, signature)):
            self._refuse(site, "has signed other survivors, or with another key")
        self._signatures[site] = bytes(signature)

    def signatures(self, site: str) -> dict[str, bytes]:
        """Return what `SiteSums.reveal` of a site needs: its holders' signatures so far.

        Args:
            site: A member of the cohort.

        Returns:
            Holder -> signature.
        """
        return {name: self._signatures[name] for name in self._roster.holders(site) if name in self._signatures}

    def may_reveal(self, site: str) -> bool:
        """Whether enough of a site's holders have signed for it to reveal its shares.

        Args:
            site: A member of the cohort.

        Returns:
            Whether its threshold is reached.
        """
        self._member(site)
        return len(self.signatures(site)) >= self._shares[site].threshold

    def add_reveal(self, site: str, message: bytes) -> None:
        """Take the shares that a site reveals.

        Args:
            site: Who sent the message.
            message: What its `SiteSums.reveal` returned.

        Raises:
            ProtocolError: If the message is not one of this stage and these survivors.
        """
        self._member(site)
        survivors = set(self._settled())
        roster = self._roster
        reveal = RevealMessage.parse(site, message, roster.round, roster.stage, len(roster.names))
        if reveal.agreement != self._agreement:
            self._refuse(site, "reveals shares for other survivors")
        own = {name for name in roster.holders(site) if name in survivors}
        pairs = {name for name in roster.neighbours(site) if name in self._shares and name not in survivors}
        if set(reveal.own) != own or set(reveal.pairs) != pairs:
            self._refuse(site, "does not reveal its shares of those it holds shares of")
        self._reveals[site] = reveal

    @property
    def enough(self) -> bool:
        """Whether `unmask` has the shares that it needs."""
        return bool(self._survivors) and not self.missing()

    def missing(self) -> dict[str, int]:
        """Return whose secrets cannot be opened yet.

        Returns:
            Site -> number of shares of its secret that are still needed.
        """
        found = {}
        for name in self._settled():
            found[name] = self._shares[name].threshold - sum(name in each.own for each in self._reveals.values())
        for name in self._dropped():
            found[name] = self._shares[name].threshold - sum(name in each.pairs for each in self._reveals.values())
        return {name: count for name, count in found.items() if count > 0}

    @property
    def most_needed(self) -> int:
        """Largest number of reveals that `unmask` may need, whichever survivors they come from.

        Where all sites hold shares of all others, as many reveals as the highest threshold are enough. In a sparse
        graph it depends on who reveals, so the number is that of all sites.
        """
        if not self._roster.is_complete:
            return len(self.cohort)
        return max((shares.threshold for shares in self._shares.values()), default=0)

    def unmask(self, totals: Mapping[str, Array], ring: Ring) -> None:
        """Remove the masks from sums in place.

        Args:
            totals: Name -> sum of the masked vectors of all survivors, a contiguous array of the ring.
            ring: The ring.

        Raises:
            RoundFailedError: If shares are missing, or do not open a site's secret.
        """
        if not self.enough:
            lacking = ", ".join(f"{name} ({count})" for name, count in self.missing().items()) or "all"
            raise RoundFailedError(
                f"too few sites have revealed shares; still needed for: {lacking}",
                where=self._where,
                fix="open the round again; if it happens often, fewer sites may drop out than the thresholds allow",
            )
        if self._opened is None:
            self._opened = self._open_all()
        add, subtract = self._opened
        for name, total in totals.items():
            add_masks(total, ring, self._roster.context, name, add, subtract)

    def _open_all(self) -> tuple[list[bytes], list[bytes]]:
        """Return the seeds whose streams are to be added, and those to be subtracted."""
        survivors = self._settled()
        subtract = [self._own_seed(name) for name in survivors]
        add = list[bytes]()
        for dropped in self._dropped():
            for name, seed in self._pair_seeds(dropped).items():
                if name in survivors:
                    (subtract if name < dropped else add).append(seed)
        return add, subtract

    def _own_seed(self, site: str) -> bytes:
        seed = self._combined(site, {holder: each.own[site] for holder, each in self._revealed() if site in each.own})
        if hashlib.sha256(self._roster.bound("seed", site) + seed).digest() != self._shares[site].commitment:
            self._wrong_shares(site)
        return seed

    def _pair_seeds(self, site: str) -> dict[str, bytes]:
        shares = {holder: each.pairs[site] for holder, each in self._revealed() if site in each.pairs}
        try:
            data = unseal(self._combined(site, shares), self._shares[site].pairs, self._roster.bound("pairs", site))
        except ValueError:
            self._wrong_shares(site)
        partners = self._roster.neighbours(site)
        return {name: data[at * SEED_BYTES : (at + 1) * SEED_BYTES] for at, name in enumerate(partners)}

    def _revealed(self) -> list[tuple[int, RevealMessage]]:
        return [(self._roster.number(holder), each) for holder, each in self._reveals.items()]

    def _combined(self, site: str, shares: Mapping[int, int]) -> bytes:
        secret = combine(shares, self._shares[site].threshold)
        if secret >> 8 * SEED_BYTES:
            self._wrong_shares(site)
        return secret.to_bytes(SEED_BYTES, "big")

    def _dropped(self) -> list[str]:
        """Return those of the cohort that have dropped out and share pair masks with a survivor."""
        survivors = set(self._settled())
        return [
            name for name in self.cohort if name not in survivors and survivors & set(self._roster.neighbours(name))
        ]

    def _settled(self) -> tuple[str, ...]:
        if self._survivors is None:
            raise ProtocolError("the survivors of a secure sum are not fixed yet", where=self._where)
        return self._survivors

    def _known(self, site: str) -> Roster:
        if site not in self._roster.names:
            self._refuse(site, "is not one of the participants")
        return self._roster

    def _member(self, site: str) -> None:
        self._known(site)
        if site not in self._shares:
            self._refuse(site, "has sent no shares")

    def _wrong_shares(self, site: str) -> NoReturn:
        raise RoundFailedError(
            f"the revealed shares do not open the secret of {site}",
            where=self._where,
            fix=f"{site} or one of the sites that hold its shares has sent wrong ones; open the round again without it",
        )

    @property
    def _where(self) -> str:
        return f"secure sum of round {self._roster.round}, stage {self._roster.stage}"

    def _refuse(self, site: str, what: str) -> NoReturn:
        raise ProtocolError(f"{site} {what}", where=self._where, fix="it is left out of this stage; look at its log")
