"""`fl-adapters cert ...`: certificates over their life, and `audit verify`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.environments.extras import needs_cryptography


def request(kit: Path, as_json: bool) -> int:
    """A new key in the kit, and the request to have it signed."""
    with report_errors(as_json), needs_cryptography():
        from fl_runtime.trust.kits import make_request

        path = make_request(kit)
        _say(as_json, f"send {path} to the authority; the key stays here", request=str(path))
    return 0


def sign(request_file: Path, authority: Path, out: Path | None, days: float | None, as_json: bool) -> int:
    """A certificate for a request, for who the project says it is from."""
    with report_errors(as_json), needs_cryptography():
        from fl_runtime.errors import ConfigError
        from fl_runtime.trust.authority import Authority
        from fl_runtime.trust.certificates import read_request
        from fl_runtime.trust.files import read_file, write_file

        keeper = Authority(authority)
        asked, key = read_request(read_file(request_file, "signing request"), str(request_file))
        known = keeper.project.participant(asked.name)
        if asked != known:
            raise ConfigError(
                f"the request is from {asked}; the project says {known}",
                where=str(request_file),
                fix="make the request with the kit of this federation, or correct the project",
            )
        path = out or request_file.with_name(f"{known.name}.pem")
        write_file(path, keeper.issue(known, key, days=days))
        _say(as_json, f"{known}: {path}; install it with `fl-adapters cert install`", certificate=str(path))
    return 0


def install(certificate: Path, kit: Path, as_json: bool) -> int:
    """A signed or renewed certificate into its kit, at once in force."""
    with report_errors(as_json), needs_cryptography():
        from fl_runtime.trust.files import read_file
        from fl_runtime.trust.kits import install as put

        found = put(kit, read_file(certificate, "certificate"), str(certificate))
        _say(as_json, f"{found.identity}: until {found.not_after:%Y-%m-%d %H:%M} UTC", **_facts(found, "valid"))
    return 0


def renew(names: Sequence[str], authority: Path, out: Path, days: float | None, as_json: bool) -> int:
    """New certificates for the same keys: of `names`, else of all that end soon."""
    with report_errors(as_json), needs_cryptography():
        from fl_runtime.trust.authority import Authority
        from fl_runtime.trust.files import write_file

        keeper = Authority(authority)
        due = list(names) or [name for name, found in _newest(keeper).items() if found.expires_soon]
        renewed = {}
        for name in due:
            path = out / f"{name}.pem"
            write_file(path, keeper.renew(name, days=days))
            renewed[name] = str(path)
        text = "\n".join(f"{name}: {path}" for name, path in renewed.items()) or "none ends soon"
        _say(as_json, text, renewed=renewed)
    return 0


def revoke(name: str, authority: Path, kit: Path | None, as_json: bool) -> int:
    """All certificates of NAME count for nothing; with an admin's kit, at the server at once."""
    with report_errors(as_json), needs_cryptography():
        from fl_runtime.control import ControlClient
        from fl_runtime.trust.authority import Authority
        from fl_runtime.trust.kits import read_kit

        mine = None if kit is None else read_kit(kit, kind="admin")
        keeper = Authority(authority)
        revoked, crl = keeper.revoke(name)
        told: dict[str, Any] = {}
        if mine is not None:
            control = ControlClient.of_kit(mine.folder, mine.address)
            try:
                told = control.ask("Revoke", crl=crl.decode())
            finally:
                control.close()
        where = "the server knows" if mine else f"copy {keeper.folder / 'crl.pem'} into the server's kit"
        serials = [f"{item.serial:x}" for item in revoked]
        _say(as_json, f"{name}: certificates revoked: {len(revoked)}; {where}", serials=serials, server=told or None)
    return 0


def listing(authority: Path, as_json: bool) -> int:
    """Every certificate that was signed, and what has become of it."""
    console = console_for(as_json)
    with report_errors(as_json), needs_cryptography():
        from fl_runtime.trust.authority import Authority

        keeper = Authority(authority)
        revoked, newest = keeper.revoked(), _newest(keeper)
        rows = []
        for found in keeper.issued():
            state = "valid"
            if found.serial in revoked:
                state = f"revoked {revoked[found.serial]}"
            elif found.not_after < datetime.now(UTC):
                state = "expired"
            elif newest[found.identity.name].serial != found.serial:
                state = "replaced"
            elif found.expires_soon:
                state = "ends soon"
            rows.append(_facts(found, state))
        table = Table("name", "who", "valid until", "days left", "state", "serial")
        for row in rows:
            table.add_row(
                row["name"],
                row["who"],
                row["not_after"][:10],
                f"{row['days_left']:.0f}",
                row["state"],
                row["serial"][:12],
            )
        console.print(table)
        if as_json:
            show_json({"authority": keeper.fingerprint, "certificates": rows})
    return 0


def verify(folder: Path, kit: Path | None, as_json: bool) -> int:
    """Exit status 1 if the audit log was tampered with."""
    console = console_for(as_json)
    with report_errors(as_json), needs_cryptography():
        from fl_runtime.trust.audit import verify as check

        count, findings = check(folder, kit)
        for finding in findings:
            console.print(f"line {finding.line}: {finding.what}" if finding.line else finding.what, highlight=False)
        console.print(f"{count} lines, {len(findings)} problems" if findings else f"{count} lines, nothing is wrong")
        if as_json:
            show_json({"ok": not findings, "lines": count, "findings": [asdict(finding) for finding in findings]})
    return 1 if findings else 0


def _newest(keeper: Any) -> dict[str, Any]:
    revoked = keeper.revoked()
    return {found.identity.name: found for found in keeper.issued() if found.serial not in revoked}


def _facts(found: Any, state: str) -> dict[str, Any]:
    return {
        "name": found.identity.name,
        "who": str(found.identity),
        "not_before": found.not_before.isoformat(),
        "not_after": found.not_after.isoformat(timespec="minutes"),
        "days_left": round(found.days_left(), 3),
        "state": state,
        "serial": f"{found.serial:x}",
    }


def _say(as_json: bool, text: str, **fields: Any) -> None:
    console_for(as_json).print(text, highlight=False, soft_wrap=True)
    if as_json:
        show_json(fields)
