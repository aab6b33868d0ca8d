"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from fl_runtime.transport.tls_setting import only_tls_1_3

only_tls_1_3()  # as `fl-adapters server` does; gRPC reads it once, and some imports make it start
os.environ.setdefault("KERAS_BACKEND", "torch")  # Keras takes one for the whole process, when first imported

with suppress(ImportError):  # loaded after MONAI or Lightning in the same process, it crashes when it makes a key
    import tenseal  # noqa: F401

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background job, which what it starts would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: a slow one at the end would run alone while the other cores wait."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets: $FL_ADAPTERS_DATA, else ../shared/data beside the project. Skips if there is none."""
    folder = Path(os.environ.get("FL_ADAPTERS_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; name their folder in FL_ADAPTERS_DATA")
    return folder
