"""Which client computes which output rightly, as data (archs/clients.json): what was run, or read
in its source. Whoever writes asks before any work.
"""

from moetool.surgery.clients.cells import KNOWN, STATES, Verdict
from moetool.surgery.clients.data import FILE, Client, client, clients, read
from moetool.surgery.clients.formats import Assigned
from moetool.surgery.clients.judge import (
    Judged,
    Refusal,
    evidence,
    judged,
    model,
    refusals,
    verdict,
)
from moetool.surgery.clients.traits import Traits, traits

__all__ = [
    "FILE",
    "KNOWN",
    "STATES",
    "Assigned",
    "Client",
    "Judged",
    "Refusal",
    "Traits",
    "Verdict",
    "client",
    "clients",
    "evidence",
    "judged",
    "model",
    "read",
    "refusals",
    "traits",
    "verdict",
]
