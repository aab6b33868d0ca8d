"""Command `fl-adapters run`: waits for a job, checks it against the site's policy, and runs a training command."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl_adapters.cli.output import report_errors, show_json
from fl_adapters.extras import needs_trust_extra
from fl_adapters.participant.kit import KIT_VARIABLE, Kit
from fl_adapters.participant.kit import read_kit as read_script_kit
from fl_adapters.participant.policy_gate import LeaveReason
from fl_runtime.errors import ConfigError, ConnectionLostError, FederationError, PermissionDeniedError, SiteFailedError

_PATIENCE_S = 30.0


def run(kit_folder: Path, command: Sequence[str], results: Path | None, patience_s: float | None, as_json: bool) -> int:
    """Run the command. Returns its exit status, as a shell does: 128 + N after signal N."""
    with report_errors(as_json), needs_trust_extra():
        from fl_adapters.participant.policy_gate import KitPolicyGate
        from fl_runtime.client.control import ControlClient
        from fl_runtime.client.roots import RenewingTransport

        site = KitPolicyGate(kit_folder)
        kit = read_script_kit(kit_folder)
        if patience_s is not None:
            kit = replace(kit, patience_s=patience_s, own_patience=True)
        with site.process_slot():
            _say(f"{site.identity} waits for a job of {site.identity.federation} at {' or '.join(kit.addresses)}")
            # the command connects by itself
            with closing(ControlClient(RenewingTransport.of_kit(kit_folder, kit.addresses))) as control:
                witness = site.witness()
                job = control.ask("Assignment", patience_s=kit.patience_s, log=witness.statement())
                witness.take(job.get("log"), "server")
            _say(f"job {job['job']}, submitted by {job['submitted_by']}")
            _check(site, kit, job)
            status = _run(site, kit, job, command, results)
            with closing(ControlClient(RenewingTransport.of_kit(kit_folder, kit.addresses))) as control:
                _report_early_end(control, site, kit, job, status)
        if as_json:
            show_json({"job": job["job"], "site": kit.site, "status": status})
        return status if status >= 0 else 128 - status


def _check(site: Any, kit: Kit, job: Mapping[str, Any]) -> None:
    """Check the job against the policy. Tells the server of a refusal before raising it, so that no site waits."""
    try:
        site.check_job({**job, "name": job["job"]})
    except PermissionDeniedError as error:
        _leave(site, kit, job["job"], error)
        raise


def _run(site: Any, kit: Kit, job: Mapping[str, Any], command: Sequence[str], results: Path | None) -> int:
    """Run the command, or the policy's command for the job's app, with a kit of its own."""
    words = list(command) or shlex.split(site.app_command(job["app"]))
    with tempfile.TemporaryDirectory(prefix="fl-adapters-kit-") as folder:
        command_kit = Kit(
            job=job["job"],
            site=kit.site,
            index=job["index"],
            count=job["count"],
            server=kit.server,
            servers=kit.servers,
            token="",
            credentials=kit.credentials,
            run="" if results is None else str(results.resolve()),
            simulated=results is not None,
            patience_s=kit.patience_s,
            own_patience=kit.own_patience,
        )
        environment = {**os.environ, **site.environment(), KIT_VARIABLE: str(command_kit.save(Path(folder, "kit")))}
        site.record("command started", job=job["job"], command=words)
        try:
            process = subprocess.Popen(words, env=environment)
        except OSError as error:
            reason = f"{words[0]} cannot be started: {error.strerror}"
            site.record("command failed", job=job["job"], reason=reason)
            _leave(site, kit, job["job"], LeaveReason(reason, "its command cannot be started"))
            raise ConfigError(reason, fix="check the command after --") from None
        with _passed_on(process):
            status = process.wait()
        site.record("command ended", job=job["job"], status=status)
    return status


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


def _report_early_end(control: Any, site: Any, kit: Kit, job: Mapping[str, Any], status: int) -> None:
    """Tell the server at once of a command that ended before the last round, or without telling the server."""
    try:
        witness = site.witness()
        patience_s = kit.patience_s if status else 0.0  # else the server would wait as long for a site that failed
        status_now = control.ask("Status", patience_s=patience_s, log=witness.statement())
        witness.take(status_now.get("log"), "server")
        running = _state_of(job["job"], status_now)
    except ConnectionLostError:
        return
    if not running:
        return
    states = running.get("site_states", running["sites"])
    training, standing = running.get("training", 1), states.get(kit.site, "gone")
    if standing.startswith("done"):
        _leave(site, kit, job["job"], LeaveReason.own("its command has ended"), training, early=status != 0)
    elif not standing.startswith("gone"):
        reason = LeaveReason.own(f"its command ended before the last round (exit status {status})")
        _leave(site, kit, job["job"], reason, training)
        if status == 0:
            raise SiteFailedError(
                "the command ended before the last round",
                where=job["job"],
                fix="let it take part until the last round, with FederatedCallback() or fl_adapters.connect()",
            )


def _state_of(name: str, status: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Where a job stands in the answer of the server, if it runs. Older servers run, and tell, one job only."""
    jobs = status.get("jobs", [status["running"]])
    return next((job for job in jobs if job and job["job"] == name and "phase" in job), None)


def _leave(
    site: Any, kit: Kit, job: str, reason: LeaveReason | BaseException, training: int = 1, *, early: bool = True
) -> None:
    """Leave a training of the job for good, in the name of the site."""
    from fl_runtime.client import SiteClient
    from fl_runtime.client.roots import RenewingTransport

    transport = RenewingTransport.of_kit(Path(kit.credentials), kit.addresses)
    client = SiteClient(transport, _PATIENCE_S, own_patience=True)
    try:
        client.join(job, training)
        client.leave(site.record_leaving(LeaveReason.of(reason), early=early), early=early)
    except FederationError as error:
        _say(f"could not tell the server: {error.what}")
    finally:
        client.close()


def _say(text: str) -> None:
    print(f"fl-adapters: {text}", file=sys.stderr, flush=True)
