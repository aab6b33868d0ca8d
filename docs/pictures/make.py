"""Makes the pictures of the README from a run of an example: a recording of the screen, the report, the dashboard.

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
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from PIL import Image
from rich.console import Console, RenderableType
from rich.segment import SegmentLines
from rich.text import Text

from fl_adapters import Job, Simulation
from fl_adapters.cli.simulate import sum_up
from fl_adapters.environments.local import SimulationResult
from fl_adapters.environments.progress import RunView
from fl_adapters.environments.progress.screen import run_screen
from fl_runtime.types import Event

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parents[1] / "examples/torch/image_classification/train_federated.py"
SITES = ("north", "south", "east", "west")
ROUNDS, STEPS = 8, 250  # rounds, and steps of each, so that it takes a while
ARGS = ("--data", "digits")
COLORS = 64  # of a page's picture

WIDTH, HEIGHT = 92, 30  # columns and rows of the recorded terminal
FRAME_S = 0.4  # least time between two frames
PAUSE_S = 1.0  # longest time between two frames: the start of the processes would be long to look at
LAST_S = 6.0  # how long the end of the run stays
UNSEEN = re.compile(r' clip-path="url\(#screen-line-\d+\)"|<text [^>]*>(?:&#160;|\s)*</text>')  # shows nothing
FILM = """\
<svg class="rich-terminal" viewBox="0 0 {{width}} {height}" xmlns="http://www.w3.org/2000/svg">
<!-- Generated with Rich https://www.textualize.io -->
<style>
.screen-matrix {{{{ font-family: Fira Code, monospace; font-size: 20px; line-height: 24.4px }}}}
.screen-title {{{{ font-size: 18px; font-weight: bold; font-family: arial }}}}
{{styles}}
.film {{{{ animation: film {seconds:.1f}s step-end infinite }}}}
@keyframes film {{{{ {keyframes} }}}}
@media (prefers-reduced-motion: reduce) {{{{ .film {{{{ animation: none }}}} }}}}
</style>
<defs><clipPath id="window"><rect width="{{terminal_width}}" height="{inside}"/></clipPath></defs>
<rect fill="#292929" stroke="#888" x="1" y="1" width="{{terminal_width}}" height="{window}" rx="8"/>
<text class="screen-title" fill="#c5c8c6" text-anchor="middle" x="50%" y="27">fl-adapters</text>
<g transform="translate(26,22)">
<circle r="7" fill="#ff5f57"/><circle cx="22" r="7" fill="#febc2e"/><circle cx="44" r="7" fill="#28c840"/>
</g>
<g transform="translate({{terminal_x}}, {{terminal_y}})" clip-path="url(#window)">
<g class="film" transform="translate(0, {still})">{{backgrounds}}<g class="screen-matrix">{{matrix}}</g></g>
</g>
</svg>
"""
"""The recording: all frames, one below the other, move behind a window of the height of one. Rich fills in the rest."""
ROW = 24.4  # height of a row in rich's pictures, in pixels


@dataclass(frozen=True)
class Frame:
    """What the terminal shows from a moment on.

    Attributes:
        at_s: The moment, in seconds since the start of the run.
        ansi: The text, with the escape codes of its colours.
    """

    at_s: float
    ansi: str


class Camera:
    """Listener that records the screen of a run, as often as it changes visibly.

    Args:
        command: The command that the screen follows.

    Attributes:
        view: The state of the run.
        frames: What was recorded.
    """

    def __init__(self, command: str) -> None:
        self.view, self.frames = RunView(), [_frame(0.0, prompt := Text(f"$ {command}", style="bold"))]
        self._prompt = prompt

    def __call__(self, event: Event) -> None:
        self.view(event)
        if event.kind == "starting":
            self.view.folder = f"runs/{self.view.job}"  # not the temporary folder
        at_s = time.monotonic() - self.view.began
        if at_s - self.frames[-1].at_s >= FRAME_S:
            self.frames.append(_frame(at_s, self._prompt, run_screen(self.view, WIDTH)))

    def end(self, result: SimulationResult) -> None:
        """Record what the command prints at the end.

        Args:
            result: Result of the run.
        """
        console = _console()
        console.print(self._prompt)
        console.print(run_screen(self.view, WIDTH))
        sum_up(result, console, self.view.best_metric)
        self.frames.append(Frame(time.monotonic() - self.view.began, _shown(console)))


def _console() -> Console:
    return Console(width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor", markup=False)


def _shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _frame(at_s: float, *parts: RenderableType) -> Frame:
    console = _console()
    for part in parts:
        console.print(part)
    return Frame(at_s, _shown(console))


def film(frames: Sequence[Frame]) -> str:
    """Return an animated picture of frames, as SVG without a script. It begins again after its end, and shortens waits.

    Where nothing moves, because the reader has asked for that, it shows the frame in the middle.

    Args:
        frames: The frames, in their order.
    """
    strip = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for frame in frames:
        lines = strip.render_lines(Text.from_ansi(frame.ansi, overflow="fold"), pad=False)[-HEIGHT:]
        strip.print(SegmentLines(lines, new_lines=True), end="")
        strip.print("\n" * (HEIGHT - len(lines)), end="")
    shown_s = list(accumulate((min(b.at_s - a.at_s, PAUSE_S) for a, b in pairwise(frames)), initial=0.0))
    seconds, inside = shown_s[-1] + LAST_S, HEIGHT * ROW
    keyframes = " ".join(
        f"{begin / seconds:.2%} {{{{ transform: translateY({-number * inside:.1f}px) }}}}"
        for number, begin in enumerate(shown_s)
    )
    code = FILM.format(
        height=f"{inside + 51:.1f}",
        window=f"{inside + 49:.1f}",
        inside=f"{inside:.1f}",
        seconds=seconds,
        keyframes=keyframes,
        still=f"{-(len(frames) // 2) * inside:.1f}",
    )
    return UNSEEN.sub("", strip.export_svg(title="fl-adapters", unique_id="screen", code_format=code))


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
    options = f"--sites {','.join(SITES)} --rounds {ROUNDS} --every {STEPS}"
    command = f"fl-adapters simulate {SCRIPT.name} {options} -- {' '.join(ARGS)}"
    camera = Camera(command)
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        job = Job(
            app=str(SCRIPT),
            name="digits",
            rounds=ROUNDS,
            every=STEPS,
            best_metric="accuracy",
            best_mode="max",
        )
        environment = Simulation(sites=SITES, args=ARGS, listeners=[camera], quiet=True)
        result = job.run(environment)
        camera.end(result)
        (HERE / "terminal.svg").write_text(film(camera.frames), encoding="utf-8")
        photograph((result.folder / "report.html").as_uri(), HERE / "report.png", width=1100, height=1000)
        with dashboard(result.folder.parent) as address:
            page = address.replace("/?", f"/runs/run/{result.job}?")
            photograph(page, HERE / "dashboard.png", width=1100, height=900)
    for picture in sorted(HERE.glob("*.*g")):
        print(f"{picture.name}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
