"""Command `fl-adapters privacy report`: what has left a site, when and to whom, from its audit log and ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.cli.privacy.ledger import job_totals
from fl_adapters.cli.privacy.page import Section, as_html, as_text
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError
from fl_runtime.filters.ledger import LEDGER_FILE, UNITS, Ledger
from fl_runtime.trainings import job_of

_LEAVING = {
    "handshake": "names and shapes of tensors",
    "update": "weights",
    "report": "score of a model",
    "stream": "stream to another site",
    "left": "reason for leaving",
}
_INITIAL = "weights for the initial model"
_NAME = "privacy-report"
_NOT_COUNTED = """\
Streams to other sites (swarm, XGBoost's histograms) pass the server encrypted; their bytes are not in this log.
At the handshake the adapter also sends what must be equal at all sites: settings, and names of labels and features or
digests of them. When and how often a site answers can be seen by the server.
With several processes or trainings, each line is one departure. Lines are those of the audit log; the last line is
signed with the site's key."""


def run(folder: Path, delta: float, out: Path | None, job: str, as_json: bool) -> int:
    """Write the report of a site as HTML and text. Returns exit status 1 if the audit log is not intact.

    Args:
        folder: Startup kit of the site.
        delta: The delta at which epsilon is stated.
        out: Folder for the two files; None for the kit.
        job: Name of the only job to report on; "" for all.
        as_json: Print one JSON object.
    """
    with report_errors(as_json), needs_trust_extra():
        from fl_runtime.trust.working_kit import working_kit

        report = collect(folder, delta, job)
        title, sections = f"What has left {report['site']}", page_of(report)
        text = as_text(title, sections)
        files = [(out or working_kit(folder)) / f"{_NAME}.{ending}" for ending in ("html", "txt")]
        try:
            files[0].parent.mkdir(parents=True, exist_ok=True)
            for file, content in zip(files, (as_html(title, sections), text), strict=True):
                file.write_text(content, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"the report cannot be written: {error.strerror}", where=str(error.filename), fix="choose another --out"
            ) from None
        console = console_for(as_json)
        console.print(text, highlight=False, soft_wrap=True)
        console.print(f"written: {files[0]}, {files[1].name}", highlight=False, soft_wrap=True)
        if as_json:
            show_json({**report, "files": [str(file) for file in files]})
    return 1 if report["log"]["findings"] else 0


def collect(folder: Path, delta: float, job: str = "") -> dict[str, Any]:
    """Collect what has left a site.

    Args:
        folder: Startup kit of the site.
        delta: The delta at which epsilon is stated.
        job: Name of the only job to report on; "" for all.

    Returns:
        JSON values: the site, the state of its log, and per job, departure, refusal and epsilon what is known.

    Raises:
        ConfigError: The folder is not the kit of a site with an audit log, or has nothing on the job.
    """
    from fl_runtime.trust.audit import Anchor, entries, verify
    from fl_runtime.trust.kits import read_unsigned
    from fl_runtime.trust.policy import POLICY_FILE, read_policy
    from fl_runtime.trust.working_kit import working_kit

    if not 0 < delta < 1:
        raise ConfigError(
            f"delta {delta:g} is out of range", where="--delta", fix="give a number between 0 and 1, such as 1e-5"
        )
    folder = working_kit(folder)
    identity, kit = read_unsigned(folder)
    if identity.kind != "site":
        raise ConfigError(f"this is the kit of a {identity.kind}", where=str(folder), fix="pass the kit of a site")
    lines, findings = verify(folder, Anchor(kit=folder))
    log = [entry for entry in entries(folder) if not job or job_of(str(entry.get("job", ""))) == job]
    spent = _spent(folder, delta, job)
    if job and not log and not spent:
        raise ConfigError(f"nothing is on record about the job {job}", where=str(folder), fix="see the report of all")
    departures = [_departure(entry) for entry in log if _leaves(entry)]
    return {
        "site": identity.name,
        "organisation": identity.organisation,
        "federation": identity.federation,
        "server": str(kit["server"]),
        "sites": list(kit.get("sites", [])),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "log": {"lines": lines, "findings": [finding.what for finding in findings]},
        "delta": delta,
        "jobs": _jobs(log, departures),
        "spent": spent,
        "departures": departures,
        "refused": [_refusal(entry) for entry in log if entry["outcome"] == "refused"],
        "policy": read_policy(folder / POLICY_FILE).model_dump(mode="json", exclude_defaults=True),
    }


def _leaves(entry: Mapping[str, Any]) -> bool:
    return entry["outcome"] == "done" and entry["action"] in _LEAVING


def _spent(folder: Path, delta: float, job: str) -> list[dict[str, Any]]:
    if not (folder / LEDGER_FILE).exists():
        return []
    ledger = Ledger(folder)
    try:
        return [row for row in job_totals(ledger.entries(), delta) if not job or row["job"] == job]
    finally:
        ledger.close()


def _departure(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return one departure; numbers that its line does not have are None."""
    what = _INITIAL if entry["action"] == "update" and entry.get("round") == 0 else _LEAVING[entry["action"]]
    numbers = ("round", "tensors", "numbers", "bytes", "num_examples")
    return {
        "line": entry["number"],
        "time": entry["time"],
        "job": str(entry.get("job", "")),
        "what": what,
        **{name: entry.get(name) for name in numbers},
        "metrics": entry.get("metrics", {}),
        "filters": [_filter_text(item) for item in entry.get("filters", [])],
        "text": entry.get("told", "") if entry["action"] == "left" else "",
    }


def _filter_text(item: Any) -> str:
    if not isinstance(item, Mapping):
        return str(item)  # logs of earlier versions have the names alone
    arguments = ", ".join(f"{name}={value}" for name, value in item.items() if name not in ("name", "site"))
    return f"{item.get('name')}({arguments})" + (" by the site's policy" if item.get("site") else "")


def _refusal(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(entry.get(name, "")) for name in ("time", "job", "action", "rule", "error")}


def _jobs(log: Sequence[Mapping[str, Any]], departures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the sums of each job, in the order in which the jobs began."""
    jobs = []
    for name in dict.fromkeys(d["job"] for d in departures):
        own = [d for d in departures if d["job"] == name]
        joined = next((e for e in log if e["action"] == "joined" and e.get("job") == name), {})
        jobs.append(
            {
                "job": name,
                "submitted_by": str(joined.get("submitted_by", "")),
                "first": own[0]["time"],
                "last": own[-1]["time"],
                "rounds": len({d["round"] for d in own if d["round"]}),
                **{total: sum(d[total] or 0 for d in own) for total in ("tensors", "numbers", "bytes")},
                "metrics": sorted({metric for d in own for metric in d["metrics"]}),
                "filters": list(dict.fromkeys(_kind(f) for d in own for f in d["filters"])),
            }
        )
    return jobs


def _kind(text: str) -> str:
    """Return a filter's text without what changes from round to round."""
    name, _, rest = text.partition("(")
    arguments, _, owner = rest.rpartition(")")
    kept = [part for part in arguments.split(", ") if part and not part.startswith(("spent=", "sent="))]
    return f"{name}({', '.join(kept)}){owner}" if rest else text


def page_of(report: Mapping[str, Any]) -> list[Section]:
    """Return the report as the sections of a page.

    Args:
        report: What `collect` returned.

    Returns:
        The sections, in the order in which an officer asks.
    """
    return [_summary(report), _jobs_section(report), _epsilon_section(report), *_lists(report)]


def _summary(report: Mapping[str, Any]) -> Section:
    findings = report["log"]["findings"]
    state = f"not intact: {'; '.join(findings)}" if findings else "intact: no line was edited, removed or moved"
    departures = report["departures"]
    first, last = [_when(departures[index]["time"]) for index in (0, -1)] if departures else ("", "")
    period = f"{first} to {last}" if departures else "nothing has left"
    lines = [
        f"Site: {report['site']}, organisation {report['organisation']}, federation {report['federation']}.",
        f"To whom: the server {report['server']}. It passes means of all sites' weights on to: "
        + (", ".join(name for name in report["sites"] if name != report["site"]) or "no other site")
        + ".",
        f"Period: {period}. Times are UTC. This page was made at {report['made']}.",
        f"Audit log: {report['log']['lines']} lines, {state}.",
        "Training data never leaves a site. What leaves are numbers that were computed from it, listed below.",
    ]
    if any(d["what"] == _INITIAL for d in departures):
        lines.append("This site's weights began a run, unfiltered; `initial: false` in policy.yml forbids it.")
    return Section("In short", "\n".join(lines))


def _jobs_section(report: Mapping[str, Any]) -> Section:
    columns = "job;submitted by;from;to;rounds;tensors;numbers;bytes;metrics;filters in force".split(";")
    rows = [
        [
            *(job["job"], job["submitted_by"], _when(job["first"]), _when(job["last"])),
            *(str(job[field]) for field in ("rounds", "tensors", "numbers", "bytes")),
            ", ".join(job["metrics"]),
            "; ".join(job["filters"]) or ("none: the weights left as they were" if job["numbers"] else ""),
        ]
        for job in report["jobs"]
    ]
    return Section("What left, per job", "", columns, rows)


def _epsilon_section(report: Mapping[str, Any]) -> Section:
    text = (
        f"Epsilon is stated at delta {report['delta']:g}. The smaller it is, the less anyone can tell about what it "
        "protects.\n" + "\n".join(f'"{unit}" protects {words}.' for unit, words in UNITS.items())
    )
    if not report["spent"]:
        text = "No filter with a privacy budget has run at this site, so no epsilon can be stated."
    rows = [[str(row[f]) for f in ("job", "protects", "rounds", "epsilon")] for row in report["spent"]]
    return Section("Differential privacy", text, ("job", "protects", "rounds", "epsilon") if rows else (), rows)


def _lists(report: Mapping[str, Any]) -> list[Section]:
    columns = "line;time;job;round;what;tensors;numbers;bytes;examples;metrics;filters".split(";")
    numbers = ("tensors", "numbers", "bytes", "num_examples")
    rows = [
        [
            *(str(d["line"]), _when(d["time"]), d["job"], _shown(d["round"]), d["what"]),
            *(_shown(d[field]) for field in numbers),
            ", ".join(f"{name}={value}" for name, value in d["metrics"].items()) or d["text"],
            ", ".join(text.partition("(")[0] for text in d["filters"]) or ("none" if d["numbers"] else ""),
        ]
        for d in report["departures"]
    ]
    refused = [[_when(r["time"]), *(r[f] for f in ("job", "action", "rule", "error"))] for r in report["refused"]]
    policy = [[name, str(value)] for name, value in report["policy"].items()]
    return [
        Section("Every departure", "", columns, rows),
        Section("What was refused", "", ("time", "job", "action", "rule", "reason"), refused),
        Section("The site's policy now", "Rules that differ from the defaults.", ("rule", "value"), policy),
        Section("What this page does not count", _NOT_COUNTED),
    ]


def _when(time: str) -> str:
    """Return a time of the log in seconds: 2026-12-01 21:44:48."""
    return time[:19].replace("T", " ")


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
