"""Command `fl-adapters audit verify`: checks an audit log."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.extras import needs_trust_extra


def verify(folder: Path, kit: Path | None, as_json: bool) -> int:
    """Check the audit log in a folder. Returns exit status 1 if lines were edited, removed or moved."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.audit import verify as check

        count, findings = check(folder, kit)
        for finding in findings:
            console.print(f"line {finding.line}: {finding.what}" if finding.line else finding.what, highlight=False)
        console.print(f"{count} lines, {len(findings)} problems" if findings else f"{count} lines, nothing is wrong")
        if as_json:
            show_json({"ok": not findings, "lines": count, "findings": [asdict(finding) for finding in findings]})
    return 1 if findings else 0
