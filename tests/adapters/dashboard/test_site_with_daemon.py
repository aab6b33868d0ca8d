"""A site's page in a real browser while a real daemon works behind it: decisions, progress, the log, its stop."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dashboards import dashboard_of, opened
from page_checks import faults_of, keyboard_faults_of
from study import Study, readdressed, until

from fl_adapters.cli.pages.site_section import SiteSection

STOPPED = "No daemon of this site is running."
SCRIPT = """
import time
from pathlib import Path
import numpy as np
import fl_adapters as fl

with fl.connect() as site:
    for task in site.tasks(initial={"w": np.zeros(3, np.float32)}):
        print("round", task.round, "begins", flush=True)
        while not Path("go").exists():
            time.sleep(0.01)
        task.submit({"w": task.arrays["w"] + np.float32(1)}, num_examples=1)
"""


@contextmanager
def daemon(kit: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `fl-adapters site` for the block, or until the test stops it."""
    command = [sys.executable, "-m", "fl_adapters.cli", "site", "--kit", str(kit)]
    with (folder / "daemon.txt").open("wb") as log, subprocess.Popen(command, cwd=folder, stderr=log) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_jobs_are_decided_and_followed_and_a_stopped_daemon_is_named(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    with Study(tmp_path / "study", ("north",)) as study:
        kit = readdressed(study, "north")
        apps = {"train": f"{sys.executable} {tmp_path / 'train.py'}"}
        (kit / "policy.yml").write_text(json.dumps({"apps": apps, "approve": "ask", "min_cohort": 1}))
        with dashboard_of(SiteSection(kit, kit)) as reader, opened(chromium, reader, "/site") as tab:
            tab.get_by_text(STOPPED).wait_for()
            with daemon(kit, tmp_path) as process:
                tab.get_by_text(STOPPED).wait_for(state="detached")
                for job, state in (("unwanted", "refused"), ("wanted", "running")):
                    tab.goto(f"{reader.origin}/site")
                    study.job(job, sites=["north"])
                    tab.get_by_role("row", name=job).get_by_text("waits for approval").wait_for()
                    tab.get_by_role("link", name=job, exact=True).click()
                    if state == "refused":
                        tab.get_by_label("Reason to refuse").fill("not our patients")
                    tab.get_by_role("button", name=f"{'Refuse' if state == 'refused' else 'Approve'} {job}").click()
                    tab.locator("#state", has_text=f"State: {state}").wait_for()
                assert study.server.wait_for_job("unwanted", 30)
                assert "not our patients" in str(study.server.outcome("unwanted")["error"])

                tab.locator("pre.log", has_text="round 1 begins").wait_for()
                tab.get_by_role("button").first.wait_for(state="detached")  # nothing is left to decide
                (tmp_path / "go").touch()
                tab.locator("#state", has_text="State: finished").wait_for()
                tab.get_by_role("link", name="The whole log").click()
                tab.locator("pre.log", has_text="round 2 begins").wait_for()
                assert study.server.wait_for_job("wanted", 30)

                tab.goto(f"{reader.origin}/site/job/wanted")
                assert tab.get_by_text(STOPPED).count() == 0
                process.terminate()
                tab.get_by_role("status").get_by_text(STOPPED).wait_for()
                assert process.wait(30) == 0, (tmp_path / "daemon.txt").read_text()
                assert faults_of(tab) == keyboard_faults_of(tab) == []
                tab.screenshot(path=tmp_path / "stopped.png", full_page=True)
            with daemon(kit, tmp_path):  # another one, under the eyes of the dashboard
                tab.get_by_text(STOPPED).wait_for(state="detached")
            until(lambda: "site daemon stopped" in reader.page("/site/audit"), "the audit log")
