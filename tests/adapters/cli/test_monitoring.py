"""The pages `/healthz` and `/metrics` of a federation's server, read as Prometheus reads them."""

from __future__ import annotations

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from source_tree import ROOT
from study import Study, until

from fl_adapters.cli.monitoring.health import Health
from fl_adapters.cli.monitoring.page import MonitoringPages
from fl_adapters.cli.monitoring.server_metrics import ServerMetrics
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.types import Event

W = {"w": np.zeros(3, np.float32)}
SITES = ("north", "south")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def fetch(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_page_shows_what_a_federation_did(tmp_path: Path) -> None:
    page = ServerMetrics(SITES)
    with Study(tmp_path, SITES, lambda name: page.rounds) as study:
        pages = page.serve("0", study.server, study.runs)
        try:
            assert fetch(pages.address, "/healthz") == (200, "ok\n")
            study.job("first", rounds=3)
            study.job("second")
            with ThreadPoolExecutor(2) as pool:
                calls = [
                    pool.submit(study.site(name).take_part, W, lambda task: task.arrays, job="first") for name in SITES
                ]
                for call in calls:
                    call.result(60)
            assert study.server.wait_for_job("first", 30)
            with pytest.raises(FederationError):
                study.admin("mina").ask("SubmitJob", job={"app": "train", "name": "third", "rounds": 2})
            found = samples(fetch(pages.address, "/metrics")[1])
        finally:
            pages.close()
    history = list(csv.DictReader((study.runs / "first" / "history.csv").open()))
    assert found["fl_adapters_rounds_total", ()] == 3 == found["fl_adapters_round_duration_seconds_count", ()]
    for site in SITES:
        sent = sum(float(row["bytes_up"]) for row in history if row["site"] == site)
        assert found["fl_adapters_received_bytes_total", (("site", site),)] == sent > 0
        assert found["fl_adapters_sent_bytes_total", (("site", site),)] > 0
        assert found["fl_adapters_updates_total", (("site", site), ("status", "used"))] == 3
        assert found["fl_adapters_site_present", (("site", site),)] == 1
    states = {dict(labels)["state"]: value for (name, labels), value in found.items() if name == "fl_adapters_jobs"}
    assert states == {"queued": 0, "running": 1, "finished": 1, "failed": 0, "aborted": 0}
    assert found["fl_adapters_calls_refused_total", (("error", "PermissionDeniedError"),)] == 1
    assert found["fl_adapters_healthy", ()] == 1
    assert 0 < found["fl_adapters_disk_free_bytes", ()] <= found["fl_adapters_disk_size_bytes", ()]


def test_the_documented_metrics_are_those_of_the_page(tmp_path: Path) -> None:
    page = ServerMetrics(SITES)
    with Study(tmp_path, SITES, lambda name: page.rounds) as study:
        page.serve("0", study.server, study.runs).close()
        families = {
            f"{family.name}_total" if family.type == "counter" else family.name
            for family in text_string_to_metric_families(page.page().decode())
        }
    documented = set(re.findall(r"`(fl_adapters_\w+)", (ROOT / "docs" / "operations.md").read_text("utf-8")))
    assert documented == {name for name in families if re.match("fl_adapters_.*(?<!_created)$", name)}


def test_labels_are_a_bounded_set_whatever_events_name(tmp_path: Path) -> None:
    page = ServerMetrics(SITES)
    for number in range(100):
        update = {"bytes_up": 1, "status": f"status {number}", "metrics": {f"m{number}": 1.0}}
        page.rounds(Event("update", 0.0, 1, f"site\n{number}", update))
    found = samples(page.page().decode())
    assert found["fl_adapters_updates_total", (("site", "other"), ("status", "unused"))] == 100
    assert len([name for name, _ in found if name == "fl_adapters_updates_total"]) == 1


def test_health_says_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    halted = ""
    health = Health(folder, lambda: halted)
    pages = MonitoringPages("127.0.0.1:0", lambda: b"", health.faults)
    try:
        assert fetch(pages.address, "/healthz")[0] == 200
        halted = "the disk fails"
        assert fetch(pages.address, "/healthz") == (503, "no job can run: the disk fails\n")
        halted = ""
        folder.rename(tmp_path / "elsewhere")
        status, text = fetch(pages.address, "/healthz")
        assert status == 503 and "journals cannot be written" in text and str(folder) in text
        assert fetch(pages.address, "/other")[0] == 404
    finally:
        pages.close()
    (full,) = Health(tmp_path, lambda: "", least_free_bytes=2**62).faults()
    assert full.startswith("disk full: ")


def test_idle_connections_do_not_keep_the_page_from_others() -> None:
    pages = MonitoringPages("[::1]:0" if socket.has_ipv6 and _has_ipv6_loopback() else "0", lambda: b"", list)
    host, _, port = pages.address.rpartition(":")
    try:
        idle = [socket.create_connection((host.strip("[]"), int(port)), 10) for _ in range(40)]
        threads = [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
        assert len(threads) <= 16
        for connection in idle:
            connection.close()
        until(lambda: _answers(pages.address), "the page to answer")
    finally:
        pages.close()


def _has_ipv6_loopback() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def _answers(address: str) -> bool:
    try:
        return fetch(address, "/healthz")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("address", ["everywhere", "127.0.0.1:99999", "203.0.113.1:80"])
def test_an_address_that_cannot_be_listened_on_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match=address.replace(".", "[.]")):
        MonitoringPages(address, lambda: b"", list)


def test_the_command_serves_the_page_at_the_loopback(tmp_path: Path) -> None:
    with Study(tmp_path) as study:
        kit = study.kits / "server"
    command = [sys.executable, "-m", "fl_adapters.cli", "server", "--kit", str(kit), "--data", str(tmp_path / "data")]
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", "--metrics", "0"], stderr=subprocess.PIPE, text=True, env=os.environ
    ) as server:
        stop = threading.Timer(60, server.kill)  # the longest that its lines are waited for
        stop.start()
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if line.startswith("metrics at "))
            address = line.split("http://")[1].partition("/")[0]
            assert address.startswith("127.0.0.1:")
            assert fetch(address, "/healthz") == (200, "ok\n")
            assert samples(fetch(address, "/metrics")[1])["fl_adapters_healthy", ()] == 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
        finally:
            stop.cancel()
            server.kill()
