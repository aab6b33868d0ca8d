"""Makes the pictures of the README from a run of an example: the screen while it lasts, the report, the dashboard.

    make pictures

Needs Chromium for the pages, and Pillow to make them small.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from fl_adapters import Job, Simulation
from fl_adapters.environments.progress import RunView
from fl_adapters.environments.progress.screen import run_screen
from fl_runtime.types import Event

HERE = Path(__file__).resolve().parent
SCRIPT = "examples/torch/image_classification/train_federated.py"
SITES = ("north", "south", "east", "west")
ROUNDS, SHOWN_ROUND = 24, 17
WIDTH = 92
COLORS = 64  # of a page's picture
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # from another host; the reader's own font will do


class Camera:
    """Listener that keeps the screen as it is in the middle of a round: some sites have answered, others train.

    Args:
        command: The command that the screen follows.

    Attributes:
        svg: The picture; "" before that round.
    """

    def __init__(self, command: str) -> None:
        self._view, self._command, self._begins = RunView(), command, 0
        self.svg = ""

    def __call__(self, event: Event) -> None:
        self._view(event)
        if event.kind == "starting":
            self._view.folder = f"runs/{self._view.job}"  # not the temporary folder
        if not self.svg and event.kind == "update" and event.round == SHOWN_ROUND and len(self._view.answered) == 2:
            console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
            console.print(Text(f"$ {self._command}", style="bold"))
            console.print(run_screen(self._view, WIDTH))
            svg = console.export_svg(title="fl-adapters", unique_id="screen")
            self.svg = FONTS.sub("", svg)


def photograph(page: str, out: Path, *, width: int, height: int) -> None:
    """Write a picture of the top of a page.

    Args:
        page: Address of the page.
        out: The PNG file.
        width: Width of the browser's window in pixels.
        height: Its height in pixels.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium is installed, which opens the pages")
    window = [f"--window-size={width},{height}", "--hide-scrollbars", f"--screenshot={out}"]
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", *window, page]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with Image.open(out) as picture:
        small = picture.convert("RGB").quantize(COLORS)
    small.save(out, optimize=True)


@contextmanager
def dashboard(runs: Path) -> Iterator[str]:
    """Serve the dashboard of a folder of runs during this block. Yields its address, with the key in it."""
    command = [sys.executable, "-m", "fl_adapters", "dashboard", "--runs", str(runs), "--no-browser", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["address"]
        finally:
            server.terminate()


def main() -> None:
    camera = Camera(f"fl-adapters simulate train_federated.py --sites {','.join(SITES)} --rounds {ROUNDS}")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(app=SCRIPT, name="digits", rounds=ROUNDS, best_metric="accuracy", best_mode="max")
        environment = Simulation(sites=SITES, args=["--data", "digits"], folder=folder, listeners=[camera])
        result = job.run(environment)
        (HERE / "terminal.svg").write_text(camera.svg, encoding="utf-8")
        photograph((result.folder / "report.html").as_uri(), HERE / "report.png", width=1100, height=1000)
        with dashboard(Path(folder)) as address:
            page = address.replace("/?", f"/runs/run/{result.job}?")
            photograph(page, HERE / "dashboard.png", width=1100, height=900)
    for picture in sorted(HERE.glob("*.*g")):
        print(f"{picture.relative_to(Path.cwd())}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
