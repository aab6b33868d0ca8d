"""Command `fl-adapters audit verify`: checks an audit log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra


def verify(
    folder: Path,
    kit: Path | None,
    authority: Path | None,
    key: Path | None,
    witnesses: Sequence[Path],
    as_json: bool,
) -> int:
    """Check the audit log in a folder. Returns exit status 1 if lines were edited, removed, added or moved."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.audit import Anchor, log_file, signer
        from fl_runtime.trust.audit import verify as check
        from fl_runtime.trust.working_kit import working_kit

        folder, kit = working_kit(folder), None if kit is None else working_kit(kit)
        log_file(folder)  # said first, whatever else is missing
        count, findings = check(folder, Anchor(kit, authority, key), witnesses)
        who = signer(folder)
        for finding in findings:
            console.print(f"line {finding.line}: {finding.what}" if finding.line else finding.what, highlight=False)
        state = f"{len(findings)} problems" if findings else f"nothing is wrong; signed by {who}"
        console.print(f"{count} lines, {state}", highlight=False)
        if as_json:
            ok, problems = not findings, [asdict(finding) for finding in findings]
            show_json({"ok": ok, "lines": count, "signer": who, "findings": problems})
    return 1 if findings else 0
