"""How soon a change has to show where a page or a call promises it within a second."""

from __future__ import annotations

import os

PROMPT_S = 5.0 if "PYTEST_XDIST_WORKER" in os.environ else 1.0
"""The promise itself where a test runs alone; beside other tests the machine may be busy, so that this only tells a
change that is pushed from one that waits for the next question."""
