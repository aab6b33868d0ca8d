"""The command `fl-adapters dashboard` as a process: its address, and its end by Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from http.client import HTTPConnection
from pathlib import Path

from dashboards import Reader

PATIENCE_S = 30


def test_ctrl_c_ends_the_dashboard_without_an_error_while_a_page_is_open(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "fl_adapters.cli", "dashboard", "--no-browser", "--json"]
    with subprocess.Popen(
        [*command, "--runs", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            reader = Reader(json.loads(process.stdout.readline() or "{}")["address"])
            assert "No runs in" in reader.page("/runs")
            follows = HTTPConnection(reader.host, timeout=PATIENCE_S)
            follows.request("GET", "/changes?page=/runs", headers={"Cookie": reader.cookie})
            stream = follows.getresponse()
            assert stream.readline() == b"data: new\n"
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=PATIENCE_S)
            follows.close()
        finally:
            process.kill()
    assert process.returncode == 0, told
    assert "Traceback" not in told and "error" not in told.lower()
