"""Command `fl-adapters run`: waits for a job, checks it against the site's policy, and runs a training command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fl_adapters.cli.output import report_errors, show_json
from fl_adapters.extras import needs_trust_extra
from fl_adapters.participant.kit import KIT_VARIABLE, Kit
from fl_adapters.participant.kit import read_kit as read_script_kit
from fl_adapters.participant.policy_gate import LeaveReason
from fl_runtime.errors import ConfigError, ConnectionLostError, FederationError, PermissionDeniedError, SiteFailedError
from fl_runtime.wire.software import OWN

if TYPE_CHECKING:
    from fl_adapters.cli.site.assignment import Assignment
    from fl_adapters.participant.departure import ScriptNote
    from fl_adapters.participant.policy_gate import KitPolicyGate

_LOOK_S = 0.5


def run(kit_folder: Path, command: Sequence[str], results: Path | None, patience_s: float | None, as_json: bool) -> int:
    """Run the command. Returns its exit status, as a shell does: 128 + N after signal N."""
    with report_errors(as_json), needs_trust_extra():
        from fl_adapters.cli.site.assignment import Assignment
        from fl_adapters.participant.policy_gate import KitPolicyGate
        from fl_runtime.client.control import ControlClient
        from fl_runtime.client.roots import RenewingTransport
        from fl_runtime.trust.working_kit import working_kit

        kit_folder = working_kit(kit_folder)
        gate = KitPolicyGate(kit_folder)
        kit = read_script_kit(kit_folder)
        if patience_s is not None:
            kit = replace(kit, patience_s=patience_s, own_patience=True)
        with gate.process_slot():
            _say(f"{gate.identity} waits for a job of {gate.identity.federation} at {' or '.join(kit.addresses)}")
            # the command connects by itself
            with closing(ControlClient(RenewingTransport.of_kit(kit_folder, kit.addresses))) as control:
                witness = gate.witness()
                told = {"log": witness.statement(), "software": OWN.to_json()}
                answer = control.ask("Assignment", patience_s=kit.patience_s, **told)
                witness.take(answer.get("log"), "server")
            job = Assignment.of(answer)
            _say(f"job {job.job}, submitted by {job.submitted_by}")
            words, data = _checked_command(gate, kit, job, command)
            _await_approval(gate, kit, job)
            status = _run(gate, kit, job, words, data, results)
        if as_json:
            show_json({"job": job.job, "site": kit.site, "status": status})
        return status if status >= 0 else 128 - status


def _checked_command(gate: KitPolicyGate, kit: Kit, job: Assignment, command: Sequence[str]) -> tuple[list[str], str]:
    """The words of the command and where its data lie, for a job that the policy allows.

    The server is told of a refusal before it is raised, so that no site waits.
    """
    from fl_adapters.cli.site.command import CommandError, command_for, data_for

    try:
        gate.check_job(job.settings)
        return list(command) or command_for(gate, job.app), data_for(gate, job.app)
    except FederationError as error:
        _leave(gate, kit, job, None, error.reason if isinstance(error, CommandError) else LeaveReason.of(error))
        raise


def _await_approval(gate: KitPolicyGate, kit: Kit, job: Assignment) -> None:
    """Wait until somebody at the site has approved the job, if the policy asks for that."""
    from fl_adapters.cli.site.records import JobFolder

    folder = JobFolder(Path(kit.credentials, "jobs", job.job))
    if gate.decision_on(job.settings) is None:
        folder.write(job, "waits for approval")
        _say(f"the job waits until somebody says: fl-adapters site approve {job.job} --kit {kit.credentials}")
    while (decision := gate.decision_on(job.settings)) is None:
        time.sleep(_LOOK_S)
    if not decision.approved:
        said = f": {decision.reason}" if decision.reason else ""
        reason = f"somebody at the site has refused the job{said}"
        _leave(gate, kit, job, None, LeaveReason.own(reason))
        raise PermissionDeniedError(reason, where="rule approve: ask (the site's policy.yml)")


def _run(gate: KitPolicyGate, kit: Kit, job: Assignment, words: Sequence[str], data: str, results: Path | None) -> int:
    """Run the command with a kit of its own, and tell the server if it ends too soon."""
    from fl_adapters.cli.site.command import command_kit, gpu_environment
    from fl_adapters.cli.site.own_progress import OwnLines
    from fl_adapters.participant.departure import ScriptNote

    with tempfile.TemporaryDirectory(prefix="fl-adapters-kit-") as folder:
        own = command_kit(kit, job, results, data=data, supervised=False, shared=results is not None)
        own_folder = own.save(Path(folder, "kit"))
        environment = {**os.environ, **gpu_environment(gate.policy), KIT_VARIABLE: str(own_folder)}
        gate.record("command started", job=job.job, command=list(words))
        try:
            process = subprocess.Popen(words, env=environment)
        except OSError as error:
            reason = f"{words[0]} cannot be started: {error.strerror}"
            gate.record("command failed", job=job.job, reason=reason)
            _leave(gate, kit, job, None, LeaveReason(reason, "its command cannot be started"))
            raise ConfigError(reason, fix="check the command after --") from None
        with _passed_on(process):
            status = OwnLines(kit, job.job, own_folder, _say).until_ended(process)
        gate.record("command ended", job=job.job, status=status)
        if _compare_logs(gate, kit, kit.patience_s if status else 0.0):  # a site that failed must not be waited for
            _report_early_end(gate, kit, job, ScriptNote.read(own_folder), status)
    return status


def _compare_logs(gate: KitPolicyGate, kit: Kit, patience_s: float) -> bool:
    """Note where the server's audit log ends now, and tell the server where this site's does.

    Returns whether the server was within reach before `patience_s` seconds had passed.
    """
    from fl_runtime.client.control import ControlClient
    from fl_runtime.client.roots import RenewingTransport

    witness, transport = gate.witness(), RenewingTransport.of_kit(Path(kit.credentials), kit.addresses)
    with suppress(ConnectionLostError), closing(ControlClient(transport)) as control:
        witness.take(control.ask("Status", patience_s=patience_s, log=witness.statement()).get("log"), "server")
        return True
    return False


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM on to the command during this block. Ctrl-C reaches the command without help."""
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report_early_end(gate: KitPolicyGate, kit: Kit, job: Assignment, note: ScriptNote | None, status: int) -> None:
    """Tell the server at once of a command that ended before the last round, or without telling the server.

    The server hears it in the name of the process that this command has started. If another one has joined since, as
    when a forgotten second `run` comes to its end, that one goes on.
    """
    if note is not None and note.state == "done":
        if status != 0:
            _leave(gate, kit, job, note, LeaveReason.own("its command has ended"))
        return
    if note is not None and note.state == "left":
        return
    reason = LeaveReason.own(f"its command ended before the last round (exit status {status})")
    heard = _leave(gate, kit, job, note, reason)
    if status == 0 and heard:
        raise SiteFailedError(
            "the command ended before the last round",
            where=job.job,
            fix="let it take part until the last round, with FederatedCallback() or fl_adapters.connect()",
        )


def _leave(gate: KitPolicyGate, kit: Kit, job: Assignment, note: ScriptNote | None, reason: LeaveReason) -> bool:
    """Leave the job for good, in the name of the process that this command has started, if any."""
    from fl_adapters.cli.site.command import leave

    heard = leave(gate, kit, job.job, note, reason)
    if not heard:
        _say("the server does not wait for this command any more, or cannot be reached")
    return heard


def _say(text: str) -> None:
    print(f"fl-adapters: {text}", file=sys.stderr, flush=True)
