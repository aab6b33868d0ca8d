"""Reports of runs: one HTML file for a run, or for several side by side, from the files that a run leaves."""

from fl_adapters.environments.report.files import REPORT, write_comparison, write_report

__all__ = ["REPORT", "write_comparison", "write_report"]
