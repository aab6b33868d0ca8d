"""The pages `/healthz` and `/metrics` of servers and site daemons, read as Prometheus reads them."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from prometheus_client.parser import text_string_to_metric_families
from source_tree import ROOT
from study import Study, project, until

from fl_adapters.cli.monitoring.health import Health, disk_fault
from fl_adapters.cli.monitoring.page import MonitoringPages
from fl_adapters.cli.monitoring.server_metrics import ServerMetrics
from fl_adapters.cli.monitoring.site_metrics import SiteMetrics
from fl_adapters.cli.site.activity import Activity
from fl_adapters.cli.site.feed import Contact
from fl_runtime.errors import ConfigError, FederationError
from fl_runtime.trust.audit import AuditLog
from fl_runtime.trust.authority import Authority, save_project, signed_members
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


@contextmanager
def serving(page: ServerMetrics) -> Iterator[str]:
    """Serve the pages for the block, and yield their address."""
    with closing(MonitoringPages("0", page.page, page.health.faults, page.state.text)) as pages:
        yield pages.address


@pytest.fixture
def page(tmp_path: Path) -> ServerMetrics:
    return ServerMetrics(tmp_path / "kits" / "server", tmp_path / "runs")


def test_the_page_shows_what_a_federation_did(tmp_path: Path, page: ServerMetrics) -> None:
    with Study(tmp_path, SITES, lambda name: page.rounds) as study:
        with serving(page) as address, page.serving(study.server):
            assert fetch(address, "/healthz") == (200, "ok\n")
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
            found = samples(fetch(address, "/metrics")[1])
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
    of_data = (("folder", "data"),)
    assert 0 < found["fl_adapters_disk_free_bytes", of_data] <= found["fl_adapters_disk_size_bytes", of_data]
    certificate = x509.load_pem_x509_certificate((tmp_path / "kits" / "server" / "certificate.pem").read_bytes())
    end = certificate.not_valid_after_utc.timestamp()
    assert found["fl_adapters_certificate_expiry_timestamp_seconds", ()] == end
    assert found["fl_adapters_serving", ()] == 1


def test_a_process_that_stands_by_says_so(tmp_path: Path) -> None:
    page = ServerMetrics(tmp_path / "kits" / "server", tmp_path / "runs", shares_store=True)
    with Study(tmp_path, SITES) as study, serving(page) as address:
        assert fetch(address, "/healthz") == (200, "ok, standing by\n")
        found = samples(fetch(address, "/metrics")[1])
        assert found["fl_adapters_serving", ()] == 0
        assert not [name for name, _ in found if name in ("fl_adapters_jobs", "fl_adapters_site_present")]
        with page.serving(study.server):
            assert fetch(address, "/healthz") == (200, "ok\n")
            assert samples(fetch(address, "/metrics")[1])["fl_adapters_serving", ()] == 1
        page.state.report("the database at db.example.org does not answer")
        status, text = fetch(address, "/healthz")
        assert status == 503 and "the shared store cannot be used: the database at db.example.org" in text
        page.state.report("")
        assert fetch(address, "/healthz")[0] == 200


def test_a_site_that_is_added_is_counted_by_name_at_once(tmp_path: Path, page: ServerMetrics) -> None:
    with Study(tmp_path, SITES) as study, serving(page) as address, page.serving(study.server):
        update = Event("update", 0.0, 1, "west", {"bytes_up": 7, "status": "used"})
        page.rounds(update)
        save_project(study.authority.folder, project(sites=(*SITES, "west")))
        authority = Authority(study.authority.folder)
        lists = {"crl": authority.crl.decode(), "members": signed_members(authority).decode()}
        study.admin("ada").ask("Revoke", **lists)
        page.rounds(update)
        found = samples(fetch(address, "/metrics")[1])
    assert found["fl_adapters_received_bytes_total", (("site", "other"),)] == 7
    assert found["fl_adapters_received_bytes_total", (("site", "west"),)] == 7
    assert found["fl_adapters_site_present", (("site", "west"),)] == 0


def documented_metrics(heading: str) -> set[str]:
    """Names of the metrics in a table of docs/operations.md, whose first column is headed so."""
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    table = text.partition(f"| {heading} | type | meaning |\n")[2].partition("\n\n")[0]
    return set(re.findall(r"`(fl_adapters_\w+)", table))


def shown_metrics(page: bytes) -> set[str]:
    """Names of the metrics of ours that a page shows."""
    families = text_string_to_metric_families(page.decode())
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    return {name for name in names if re.match("fl_adapters_.*(?<!_created)$", name)}


def test_the_documented_metrics_are_those_of_the_pages(tmp_path: Path, page: ServerMetrics) -> None:
    with Study(tmp_path, SITES) as study, page.serving(study.server):
        common, server = documented_metrics("both"), documented_metrics("server")
        assert shown_metrics(page.page()) == common | server
        site = site_page(study, connected_s=0.0)[0]
        assert shown_metrics(site.page()) == common | documented_metrics("site daemon")


def test_the_dashboard_of_grafana_queries_what_the_pages_serve(tmp_path: Path, page: ServerMetrics) -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "fl-adapters.json").read_text("utf-8"))
    variables = {item["name"]: item.get("definition", "") for item in board["templating"]["list"]}
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]] + list(variables.values())
    with Study(tmp_path, SITES) as study, page.serving(study.server):
        update = [{"status": "used", "bytes_up": 7}, {"bytes": 7}]
        page.rounds(Event("update", 0.0, 1, "north", update[0]))
        with pytest.raises(FederationError):
            study.admin("mina").ask("SubmitJob", job={"app": "train", "name": "third", "rounds": 2})
        served = {**samples(page.page().decode()), **samples(site_page(study, connected_s=0.0)[0].page().decode())}
    labels: dict[str, set[str]] = {}
    for name, of in served:
        labels.setdefault(name, {"job", "instance"}).update(label for label, _ in of)  # these two are of Prometheus
    queried = {name: set[str]() for name in re.findall(r"\b(?:fl_adapters|process)_\w+", " ".join(queries))}
    for query in queries:
        for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", query):
            queried[name].update(re.findall(r"(\w+)=~?", matchers))
        grouped = re.findall(r"\bby \(([^)]*)\)", query)
        for name in re.findall(r"\b(?:fl_adapters|process)_\w+", query):
            queried[name].update(label.strip() for group in grouped for label in group.split(","))
    assert {name: used for name, used in queried.items() if not used <= labels.get(name, set())} == {}
    assert queried.keys() <= labels.keys()
    families = {re.sub("_bucket$", "", name) for name in queried}
    described = documented_metrics("both") | documented_metrics("server") | documented_metrics("site daemon")
    assert described <= families  # whatever is served has its place
    assert set(re.findall(r"\$(?!__)(\w+)", " ".join(queries))) <= set(variables)
    taken = [(x, y) for panel in board["panels"] for x, y in squares(panel["gridPos"])]
    assert len(taken) == len(set(taken)) and len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def squares(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    """The squares of a dashboard's grid, 24 wide, that a panel covers."""
    for x in range(place["x"], place["x"] + place["w"]):
        assert 0 <= x < 24
        yield from ((x, y) for y in range(place["y"], place["y"] + place["h"]))


def site_page(study: Study, *, connected_s: float | None) -> tuple[SiteMetrics, Activity]:
    """The pages of a daemon of the site north which the server answered so long ago."""
    kit = study.kits / "north"
    contact = Contact(lambda *_: None, lambda *_: None)
    contact.answered_at = None if connected_s is None else time.time() - connected_s
    activity = Activity()
    activity.look([], 2)
    return SiteMetrics(kit, kit, activity, contact, AuditLog(kit, kit)), activity


def test_a_daemons_health_says_what_is_wrong_at_its_site(tmp_path: Path) -> None:
    with Study(tmp_path, SITES) as study:
        kit = study.kits / "north"
        assert site_page(study, connected_s=1.0)[0].health.faults() == []
        assert site_page(study, connected_s=None)[0].health.faults() == [
            "not connected: the server has not answered yet"
        ]
        page, _ = site_page(study, connected_s=45.0)
        (fault,) = page.health.faults()
        assert fault.startswith("not connected: the server has not answered since 20")
        found = samples(page.page().decode())
        assert found["fl_adapters_connected", ()] == 0
        assert found["fl_adapters_last_contact_timestamp_seconds", ()] == pytest.approx(time.time() - 45, abs=30)
        assert (found["fl_adapters_slots", ()], found["fl_adapters_slots_free", ()]) == (2, 2)
        key, certificate = study.certificate(study.authority.project.participant("north"), ends_in_s=-1.0)
        (kit / "key.pem").write_bytes(key)
        (kit / "certificate.pem").write_bytes(certificate)
        assert any("expired on 20" in fault for fault in page.health.faults())


def test_an_audit_log_that_was_changed_or_cannot_be_written_is_a_fault(tmp_path: Path, page: ServerMetrics) -> None:
    with Study(tmp_path, SITES) as study, serving(page) as address, page.serving(study.server):
        file = study.kits / "server" / "audit.jsonl"
        assert fetch(address, "/healthz")[0] == 200
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:-1]))
        status, text = fetch(address, "/healthz")
        assert status == 503 and "the audit log was changed: all lines were removed" in text and str(file) in text
        assert fetch(address, "/healthz")[0] == 503, "it stays so until somebody has looked"
        assert samples(fetch(address, "/metrics")[1])["fl_adapters_healthy", ()] == 0
        file.rename(tmp_path / "elsewhere")
        file.mkdir()
        status, text = fetch(address, "/healthz")
        assert status == 503 and "the audit log cannot be written: Is a directory" in text
        file.rmdir()
        (tmp_path / "elsewhere").rename(file)


def test_damage_that_another_process_has_found_is_a_fault_too(tmp_path: Path) -> None:
    with Study(tmp_path, SITES) as study:
        kit = study.kits / "north"
        of_daemon, of_script = AuditLog(kit, kit), AuditLog(kit, kit)
        of_script.write("site daemon started")
        assert of_daemon.fault() == ""
        (kit / "audit.head").unlink()
        of_script.write("joined")
        assert "audit.head, which signs the last line, was removed" in of_daemon.fault()
        assert AuditLog(kit, kit).fault() == "", "a start tells of what is found from then on"


def test_labels_are_a_bounded_set_whatever_events_name(page: ServerMetrics) -> None:
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
    health = Health((lambda: halted, lambda: disk_fault(folder, "journals")))
    with closing(MonitoringPages("127.0.0.1:0", lambda: b"", health.faults)) as pages:
        assert fetch(pages.address, "/healthz")[0] == 200
        halted = "no job can run: the disk fails"
        assert fetch(pages.address, "/healthz") == (503, "no job can run: the disk fails\n")
        halted = ""
        folder.rename(tmp_path / "elsewhere")
        status, text = fetch(pages.address, "/healthz")
        assert status == 503 and "journals cannot be written" in text and str(folder) in text
        assert fetch(pages.address, "/other")[0] == 404
    assert disk_fault(tmp_path, "journals", least_free_bytes=2**62).startswith("disk full: ")


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
    options = ["--listen", "127.0.0.1:0", "--metrics", "0", "--log-format", "json", "--log-file", str(tmp_path / "log")]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=os.environ) as server:
        stop = threading.Timer(60, server.kill)  # the longest that its lines are waited for
        stop.start()
        try:
            assert server.stderr is not None
            line = next(line for line in server.stderr if "metrics at " in line)
            address = json.loads(line)["text"].split("http://")[1].partition("/")[0]
            assert address.startswith("127.0.0.1:")
            until(lambda: fetch(address, "/healthz")[1] != "ok, starting\n", "the server to serve")
            assert fetch(address, "/healthz") == (200, "ok\n")
            assert samples(fetch(address, "/metrics")[1])["fl_adapters_healthy", ()] == 1
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
            logged = [json.loads(line)["text"] for line in (tmp_path / "log").read_text("utf-8").splitlines()]
            assert logged[0].startswith("metrics at http://127.0.0.1:")
            assert logged[1].startswith("study: serving at 127.0.0.1:")
        finally:
            stop.cancel()
            server.kill()
