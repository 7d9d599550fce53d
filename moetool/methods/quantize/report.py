"""report.json of quantize: what CI can gate on and people can diff. Schema 1; keys are only added.

schema, method, rounding, loader    what ran, and who must read it
options, seed                       everything it was told
roles                               format, matrices, weights and stored bits of each role
experts_quantized, experts_total, experts_skipped (by name)
left                                matrices that stay as they are, with the reason
solved                              of a way that solves: its text, and experts with few tokens
fit: {plan, sensitivity, considered, ...}  of --target-size: what each role costs in each format,
                                    and the plans that were compared
proof: {matrices, roles, worst, ...}  relative errors as read back; `tensors` names each
quality                             with text: perplexity and KL against the source
clients: {"vllm": {state, why, known, version}}  works | refuses | wrong | untried: the model and
                                    its forms
output_bytes, peak_memory (promised), peak_rss, seconds, stages, warnings
"""

from __future__ import annotations

from moetool import strict_json
from moetool.methods.contract import Report

SCHEMA = 1
_TAKEN = (
    "method",
    "rounding",
    "loader",
    "options",
    "seed",
    "roles",
    "experts_quantized",
    "experts_total",
    "experts_skipped",
    "left",
    "solved",
    "fit",
    "quality",
    "clients",
    "output_bytes",
    "peak_memory",
    "peak_rss",
    "seconds",
    "stages",
    "warnings",
)


def render(report: Report) -> bytes:
    """The file's bytes."""
    said = report.as_json()
    data = {"schema": SCHEMA, **{k: said[k] for k in _TAKEN if k in said}}
    if report.proof:
        data["proof"] = report.proof.as_json() | {"tensors": report.proof.tensors()}
    return (strict_json.text(data, indent=1) + "\n").encode()
