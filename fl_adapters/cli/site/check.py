"""Command `fl-adapters site check`: what a job would run at this site, and which rules would refuse it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fl_adapters.cli.output import console_for, report_errors, show_json
from fl_adapters.cli.site.resources import Capacity
from fl_adapters.extras import needs_trust_extra
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.types.needs import Needs


def run(kit_folder: Path, job_file: Path, submitter: str, as_json: bool) -> int:
    """Show the plan for a job. Returns exit status 0 if nothing refuses it, else 1."""
    console = console_for(as_json)
    with report_errors(as_json), needs_trust_extra():
        plan = plan_for(kit_folder, job_file, submitter)
        lines = {
            "job": plan["job"],
            "command": plan["command"] or "none",
            "data": plan["data"] or "the policy names none",
            "gpus": "as the environment says" if plan["gpus"] is None else plan["gpus"] or "none",
            "at a time": plan["processes"],
            "filters": ", ".join(item["name"] for item in plan["filters"]) or "none",
            "files": _shared_files(plan["share_files"]),
            "approval": "somebody at the site must approve it" if plan["approval"] else "not needed",
        }
        for name, value in lines.items():
            console.print(f"{name:>10}  {value}", highlight=False, soft_wrap=True)
        for text in plan["unchecked"]:
            console.print(f"unchecked: {text}", highlight=False, soft_wrap=True)
        for refusal in plan["refusals"]:
            text = FederationError.from_wire(refusal)
            console.print(f"refused: {text}", highlight=False, soft_wrap=True)
        if not plan["refusals"]:
            console.print("nothing refuses this job", highlight=False)
        if as_json:
            show_json(plan)
        return 1 if plan["refusals"] else 0


def plan_for(kit_folder: Path, job_file: Path, submitter: str) -> dict[str, Any]:
    """Return what this site would do with a job.

    Args:
        kit_folder: The site's startup kit.
        job_file: The job (YAML).
        submitter: Who would submit it: a URI, or "ROLE NAME of ORGANISATION". "" if unknown.

    Returns:
        JSON values: `job`, `app`, `command` (None without one), `data` (None without), `gpus`, `processes`, `filters`
        (in the order in which they run), `share_files` (patterns of the small files beside the model that may go to the
        server), `approval`, `refusals` (each with `code`, `what`, `where`, `fix`), `unchecked`.

    Raises:
        ConfigError: The kit, its policy or the job cannot be read.
    """
    from fl_adapters.cli.site.command import CommandError, command_for, data_for, quoted
    from fl_adapters.job import Job
    from fl_adapters.participant.policy_gate import KitPolicyGate, job_refusals
    from fl_runtime.trust.kits import read_kit

    gate, kit = KitPolicyGate(kit_folder), read_kit(kit_folder, kind="site")
    job = Job.from_file(job_file)
    sites = kit.sites if job.sites is None or isinstance(job.sites, int) else job.sites
    if isinstance(job.sites, int) and job.sites != len(kit.sites):
        raise ConfigError(
            f"the job is for {job.sites} sites, the federation has {len(kit.sites)}",
            where=f"{job_file}: sites",
            fix="name the sites",
        )
    settings = asdict(job.settings(sites)) | {"submitted_by": _uri(submitter, gate.identity.federation)}
    policy, capacity = gate.policy, Capacity.of(gate.policy.resources)
    refusals = list(job_refusals(policy, gate.identity, settings, submitter_known=bool(submitter)))
    command = None
    try:
        command = quoted(command_for(gate, job.app))
    except CommandError as error:
        refusals.append(error)
    try:
        data_for(gate, job.app)
    except CommandError as error:
        refusals.append(error)
    refusals.extend(_unusable_filters([*job.filters, *policy.filters]))
    if gate.identity.name not in sites:
        refusals.append(ConfigError(f"{gate.identity.name} is not a site of this job", where=f"{job_file}: sites"))
    needs = Needs.of(job.resources)
    if lacks := capacity.lacks(needs):
        refusals.append(ConfigError(lacks, where=f"{job_file}: resources"))
    place = capacity.place(needs, [])
    return {
        "job": job.name,
        "app": job.app,
        "command": command,
        "data": policy.data_for(job.app),
        "gpus": place.visible_devices if place else "",
        "processes": capacity.slots,
        "filters": [dict(item) for item in (*job.filters, *policy.filters)],
        "share_files": list(policy.share_files if policy.names else ()),
        "approval": policy.approve == "ask",
        "refusals": [error.to_wire() for error in refusals],
        "unchecked": _unchecked(policy, settings, bool(submitter)),
    }


def _shared_files(patterns: Sequence[str]) -> str:
    """Which small files beside the model may go to the server, for people."""
    return f"{', '.join(patterns)} of config.json, tokenizer and the like" if patterns else "none beside the weights"


def _unchecked(policy: Any, settings: Mapping[str, Any], submitter_known: bool) -> list[str]:
    """What the policy decides only when the script runs, as sentences."""
    texts = {
        "submitters: give --submitter to check who may submit it": not submitter_known and policy.submitters.limits,
        "strategies: the job leaves the strategy to the script": policy.strategies and not settings["strategy"],
        "adapters: known when the script joins": policy.adapters,
        "exchange: the names of the tensors are known when the script registers": policy.exchange,
        "max_round_bytes: the size of updates is known when they are sent": policy.max_round_bytes is not None,
        "min_cohort, swarm, trees: the job leaves the strategy to the script": policy.rules.stays
        and not settings["strategy"],
        "initial: false holds if this site would be asked for the initial model": policy.initial is False
        and not (settings["initial"] or settings["initial_job"]),
        "privacy: the budget is charged in every round": policy.privacy,
    }
    return [text for text, holds in texts.items() if holds]


def _unusable_filters(filters: list[Mapping[str, Any]]) -> Iterator[FederationError]:
    from fl_runtime.filters import check_filters

    try:
        check_filters(filters, None, None)
    except FederationError as error:
        yield error


def _uri(submitter: str, federation: str) -> str:
    """The URI of an admin, written as such or as "ROLE NAME of ORGANISATION". "" stays ""."""
    from fl_runtime.trust.identity import Identity

    if not submitter or "://" in submitter:
        return submitter
    words = re.fullmatch(r"(\S+) (\S+) of (\S+)", submitter)
    if words is None:
        raise ConfigError(
            f"--submitter cannot be {submitter!r}", fix='write it as in "lead lena of north-hospital", or as a URI'
        )
    return Identity(federation, "admin", words[2], words[3], words[1]).uri  # type: ignore[arg-type]
