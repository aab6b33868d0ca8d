"""The browser of all tests of the dashboard that need one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from dashboards import browser


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    """A headless Chromium, started once. It ends with this folder's tests: until then, an event loop is running."""
    with browser() as chromium:
        yield chromium
