"""report.json of prune and merge: a record that CI can gate on and people can diff. Schema 1; keys
are only ever added.

schema, moetool, verb, method       what ran, with which version
options, seed                       everything it was told
experts_before, experts_after, removed_share, top_k, counts
layers: {"3": {map: [new expert or null of each old one], groups, weights, scores, protected,
tokens}}
                                    tokens: how many each old expert saw
protected: {"3": [7]}               super experts that were kept
data: {tokens, files, data_sha256, seq_len}, refit: {"3": {error_before, error_after}}
input_bytes, output_bytes, expert_bytes_before, expert_bytes_after
quality: {files: [{file, tokens, perplexity, reference_perplexity, kl, top1_agreement, flips}], kl,
perplexity, ...}
peak_memory (promised), peak_rss (measured), seconds, stages: {decide, write, measure} in seconds,
warnings
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from moetool.methods.reduce.decided import Decided
from moetool.report.provenance import version_of

SCHEMA = 1
_TAKEN = (
    "options",
    "seed",
    "experts_before",
    "experts_after",
    "removed_share",
    "top_k",
    "counts",
    "protected",
    "data",
    "refit",
    "router",
    "input_bytes",
    "output_bytes",
    "expert_bytes_before",
    "expert_bytes_after",
    "quality",
    "peak_memory",
    "peak_rss",
    "seconds",
    "stages",
    "warnings",
)


def render(report: dict[str, Any]) -> bytes:
    """report.json as bytes."""
    decided = Decided.from_json(report["decisions"])
    seen = report.get("tokens_per_expert", {})
    layers = {
        str(n): {
            "map": layer.map(decided.experts),
            **({"tokens": seen[str(n)]} if str(n) in seen else {}),
            **{k: v for k, v in layer.as_json().items() if k not in ("keep", "orders")},
        }
        for n, layer in sorted(decided.layers.items())
    }
    data = {
        "schema": SCHEMA,
        "moetool": version_of("moetool"),
        "verb": report["reduction"],
        "method": report["method_used"],
    }
    data |= {k: report[k] for k in _TAKEN if k in report}
    return (json.dumps(data | {"layers": layers}, indent=1, ensure_ascii=False) + "\n").encode()


def peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
