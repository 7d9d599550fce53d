"""What prune and merge say on the screen."""

from __future__ import annotations

from moetool.forward import drawn
from moetool.methods.contract import Line
from moetool.methods.reduce.facts import TEXT, Found, Reduced, TextSeen
from moetool.units import show_bytes, show_count

# what stands in for text, by its name (forward/drawn.py)
DRAWN = {drawn.RANDOM: "random token ids", drawn.OWN: "tokens that the model wrote itself"}
NARROW = 2.0  # times as much of the error is left of the rest as of the text
SHOWN = 6  # super experts that are named


def lines(reduced: Reduced, own: list[Line]) -> list[Line]:
    """What was decided; `own` are the way's own lines."""
    found = reduced.found
    return [
        Line(reduced.decided.verb, removal(reduced)),
        *own,
        *(_text(found.data) if found.data else []),
        *(_protected(found) if found.protected else []),
        *refitted(found),
        *_cost(found),
        Line("parameters", _sizes(reduced)),
    ]


def removal(reduced: Reduced) -> str:
    """`8 -> 6 experts a layer (25 % removed), reap, 4 layers of mixtral`."""
    share = f"{counted(reduced)} ({100 * reduced.removed_share:.0f} % removed)"
    layers = f"{len(reduced.layers)} layers of {reduced.model_type}"
    return f"{share}, {reduced.decided.method}, {layers}"


def counted(reduced: Reduced) -> str:
    """`8 -> 6 experts a layer`, or a range."""
    after = reduced.experts_after
    shown = str(after) if isinstance(after, int) else f"{min(after)} to {max(after)}"
    return f"{reduced.experts_before} -> {shown} experts a layer"


def _text(data: TextSeen) -> list[Line]:
    names = ", ".join(f["name"] for f in data.files)
    for kind, what in DRAWN.items():
        if data.share(kind) == 1:
            told = f"none was given: {data.tokens:,} {what} in sequences of {data.seq_len}"
            return [Line("text", f"{told}; --calibrate FILE is better")]
    return [Line("text", f"{data.tokens:,} tokens in sequences of {data.seq_len}: {names}")]


def calibrated(found: Found) -> list[str]:
    """What a reader of the model card must know of the text: that there was none, or how much of it
    was no text.
    """
    said = []
    for kind, what in DRAWN.items():
        share = found.data.share(kind) if found.data else 0.0
        if share == 1:
            said.append(f"calibrated on {what}: no text was given")
        elif share:
            said.append(f"{share:.0%} of the calibration tokens are no text: {what}")
    return said


def _protected(found: Found) -> list[Line]:
    stay = found.protected or {}
    shown = [p for p in found.peaks if p.expert in stay.get(p.layer, ())][:SHOWN]
    said = [f"{p.expert} of layer {p.layer} ({p.times:.3g} times the others)" for p in shown]
    more = sum(map(len, stay.values())) - len(shown)
    rest = f" and {more} more" if more else ""
    return [Line("protected", f"super experts {', '.join(said)}{rest}")]


def refitted(found: Found) -> list[Line]:
    """Whether down_proj was solved again, how well, and on how much."""
    if not found.refit:
        why = found.unsolved
        return [Line("refit", f"no: {why}")] if why else []
    layer = max(found.refit, key=lambda n: found.refit[n].after)
    before, after = found.refit[layer].before, found.refit[layer].after
    solved = f"down_proj of the experts that stay was solved again on {found.refit_tokens:,} tokens"
    error = f"squared error of a layer's output: {before:.1%} -> {after:.1%} in the worst"
    said = [Line("refit", solved + _drawn(found)), Line("", f"{error} (layer {layer})")]
    names = {TEXT: "text", **DRAWN}
    for kind, (was, now) in found.left_out.items():
        shown = f"{was:.1%} -> {now:.1%} on {names[kind]} that it was not solved on"
        said.append(Line("", f"{shown} (mean of all layers)"))
    few = sum(one.few for one in found.refit.values())
    if few:
        told = f"{few} experts saw fewer tokens than they have neurons, and were changed little"
        said.append(Line("", f"{told}: more text or --refit-tokens changes them more"))
    return said


def _cost(found: Found) -> list[Line]:
    """What a refit took, to whoever may want it cheaper."""
    if not found.refit_work:
        return []
    work = f"about {found.refit_work:.2g} times the work of the walk that decided"
    return [Line("", f"{work}; fewer --refit-tokens or --no-refit take less")]


def _drawn(found: Found) -> str:
    """`, 40 % of them tokens that the model wrote itself (--own-share)`."""
    for kind, what in DRAWN.items():
        count = sum(f["tokens"] for f in found.refit_files if f.get("drawn") == kind)
        share = count / max(1, found.refit_tokens)
        if share:
            by = " (--own-share)" if share < 1 else ""
            return f", {'all' if share == 1 else f'{share:.0%}'} of them {what}{by}"
    return ""


def narrow(found: Found) -> list[str]:
    """A warning where a refit brought what the text shows far nearer than everything else."""
    apart = found.left_out
    was, now = apart.pop(TEXT, (0.0, 0.0))
    for kind, (before, after) in apart.items():
        if after * was > NARROW * now * before:
            return [
                f"the text is narrow: the refit lowers the error on text like it ({was:.1%} -> "
                f"{now:.1%}), and much less on {DRAWN[kind]} ({before:.1%} -> {after:.1%}), so "
                "what the text does not show gets worse; give text of more kinds, or a larger "
                "--own-share"
            ]
    return []


def _sizes(reduced: Reduced) -> str:
    sizes = reduced.sizes
    count = f"{show_count(sizes.parameters)}, {show_count(sizes.active_parameters)} active"
    before, after = show_bytes(sizes.expert_bytes_before), show_bytes(sizes.expert_bytes_after)
    return f"{count}; experts {before} -> {after}"


def notes(reduced: Reduced) -> list[Line]:
    """What a user must know of the output's form, and where decisions were left."""
    return [*_FORMS.get(reduced.counts, []), *_decisions(reduced.found)]


_FORMS = {
    "ghost": [
        Line(
            "note",
            "layers keep different numbers of experts: where some are missing, empty ones stand that a selection bias keeps out, so that every client of the family loads it",
        )
    ],
    "zeroed": [
        Line(
            "note",
            "experts that went put out zero and still lie in the files: nothing is smaller (--uneven ragged or ghost is)",
        )
    ],
    "ragged": [
        Line(
            "note",
            "layers hold different numbers of experts (per_layer_config): transformers loads it with moetool installed (import moetool); vLLM, llama.cpp and mlx-lm refuse it (--uneven says what else there is)",
        )
    ],
    "factored": [
        Line("note", "moetool's own form: stock loaders refuse it; moetool eval reads it")
    ],
}


def _decisions(found: Found) -> list[Line]:
    if not found.decisions_written:
        return []
    told = f"written to {found.decisions_written}: edit them, and replay with --decisions"
    return [Line("decisions", told)]
