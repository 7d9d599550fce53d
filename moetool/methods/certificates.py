"""What several certificates in a row certify."""

from __future__ import annotations

from collections.abc import Sequence

from moetool.methods.contract import Certificate

LEVELS = ("exact", "exact_if", "expectation", "none")  # the strongest first


def weakest(certificates: Sequence[Certificate]) -> Certificate:
    """What holds of several steps in a row."""
    if len(certificates) == 1:
        return certificates[0]
    found = max(certificates, key=lambda c: LEVELS.index(c.level))
    return Certificate(found.level, "; then ".join(c.why for c in certificates), None)
