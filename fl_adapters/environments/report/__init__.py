"""Reports of runs: one HTML file for a run, or for several side by side, from the files that a run leaves."""

from fl_adapters.environments.report.files import REPORT, write_comparison, write_report
from fl_adapters.environments.report.record import EVENTS

__all__ = ["EVENTS", "REPORT", "write_comparison", "write_report"]
