"""The audit log: a signed record of what was done and what was refused, of the server and of each site."""

from fl_runtime.trust.audit.lines import LineMark
from fl_runtime.trust.audit.log import AuditLog, rule_of
from fl_runtime.trust.audit.recent import AuditLines, lines_after, lines_before
from fl_runtime.trust.audit.verification import Anchor, Finding, entries, log_file, signer, verify
from fl_runtime.trust.audit.witness import Witness

__all__ = [
    "Anchor",
    "AuditLines",
    "AuditLog",
    "Finding",
    "LineMark",
    "Witness",
    "entries",
    "lines_after",
    "lines_before",
    "log_file",
    "rule_of",
    "signer",
    "verify",
]
