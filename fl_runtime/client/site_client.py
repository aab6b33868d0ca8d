"""The client that a site's process talks to the server with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fl_runtime.aggregation.metrics.pooling import from_json, plain
from fl_runtime.client.assignment import checked_settings
from fl_runtime.client.calls import PatientCalls
from fl_runtime.client.handshake import Handshake
from fl_runtime.client.local_training import LocalTraining
from fl_runtime.client.presence import Presence
from fl_runtime.client.transfers import Downloads, Layouts, Uploads, metrics_json
from fl_runtime.errors import FederationError, PermissionDeniedError, ProtocolError
from fl_runtime.text import parse_json, printable
from fl_runtime.trainings import training_name
from fl_runtime.transport.base import Transport
from fl_runtime.transport.malloc import keep_freed_memory
from fl_runtime.transport.shared import SharedFolder
from fl_runtime.transport.tunnel import Stream, Tunnel
from fl_runtime.transport.waiting import Clock
from fl_runtime.types import CohortRules, Metrics, Report, Task, Terms, Update
from fl_runtime.wire import frames
from fl_runtime.wire.finite import Inspected
from fl_runtime.wire.fl.v1 import federation_pb2 as pb
from fl_runtime.wire.manifest import Manifest
from fl_runtime.wire.names import Facts
from fl_runtime.wire.software import (
    BEATS,
    COHORT,
    FEATURE_NAMES,
    FILES,
    OWN,
    PARTS,
    STAYS,
    STEPS,
    Software,
    choose_protocol,
    misfit,
)

log = logging.getLogger(__name__)

_GOODBYE_S = 10.0
_METRICS_CHARS = 2**23


@dataclass(frozen=True)
class FilesReceipt:
    """The server's answer to files that go with the final model.

    Attributes:
        status: "kept", "same" as those that are kept, or "different" from them.
        kept_of: Name of the site whose files are kept.
        differ: Names of the files that differ from that site's.
    """

    status: str
    kept_of: str
    differ: tuple[str, ...]


@dataclass(frozen=True)
class Welcome:
    """The server's answer to a join.

    Attributes:
        site: Name of this site.
        index: Its place in the job's list of sites.
        count: Number of sites in the job.
        attempt: Number of this process among those of the site.
        settings: Settings of the job, with the fields of `RunSettings`.
        started: True if the rounds have begun already.
        training: Number of the training that the site has joined; 0 if the server holds one training a job.
    """

    site: str
    index: int
    count: int
    attempt: int
    settings: Mapping[str, Any]
    started: bool
    training: int = 0


class SiteClient:
    """One process of one site, as it talks to the server.

    Its methods block, and are called by one thread at a time, in this order: `join`, `register`, then `next_task` and
    `submit` or `report` in turn, then `leave` and `close`. A call that meets a broken connection is repeated, and a
    transfer resumes where it stopped, until the server has been out of reach for `patience_s` seconds.

    Every method but `leave` and `close` raises ConnectionLostError when patience is spent, AbortedError when another
    process of this site has taken over, and the run's error when the run has failed.

    Example:
        ```python
        client = SiteClient(GrpcTransport(address, token), patience_s=300.0)
        client.join()
        client.register(
            Manifest.of(weights), agreement={}, info={}, capabilities=frozenset(), rounds=0, evaluates=False
        )
        task = client.next_task()
        ```

    Attributes:
        training: Measures the site's local training, and tells the server of it once the site shares it.
    """

    def __init__(
        self,
        transport: Transport,
        patience_s: float,
        *,
        own_patience: bool = False,
        same_machine: bool = False,
        clock: Clock | None = None,
    ) -> None:
        """Make a client that has not called the server yet.

        Args:
            transport: How to reach the server. The client closes it.
            patience_s: How long the server may be out of reach, in seconds.
            own_patience: Keep to that even if the job says otherwise.
            same_machine: Trust the server when it names a folder on this machine for large payloads.
            clock: Measures how long the server is out of reach; None for this machine's.
        """
        self._transport, self._own_patience, self._same_machine = transport, own_patience, same_machine
        self._calls, self._layouts = PatientCalls(transport, patience_s, clock), Layouts()
        self._downloads, self._uploads = Downloads(self._calls, self._layouts), Uploads(self._calls, self._layouts)
        self.training = LocalTraining(self._calls)
        self._session = pb.Session()
        self._features, self._min_sites = frozenset[str](), None  # of the server, and the quorum of its job
        self._held = 0  # 1 + version of the last model to train that was received
        self._presence: Presence | None = None

    @property
    def bytes_up(self) -> int:
        """Bytes of updates so far, message headers included; files count as if they had been sent."""
        return self._uploads.nbytes

    @property
    def bytes_down(self) -> int:
        """Bytes of tasks so far, message headers included; files count as if they had been sent."""
        return self._downloads.nbytes

    def join(self, job: str = "", training: int = 1, follows: str = "") -> Welcome:
        """Begin an attempt. The server refuses the calls of earlier processes of this site from now on.

        Args:
            job: Name of the job to join, or "" for whichever the server runs.
            training: Which training of the site's script this is, from 1.
            follows: Job of the script's training before. If `job` is "" and the server runs another job now, this is
                the first training of that.

        Returns:
            Who this site is, and the job's settings.

        Raises:
            ProtocolError: The server runs another job, does not know this site, or has an incompatible version.
            ConfigError: The job does not hold so many trainings.
        """
        request = pb.JoinRequest(
            protocol_min=OWN.lowest,
            protocol_max=OWN.highest,
            features=FEATURE_NAMES,
            version=OWN.version,
            settings=sorted(OWN.settings),
            job=training_name(job, training) if job else "",
            training=training,
            follows=follows,
        )
        reply = self._calls.ask("Join", request, pb.JoinReply)
        _check_server(reply)
        settings = checked_settings(reply)
        if settings.get("patience_s") and not self._own_patience:
            self._calls.patience_s = float(settings["patience_s"])
        beat_s = self._calls.expect_beats() if BEATS in reply.features else 0.0
        self._session = pb.Session(job=settings["name"], attempt=reply.attempt, beat_s=beat_s)
        self._features, self._min_sites = frozenset(reply.features), settings.get("min_sites")
        if self._same_machine and reply.shared_folder:
            self._downloads.shared = self._uploads.shared = SharedFolder(Path(reply.shared_folder))
        self._uploads.frame_bytes = frames.frame_bytes(reply.count)
        self._presence = Presence(self._calls, self._session)
        if STEPS in self._features:
            self.training.join(self._session, reply.count)
        return Welcome(reply.site, reply.index, reply.count, reply.attempt, settings, reply.started, reply.training)

    def speak_for(self, job: str, attempt: int) -> None:
        """Speak for a process of this site that has ended, without joining. The only call after it is `leave`.

        The server does not listen if another process of the site has joined since.

        Args:
            job: Name of the training that the process joined, or of the job if it has not joined any.
            attempt: Number of the process, as in `Welcome`; 0 if no process of the site has joined.
        """
        self._session = pb.Session(job=job, attempt=attempt)

    def register(
        self,
        manifest: Manifest,
        *,
        agreement: Facts,
        info: Mapping[str, str],
        capabilities: frozenset[str],
        rounds: int,
        evaluates: bool,
        terms: Terms | None = None,
        rules: CohortRules | None = None,
    ) -> int:
        """Register at the handshake, and wait until all sites have agreed.

        Args:
            manifest: Names, dtypes and shapes of the tensors that this site exchanges.
            agreement: What must be equal at all sites: texts by name, and lists of names.
            info: Names and values for people to read.
            capabilities: Capabilities of the site's adapter.
            rounds: The trainer's own number of rounds, 0 without a budget.
            evaluates: Promise to report a score of every global model.
            terms: The script's terms, which must be equal at all sites; None for the defaults.
            rules: What this site's policy asks of every aggregate; None for nothing.

        Returns:
            The run's number of rounds.

        Raises:
            PermissionDeniedError: The server cannot keep to the rules.
            StateMismatchError: The sites' tensors differ.
            HandshakeError: The sites do not agree, or an adapter lacks a capability that the job needs.
        """
        rules = rules or CohortRules()
        _check_older_server(rules, self._features, self._min_sites)
        request = pb.RegisterRequest(
            session=self._session,
            manifest=manifest.to_proto(),
            info=dict(info),
            capabilities=sorted(capabilities),
            rounds=rounds,
            evaluates=evaluates,
            terms_json=json.dumps(asdict(terms)) if terms else "",
            min_cohort=rules.min_cohort if rules.min_cohort > 1 else 0,
            max_share=rules.max_share or 0.0,
            own_model_stays=rules.own_model_stays,
            stays=rules.stays,
        )
        reply = Handshake(self._calls, agreement, parts=PARTS in self._features).register(request)
        self._layouts.add(manifest)
        self._downloads.large = manifest.nbytes > frames.INLINE_BYTES
        if not self._downloads.large or self._downloads.shared is None:
            keep_freed_memory()  # the weights travel in messages
        return reply.rounds

    def next_task(self, *, best: bool = False, evaluate: bool = False, done: str = "") -> Task:
        """Wait for a task and receive its arrays.

        Args:
            best: After the last round, ask for the best model in place of the final one.
            evaluate: After the last round, ask for another site's model to be scored. The task's kind is "evaluate", or
                "evaluated" when none is left.
            done: Stage of the last "share" or "aggregate" task that this site has completed. It is not given again.

        Returns:
            The task. Its arrays are views of a buffer of this client, and valid until the next task is asked for.
        """
        request = pb.NextRequest(session=self._session, best=best, evaluate=evaluate, done=done, held=self._held)
        task = self._downloads.task(request)
        if task.kind == "train":
            if task.version + 1 < self._held:
                log.warning(
                    "the server was restored from a backup and goes back from round %s to round %s. What this process "
                    "keeps beside the weights, such as the optimizer's state, stays as it is",
                    self._held,
                    task.version + 1,
                )
            self._held = task.version + 1
            self.training.begin(task.round)
        return task

    def submit(self, update: Update, inspected: Inspected | None = None) -> str:
        """Send an update. Sending the same one again is harmless.

        Args:
            update: The update. Its arrays are borrowed until this method returns.
            inspected: What is known already about the values of some arrays, so that they need not be read again.

        Returns:
            What the update counted as: "used", "late", "carried" (counted in a later round) or "duplicate".

        Raises:
            UpdateRefusedError: The server refuses the update, for example because a value is not finite.
            StateMismatchError: Its tensors are not those that this site registered.
            ConfigError: A metric is not a number.
        """
        timed = replace(update, train_s=self.training.end())
        return self._uploads.update(self._session, timed, inspected)

    def report(self, report: Report, *, wait: bool = False) -> tuple[Metrics, bool]:
        """Report a score of a model.

        Args:
            report: The model's version, and its metrics on this site's validation data.
            wait: Wait until all sites have reported on this version.

        Returns:
            The pooled metrics of all sites and whether the run ends with this version; `({}, False)` without `wait`.

        Raises:
            ProtocolError: There is no model of this version yet.
            ConfigError: A metric is not a number.
        """
        request = pb.ScoreRequest(
            session=self._session,
            version=report.version,
            metrics_json=metrics_json(report.metrics),
            num_examples=report.num_examples,
            wait=wait,
        )
        with self.training.interrupted():
            reply = self._calls.ask("Score", request, pb.ScoreReply)
        try:
            metrics = parse_json(reply.metrics_json or "{}", limit_chars=_METRICS_CHARS)
        except ValueError as error:
            raise ProtocolError(f"the server sends metrics that are not JSON: {error}") from None
        return plain(from_json(metrics)), reply.stop

    def send_files(self, files: Mapping[str, bytes], weights_file: str = "") -> FilesReceipt | None:
        """Send the small files that the final model needs beside its weights. Sending them again is harmless.

        Args:
            files: Name -> contents, of `fl_runtime.wire.model_files.MODEL_FILES`.
            weights_file: File that the framework reads the weights from, one of `WEIGHTS_FILES` there.

        Returns:
            What becomes of them; None if the server's version takes none.

        Raises:
            ProtocolError: The server refuses a file.
        """
        if FILES not in self._features:
            return None
        accepted = self._uploads.files(self._session, files, weights_file)
        differ = tuple(printable(name, 100) for name in accepted.differ)
        return FilesReceipt(accepted.status, printable(accepted.kept_of, 100), differ)

    def tunnel(self, accept: Callable[[Stream], None], lost: Callable[[], None]) -> Tunnel:
        """Open streams to other sites, which the server relays in a call of their own.

        Args:
            accept: Called with every stream that another site opens, by a thread of the tunnel.
            lost: Called when the connection of the tunnel is lost.

        Returns:
            The tunnel. The caller closes it.
        """
        keep_freed_memory()  # payloads of streams always travel in messages
        return Tunnel(self._transport, self._session, accept, lost)

    def leave(self, reason: str, *, early: bool, stays: bool = False) -> bool:
        """Leave the run. Errors are logged and not raised.

        A server that is out of reach is tried for a few seconds only. It finds out by itself that the site is gone.

        Args:
            reason: Why this site leaves, for the events and the other sites' error messages.
            early: True if the run goes on without this site.
            stays: True if the script goes on and may train again. The site then keeps the connection, and calls `leave`
                once more when its script ends.

        Returns:
            Whether the server has heard it.
        """
        patience_s = min(_GOODBYE_S, self._calls.patience_s)
        try:
            request = pb.LeaveRequest(session=self._session, reason=reason, early=early, stays=stays)
            self._calls.ask("Leave", request, pb.Done, patience_s)
        except FederationError as error:
            log.info("the server did not answer the goodbye: %s", error)
            return False
        return True

    def close(self) -> None:
        """Close the connection. May be called more than once, and while another thread is in a call."""
        self.training.close()
        if self._presence is not None:
            self._presence.close()
        self._calls.close()


def _check_server(reply: pb.JoinReply) -> None:
    """Raise ProtocolError for a protocol number that this version does not speak; warn of versions far apart."""
    lowest = reply.protocol_min or reply.protocol  # servers of earlier versions name the chosen number alone
    highest = max(reply.protocol_max, lowest)
    server = Software(printable(reply.version, 100), lowest, highest, frozenset(reply.features))
    if reply.protocol != choose_protocol(server, OWN):
        raise ProtocolError(
            f"the server has chosen protocol {reply.protocol}; the highest that both speak is "
            f"{choose_protocol(server, OWN)}",
            fix="ask the server's operator",
        )
    if text := misfit(server, OWN):
        log.warning("fl-adapters %s at this site %s", OWN.version, text)


def _check_older_server(rules: CohortRules, features: Collection[str], min_sites: object) -> None:
    """Refuse a server that does not know a rule, unless the job's quorum or the site itself keeps to it."""
    unmet = []
    if COHORT not in features:
        if rules.min_cohort > 1 and not (isinstance(min_sites, int) and min_sites >= rules.min_cohort):
            unmet.append(f"min_cohort: {rules.min_cohort}")
        if rules.max_share is not None:
            unmet.append(f"max_share: {rules.max_share:g}")
    if STAYS not in features and "metrics" in rules.stays:  # what else stays, the site does not send
        unmet.append("site_metrics: false")
    if unmet:
        raise PermissionDeniedError(
            "the server's version of fl-adapters does not keep to what this site's policy asks of a run",
            where=f"rule {unmet[0]} (the site's policy.yml)",
            fix="upgrade fl-adapters at the server"
            + (", or raise min_sites in the job" if unmet[0].startswith("min_cohort") else ""),
        )
