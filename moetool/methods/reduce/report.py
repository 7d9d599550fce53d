"""report.json of prune and merge: a record that CI can gate on and people can diff. Schema 1; keys
are only ever added.

schema, moetool, verb, method       what ran, with which version
options, seed                       everything it was told
experts_before, experts_after, removed_share, top_k, counts
layers: {"3": {map: [new expert or null of each old one], groups, weights, scores, protected,
tokens}}
                                    tokens: how many each old expert saw
protected: {"3": [7]}               super experts that were kept
largest_outputs: [{layer, expert, output, times, super}]
                                    super experts, or the nearest to one; times the rest's largest
data: {tokens, files, data_sha256, seq_len}, refit: {"3": {error_before, error_after,
few}}, refit_tokens, refit_files, not_refit: why not; refit_work: estimated, times the walk's
clients: {"vllm": {state, why, known, version}}  works | refuses | wrong | untried
input_bytes, output_bytes, expert_bytes_before, expert_bytes_after
quality: {files: [{file, tokens, perplexity, reference_perplexity, kl, top1_agreement, flips}], kl,
perplexity, ...}
peak_memory (promised), peak_rss (measured), seconds, warnings
stages: {decide, write, measure} in seconds, before each what it consists of: write text, profile,
refit, propagate; eval
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from moetool import strict_json
from moetool.data import JsonObject
from moetool.methods.contract import Report
from moetool.methods.reduce.facts import Reduced

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
    "largest_outputs",
    "data",
    "refit",
    "refit_tokens",
    "refit_work",
    "refit_files",
    "not_refit",
    "router",
    "input_bytes",
    "clients",
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


def render(report: Report, reduced: Reduced) -> bytes:
    """The file's bytes."""
    said = report.as_json()
    data = {
        "schema": SCHEMA,
        "moetool": _version(),
        "verb": reduced.decided.verb,
        "method": reduced.decided.method,
        **{k: said[k] for k in _TAKEN if k in said},
        "layers": {str(n): _layer(reduced, n) for n in sorted(reduced.decided.layers)},
    }
    return (strict_json.text(data, indent=1) + "\n").encode()


def _layer(reduced: Reduced, number: int) -> JsonObject:
    decision, tokens = reduced.decided.layers[number], reduced.found.tokens_per_expert
    seen = {"tokens": tokens[number]} if number in tokens else {}
    more = {k: v for k, v in decision.as_json().items() if k not in ("keep", "orders")}
    return {"map": decision.map(reduced.decided.experts), **seen, **more}


def _version() -> str:
    try:
        return version("moetool")
    except PackageNotFoundError:
        return "unknown"
