"""How a training ends for a site: after its last round, early, or because another session goes on with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from fl_adapters.participant.gate import Gate
from fl_adapters.participant.kit import Kit
from fl_adapters.participant.policy_gate import LeaveReason
from fl_runtime.client import SiteClient
from fl_runtime.errors import ConnectionLostError, FederationError

_NOTE = "script.json"


@dataclass(frozen=True)
class ScriptNote:
    """What a script leaves in its kit's folder for the command that started it (`fl-adapters run` or `site`).

    Attributes:
        job: Name of the training that the script joined last.
        attempt: Number of its process there, from 1.
        state: "taking part", or how its part ended. "failed" if it died and has not left, so that it can be started
            again; "left" if it left early; "done" after its last round.
        reason: Why it ended, in full. It may quote data.
        public: The part of the reason that may leave the site.
        bytes_up: Bytes of updates that all processes of the job's script have sent.
        bytes_down: Bytes of tasks that they have received.
    """

    job: str
    attempt: int
    state: Literal["taking part", "failed", "left", "done"] = "taking part"
    reason: str = ""
    public: str = ""
    bytes_up: int = 0
    bytes_down: int = 0

    @classmethod
    def read(cls, folder: Path) -> ScriptNote | None:
        """Return the note in a kit's folder, or None if its script has never joined a job."""
        try:
            noted = json.loads((folder / _NOTE).read_text(encoding="utf-8")).items()
            known = {field.name for field in fields(cls)}  # a script of a later version may say more
            return cls(**{name: value for name, value in noted if name in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, kit: Kit) -> None:
        """Write the note into the folder of a command's own kit. Does nothing for other kits."""
        folder = folder_for_notes(kit)
        if folder is not None:
            with suppress(OSError):  # training must not fail for it
                self._write_into(folder)

    def after(self, before: ScriptNote) -> ScriptNote:
        """Return this note with the bytes that the one before has counted."""
        return replace(self, bytes_up=before.bytes_up, bytes_down=before.bytes_down)

    @classmethod
    def renew(cls, folder: Path) -> None:
        """Forget how the script before has ended, since another one is started. Its number is kept.

        Args:
            folder: Folder of the command's kit.

        Raises:
            OSError: The note cannot be written.
        """
        note = cls.read(folder)
        if note is not None:
            replace(note, state="taking part", reason="", public="")._write_into(folder)

    def _write_into(self, folder: Path) -> None:
        part = folder / f"{_NOTE}.part"
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(folder / _NOTE)


def folder_for_notes(kit: Kit) -> Path | None:
    """Return the folder of a kit that `fl-adapters run` or `site` has made for a command; None for other kits."""
    own = kit.credentials and kit.folder and Path(kit.folder).resolve() != Path(kit.credentials).resolve()
    return Path(kit.folder) if own else None


class Departure:
    """Tells the server how this site's part in a training ends.

    After that the script may go on and train again. The connection therefore stays open until the script's next
    training has begun or the script has ended, so that the server knows that the site is still there.

    The server is not told of the death of a script that a site daemon supervises, since the daemon starts it again.

    Attributes:
        closed: Whether the session has ended.
        left: Whether the training is over for the site: it has had the final model, or has told the server that it
            leaves early. Otherwise another session of the site goes on with it.
    """

    def __init__(
        self,
        client: SiteClient,
        gate: Gate,
        kit: Kit,
        note: ScriptNote,
        *,
        trains_again: bool,
        registered: Callable[[], bool],
        on_close: Callable[[], None],
    ) -> None:
        """Prepare for the end.

        Args:
            client: The connection to the server.
            gate: The site's gate, which knows what may be said.
            kit: The site's startup kit.
            note: Training and attempt that the site has joined.
            trains_again: Whether the job takes another training of the script after this one.
            registered: Whether the handshake is done. A site that leaves before has not trained, and may try again.
            on_close: Called when the session ends.
        """
        self.closed = self.left = False
        self._client, self._gate, self._trains_again = client, gate, trains_again
        self._registered, self._on_close = registered, on_close
        self._resting = False
        before = ScriptNote.read(Path(kit.folder)) if kit.folder else None
        self._kit, self._note = kit, note if before is None else note.after(before)
        self._note.write(kit)

    def note_bytes(self) -> None:
        """Leave word for the site daemon of the bytes that have been sent and received so far."""
        self._counted().write(self._kit)

    def leave(self, reason: LeaveReason, *, early: bool) -> None:
        """Leave the training. Does nothing if the session has ended.

        Args:
            reason: Why.
            early: Whether it is before the last round.
        """
        if self.closed:
            return
        if self._kit.supervised and _is_death(reason):
            self._fail(reason)
            return
        stays = self._trains_again and self._registered()
        heard = self._client.leave(self._gate.leave(reason, early=early), early=early, stays=stays)
        self.closed, self._resting = True, heard and stays
        self.left = self._registered() and (heard or not early)
        self._write_note("left" if early else "done", reason)
        self._on_close()
        if not self._resting:
            self._client.close()

    def abandon(self, reason: LeaveReason) -> None:
        """Leave a training in the middle of which the script has ended.

        Args:
            reason: Why, for the server and the other sites.
        """
        if self._kit.supervised and not self.closed:
            self._fail(reason)
        else:
            self.leave(reason, early=True)

    def detach(self) -> None:
        """End the session without a word, because the next attempt or training of this site replaces it."""
        self.closed, self._resting = True, False
        self._on_close()
        self._client.close()

    def end_script(self, *, early: bool) -> None:
        """Tell the server that the script trains no more, if the server waits for that.

        Args:
            early: Whether the script has ended with an error.
        """
        if not self._resting:
            return
        if self._kit.supervised and early:
            self._fail(LeaveReason.own("its script ended with an error after its training"))
            return
        self._client.leave("its script has ended", early=early)
        self.detach()

    def _fail(self, reason: LeaveReason) -> None:
        """End the session of a script that is about to die, and leave a note for the daemon."""
        self._write_note("failed", reason)
        self.detach()

    def _write_note(self, state: Literal["failed", "left", "done"], reason: LeaveReason) -> None:
        replace(self._counted(), state=state, reason=reason.text[:2000], public=reason.public).write(self._kit)

    def _counted(self) -> ScriptNote:
        """The note with what this session has sent and received."""
        note, client = self._note, self._client
        return replace(note, bytes_up=note.bytes_up + client.bytes_up, bytes_down=note.bytes_down + client.bytes_down)


def _is_death(reason: LeaveReason) -> bool:
    """Whether the script is about to die of an error that another try may not meet.

    Errors of ours are refusals, which would only be repeated. A server that is out of reach may come back.
    """
    error = reason.error
    return error is not None and (isinstance(error, ConnectionLostError) or not isinstance(error, FederationError))


def trains_after(training: int, most: int | None) -> bool:
    """Return whether the server should wait for another training, or for the end of the script.

    An interactive session, such as a notebook, may stay open for days after its training. Unless the job says how many
    trainings it holds, the server does not wait for those.

    Args:
        training: Number of the training that ends.
        most: Largest number of trainings in the job; None for any number.
    """
    return training < most if most is not None else not hasattr(sys, "ps1")
