"""Rounds with a secure sum at a site: every update leaves masked, and the server learns the sum of all alone.

Before a site trains, it exchanges keys and sealed shares of its masks with the others, through the server. It masks its
update, and when the server names the sites whose updates are there, it agrees with the others on that list and reveals
what removes the masks that are left. Shares for the next round leave with the update, and so does a signature that all
sites are there. `fl_runtime.secure_sum` has the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from fl_adapters.participant.gate import Gate
from fl_adapters.participant.local_result import LocalResult, UpdateHeader
from fl_runtime.aggregation.sums.call import Call
from fl_runtime.aggregation.sums.strategy import CALL, ENCODING, VALUES
from fl_runtime.client import SiteClient
from fl_runtime.errors import ProtocolError, UpdateRefusedError
from fl_runtime.filters.server import applied_filters
from fl_runtime.secure_sum import SiteSums
from fl_runtime.secure_sum.ring import Ring
from fl_runtime.secure_sum.totals import encoded_values, ring_of_totals
from fl_runtime.secure_sum.travelling import ANSWER, MOST_SHARES_BYTES, MaskedMark, as_message, as_text
from fl_runtime.secure_sum.vectors import Rings, vectors_of
from fl_runtime.types import Array, Arrays, Report, Settings, Task, Update

_Part: TypeAlias = tuple[dict[str, Array], Ring]
"""Vectors of an update, and the ring in which they are summed."""

_TELLS_BUDGET = "GaussianDP"
"""The filter whose record goes to the server: what it has spent does not depend on the site's data."""

_MOST_BYTES = 2**22
_LARGEST_FACTOR = 1e6


class SecureSumSite:
    """A site's part in the rounds of a job with `secure_sum`. A `RoundProtocol`."""

    def __init__(
        self, client: SiteClient, gate: Gate, header: UpdateHeader, sums: SiteSums, sites: int, *, equal_only: bool
    ) -> None:
        """Make the site's part; the keys of this run are those of `sums`.

        Args:
            client: The connection to the server.
            gate: The site's gate, which records refusals.
            header: What all updates of this process have in common.
            sums: The site's side of the protocol.
            sites: Number of sites of the job.
            equal_only: Whether all sites must count the same, since they divide the noise of the sum equally.
        """
        self._client, self._gate, self._header, self._sums = client, gate, header, sums
        self._rings, self._sites, self._equal_only = Rings.for_sites(sites), sites, equal_only
        self._task: Task | None = None  # the last task of training
        self._kept: Update | None = None  # this round's update, for masks that begin again
        self._report: Report | None = None

    def start(self) -> None:
        """Do nothing: keys are sent when the server asks."""

    def close(self) -> None:
        """Forget the update and the masks."""
        self._kept = self._task = None

    def outgoing(self, update: Update) -> Update:
        """Mask an update.

        Args:
            update: The update, with plain weights. Borrowed for the call; a copy is kept until the round ends.

        Returns:
            The masked update, in new arrays.

        Raises:
            UpdateRefusedError: The update has something that cannot be summed, or too large a value.
        """
        if not (update.content == "weights" or _is_call(update)) or update.extras:
            what = "tensors beside the weights" if update.extras else "encoded updates"
            raise UpdateRefusedError(
                f"a secure sum adds plain weights or values, and this site would send {what}",
                where=f"{update.site}, round {update.round}",
                fix="leave the filter that encodes them, or optimizer_state: average, out of job and policy",
            )
        self._kept = replace(update, arrays={name: np.array(array) for name, array in update.arrays.items()})
        assert self._task is not None
        return self._masked(self._kept, self._task)

    def keeps(self, report: Report) -> bool:
        """Keep the scores of a global model: they leave masked, with the update that is trained from it."""
        self._report = report
        return True

    def next_task(self) -> Task:
        """Wait for the next task of the trainer; answer the steps of the secure sum meanwhile."""
        while True:
            task = self._client.next_task()
            if task.kind == "secure_sum":
                with self._gate.leaving_on_refusal("secure sum", task.round):
                    message = self._answer(task)
                self._client.submit(self._step_of(task, message))
            elif self._begins_again(task):
                assert self._kept is not None
                self._client.submit(self._masked(self._kept, task))
            else:
                self._kept = None
                self._task = task
                return task

    def _answer(self, task: Task) -> bytes:
        """The answer to a step."""
        step, config = task.config["step"], task.config
        if step == "keys":
            return self._sums.public
        if step == "shares":
            return self._sums.begin(task.round, task.stage, _messages(config, "keys"))
        if step == "agree":
            survivors = config.get("survivors")
            if not isinstance(survivors, list) or not all(isinstance(name, str) for name in survivors):
                raise ProtocolError(
                    "the server names no list of sites whose updates are there", where=f"round {task.round}"
                )
            return self._sums.agree(task.round, task.stage, survivors)
        if step == "reveal":
            return self._sums.reveal(task.round, task.stage, _messages(config, "signatures"))
        raise ProtocolError(
            f"the server asks for the step {str(step)[:40]!r} of a secure sum, which this version does not know",
            fix="run the same version of fl-adapters at server and site",
        )

    def _begins_again(self, task: Task) -> bool:
        """Whether a task asks for the update that this process has trained already, under new masks."""
        kept = self._kept
        return (
            task.kind == "train" and kept is not None and (task.round, task.version) == (kept.round, kept.base_version)
        )

    def _masked(self, update: Update, task: Task) -> Update:
        settings = _sum_settings(task)
        stage, received = str(settings.get("stage", "")), _messages(settings, "received")
        parts = self._call_parts(update) if _is_call(update) else self._model_parts(update, task, settings)
        with self._gate.leaving_on_refusal("secure sum", task.round):
            for vectors, ring in parts:
                self._sums.mask(task.round, stage, received, vectors, ring)
            mark = self._mark(task.round, stage, settings.get("next"))
        told = [item for item in applied_filters(update.encoding) if item.get("name") == _TELLS_BUDGET]
        arrays = {name: vector for vectors, _ in parts for name, vector in vectors.items()}
        if _is_call(update):
            arrays[CALL] = _told_call(update)
        return self._sent(task, arrays, mark.encoding(told), task.stage)

    def _call_parts(self, update: Update) -> list[_Part]:
        """The values of a call of `fl_adapters.sums`, not masked yet."""
        ring = ring_of_totals(self._sites, integers=Call.from_array(update.arrays[CALL]).integers)
        where = f"{update.site}, call {update.round}"
        return [({VALUES: encoded_values(update.arrays[VALUES], ring, where)}, ring)]

    def _model_parts(self, update: Update, task: Task, settings: Settings) -> list[_Part]:
        """The vectors of a model's update, not masked yet."""
        factor = float(settings.get("factor", 1.0))
        if not 0 < factor <= _LARGEST_FACTOR:
            raise ProtocolError(f"the server gives this site the weight {factor:g} in a secure sum")
        if self._equal_only and (factor != 1 or settings.get("equal") is not True):
            raise ProtocolError(
                "the server weights the sites in a secure sum whose noise is divided equally among them",
                where=f"round {task.round}",
                fix="use strategy: fedavg:weights=equal, without site_weights",
            )
        report = self._report if self._report is not None and self._report.version == task.version else None
        equal = settings.get("equal") is True
        tensors, numbers = self._rings.split(vectors_of(update, factor, self._rings, equal=equal, report=report))
        return [(tensors, self._rings.tensors), (numbers, self._rings.numbers)]

    def _mark(self, round: int, stage: str, next_stage: object) -> MaskedMark:
        """The signature and the shares that leave with a masked update, so that no step need ask for them."""
        signature, shares = self._sums.sign_all(round, stage), b""
        if isinstance(next_stage, str) and next_stage:
            shares = self._sums.begin_next(round, stage, next_stage)
        return MaskedMark(stage, signature, shares if len(shares) <= MOST_SHARES_BYTES else b"")

    def _step_of(self, task: Task, message: bytes) -> Update:
        return self._sent(task, {}, ANSWER + as_text(message), task.stage)

    def _sent(self, task: Task, arrays: Arrays, encoding: str, stage: str) -> Update:
        """What the server gets: it learns no number of examples, steps or metrics of this site alone."""
        update = self._header.update(task, arrays, LocalResult(1, 0, {}), {})
        return replace(update, stage=stage, content="encoded", encoding=encoding)


def _told_call(update: Update) -> Array:
    """Return what leaves of a call without masks: names and shapes, and metrics that all sites know."""
    call = Call.from_array(update.arrays[CALL])
    return replace(call, metrics=tuple(sorted(update.metrics.items()))).to_array()


def _is_call(update: Update) -> bool:
    """Whether an update holds the values of a call of `fl_adapters.sums`, not a model's weights."""
    return (update.content, update.encoding) == ("encoded", ENCODING)


def _sum_settings(task: Task) -> Settings:
    settings = task.config.get("secure_sum")
    if not isinstance(settings, Mapping):
        raise ProtocolError(
            "the server sends a task without the other sites' shares, in a job with secure_sum",
            where=f"round {task.round}",
            fix="ask the server's operator; this site sends no update that is not masked",
        )
    return settings


def _messages(settings: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """The messages of other sites that the server passes on, by site."""
    found = settings.get(name)
    if not isinstance(found, Mapping):
        raise ProtocolError(f"the server sends no {name} of other sites that can be read")
    messages = {str(site): as_message(text, f"what the server sends of {name}") for site, text in found.items()}
    if sum(map(len, messages.values())) > _MOST_BYTES:
        raise ProtocolError(f"the server sends {name} of more than {_MOST_BYTES} bytes")
    return messages
