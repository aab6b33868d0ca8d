"""Installs the peers into virtual environments of their own, once, and keeps them in a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
PEERS = {
    "flower": ("flwr[simulation]==1.41.0", TORCH),
    "nvflare": ("nvflare==2.9.0", TORCH),
}


def python_of(peer: str, cache: Path) -> Path:
    """Interpreter of a peer's environment. Makes the environment if it is missing or has other versions."""
    folder = cache / peer
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(PEERS[peer])
    if not done.exists() or done.read_text() != wanted:
        print(f"installing {', '.join(PEERS[peer])} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True)
        done.write_text(wanted)
    return python.absolute()
