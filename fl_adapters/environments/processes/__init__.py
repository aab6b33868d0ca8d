"""Processes of the sites on this machine: starting, watching and ending them, and the resources that they share."""

from fl_adapters.environments.processes.site_processes import (
    SiteProcess,
    SiteProcesses,
    available_cores,
    common_environment,
    describe_status,
    free_ports,
    site_environment,
    thread_settings,
)

__all__ = [
    "SiteProcess",
    "SiteProcesses",
    "available_cores",
    "common_environment",
    "describe_status",
    "free_ports",
    "site_environment",
    "thread_settings",
]
