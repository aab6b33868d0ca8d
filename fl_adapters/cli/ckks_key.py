"""Command `fl-adapters ckks-key`: makes the sites' common key for encrypted averages."""

from __future__ import annotations

from pathlib import Path

from fl_adapters.cli.output import report_errors, show_json
from fl_adapters.job import Job
from fl_runtime.errors import ConfigError
from fl_runtime.filters import at_point
from fl_runtime.filters.ckks import HomomorphicCKKS
from fl_runtime.filters.ckks_key import make_key


def run(file: Path, job: Path | None, as_json: bool) -> int:
    """Make the key. Returns exit status 0."""
    with report_errors(as_json):
        fingerprint = make_key(file, _settings(job))
        if as_json:
            show_json({"file": str(file), "fingerprint": fingerprint})
        else:
            print(f"{file}: key {fingerprint}")
            print("Copy it to every site as ckks.key in the startup kit, and never to the server.")
    return 0


def _settings(job: Path | None) -> HomomorphicCKKS:
    if job is None:
        return HomomorphicCKKS()
    for item in at_point(Job.from_file(job).filters, "site_out"):
        if isinstance(item, HomomorphicCKKS):
            return item
    raise ConfigError("this job has no filter HomomorphicCKKS", where=str(job), fix="add it to the job's filters")
