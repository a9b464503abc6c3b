"""The audit trail (PS3.15 A.5): lines of the ledger, and messages to a collector by syslog over TLS."""

from __future__ import annotations

from dicom_node.audit.messages import Transfers, Visit
from dicom_node.audit.trail import Audit

__all__ = ["Audit", "Transfers", "Visit"]
