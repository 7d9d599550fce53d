"""The seam between plans and kernels: operation name -> how its bytes are made, what it needs,
what it costs.

`copy` and `zeros` move bytes and import nothing. `draw` uses numpy. All others run torch kernels;
at planning each kind of task runs once on the meta device, so that a wrong shape fails before any
work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

from moetool.data import JsonMapping, JsonObject
from moetool.errors import MoetoolError
from moetool.surgery import changes, forms
from moetool.surgery.call import Call, Tables
from moetool.surgery.spec import Piece, Task, size_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = Tensor | np.ndarray

# Resident memory of the bare process, measured on CPython 3.11 (tests/every/test_memory.py), and of
# numpy and torch on top.
RESERVE = 40_000_000
NUMPY_RESERVE = 24_000_000
TORCH_RESERVE = 360_000_000
COPY_BUFFER = (
    1 << 19
)  # larger single writes are much slower on ext4 (8 MiB: five times, measured on 6.18)


@dataclass(frozen=True)
class Op:
    """One operation. `factor`: peak bytes per byte of input and widest output, measured; see
    tests/every/test_memory.py.
    """

    name: str
    run: Callable[[Call], Iterator[Array]] | None  # output tensors, in order
    needs: str = "torch"  # "nothing" | "numpy" | "torch"
    factor: float = 0.0
    reads: float = 1.0  # how often the input bytes are held


def _draw(call: Call) -> Iterator[np.ndarray]:
    from moetool.kernels import draw

    yield from (draw.matrix(shape, **call.params) for shape in call.shapes)


def _neurons(call: Call) -> Iterator[Tensor]:
    yield from _cut(call, call.inputs[0], call.params)


def _slabs(call: Call) -> Iterator[Tensor]:
    """What `neurons` makes of each input, beside each other in one matrix [in, out]."""
    import torch

    cut = [_cut(call, m, own) for m, own in zip(call.inputs, call.params["each"], strict=True)]
    yield from (torch.cat(matrices).T.contiguous() for matrices in zip(*cut, strict=True))


def _cut(call: Call, matrix: Tensor, own: JsonMapping) -> Iterator[Tensor]:
    """One matrix for each result. `own`: what makes copies of this one differ."""
    from moetool.kernels import carve

    order = call.tables[call.params["order"]] if call.params.get("order") else None
    share = carve.Share(
        call.params["axis"], call.params.get("parts", 1), order, call.params.get("first", 0)
    )
    redraw = own.get("redraw") or {}
    change = carve.Variation(
        own.get("permute"),
        (own.get("noise") or {}).get("sigma"),
        redraw.get("ratio"),
        redraw.get("same"),
        own.get("seed", 0),
        own.get("name", ""),
        (own.get("mask") or {}).get("share"),
    )
    yield from carve.experts(matrix, len(call.shapes), share, change, call.params.get("scale", 1.0))


def _unit_rows(call: Call) -> Iterator[Tensor]:
    """The rows that a table lists, each over its length."""
    import torch

    from moetool.kernels import fires

    matrix = call.inputs[0]
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    yield fires.unit_rows(matrix[call.tables[call.params["order"]]].to(wide)).to(matrix.dtype)


def _combine(call: Call) -> Iterator[Tensor]:
    from moetool.kernels import combine

    yield combine.weighted(call.inputs, call.params["weights"])


def _affine(call: Call) -> Iterator[Tensor]:
    from moetool.kernels import combine

    yield combine.affine(
        call.inputs[0], call.params.get("scale", 1.0), call.params.get("shift", 0.0)
    )


def _affine_sum(call: Call) -> Iterator[Tensor]:
    from moetool.kernels import combine

    yield combine.affine(
        combine.weighted(call.inputs, call.params["weights"]), 1.0, call.params["shift"]
    )


def _transpose(call: Call) -> Iterator[Tensor]:
    yield call.inputs[0].transpose(-1, -2).contiguous()


def _columns(call: Call) -> Iterator[Tensor]:
    """Matrices with as many rows, side by side, each times its factor where such are given."""
    import torch

    from moetool.kernels import combine

    each = list(call.inputs)
    if scales := call.params.get("scales"):
        each = [combine.affine(m, s, 0.0) for m, s in zip(each, scales, strict=True)]
    yield torch.cat(each, -1)


def _turn(call: Call) -> Iterator[Tensor]:
    """The same values in the order in which llama.cpp has them."""
    from moetool.kernels import turn

    yield turn.turned(call.inputs[0], call.params["turn"])


def _listed(call: Call) -> Iterator[np.ndarray]:
    """Numbers that the plan itself holds."""
    import numpy as np

    yield np.array(call.params["values"], np.float32)


def _reform(call: Call) -> Iterator[Tensor]:
    """Nothing but another form: what is decoded before and encoded behind every operation."""
    yield from call.inputs


def _repeat(call: Call) -> Iterator[Tensor]:
    """One matrix for all outputs; what encodes them does it once."""
    yield from (call.inputs[0] for _ in call.shapes)


def _fill(call: Call) -> Iterator[np.ndarray]:
    import numpy as np

    yield from (np.full(shape, call.params["value"], np.float32) for shape in call.shapes)


def _reindex(call: Call) -> Iterator[Tensor]:
    from moetool.kernels import combine

    yield combine.reindex(call.inputs[0], call.tables[call.params["order"]], call.params["experts"])


def _members(call: Call, roles: list[str]) -> list[dict[str, Tensor]]:
    """Members of a cluster in canonical form, neurons aligned. Inputs: all roles of the first, all
    roles of the second, ...
    """
    from moetool.kernels import form, merge

    members = []
    for number, key in enumerate(call.params.get("align") or [None] * call.params["members"]):
        parts = dict(
            zip(roles, call.inputs[number * len(roles) : (number + 1) * len(roles)], strict=True)
        )
        members.append(
            merge.permuted(
                form.canonical(parts, **call.params["form"]), call.tables[key] if key else None
            )
        )
    return members


def _merge(call: Call) -> Iterator[Tensor]:
    from moetool.kernels import form, merge

    roles = call.params["roles"].split(",")
    members = _members(call, roles)
    rest = call.inputs[call.params["members"] * len(roles) :]
    made = merge.combined(
        members, call.params["weights"], call.params, *((rest[:1], rest[1:]) if rest else ())
    )
    yield from form.stored(made, call.params["made"].split(","), **call.params["form"])


def _base_delta(call: Call) -> Iterator[Tensor]:
    from moetool.kernels import merge

    count, turn = call.params["members"], call.params.get("transposed", False)
    matrices, covariance = [m.T if turn else m for m in call.inputs[:count]], call.inputs[count:]
    base = merge.sum_of(matrices, call.params["weights"])
    if call.params.get("factored"):
        yield base
    for number, matrix in enumerate(matrices):
        u, v = merge.low_rank(
            matrix.to(base.dtype) - base,
            call.params["rank"],
            covariance[number if len(covariance) > 1 else 0] if covariance else None,
        )
        if call.params.get("factored"):
            yield from (u, v)
        else:
            yield (base + u @ v).T if turn else base + u @ v


def _wanda(call: Call) -> Iterator[Tensor]:
    from moetool.kernels import form, merge

    roles = call.params["roles"].split(",")
    parts = form.canonical(dict(zip(roles, call.inputs, strict=False)), **call.params["form"])
    seen, between = call.inputs[len(roles) :]
    parts |= {
        "gate_up": merge.wanda(parts["gate_up"], seen.reshape(-1), call.params["share"]),
        "down": merge.wanda(parts["down"], between.reshape(-1), call.params["share"]),
    }
    yield from form.stored(parts, roles, **call.params["form"])


OPS = {
    op.name: op
    for op in (
        Op("copy", None, "nothing"),
        Op("zeros", None, "nothing"),
        Op("draw", _draw, "numpy", 12.0),
        Op("neurons", _neurons, "torch", 6.0, reads=2.0),
        Op("slabs", _slabs, "torch", 8.0, reads=2.0),
        Op("unit_rows", _unit_rows, "torch", 12.0),
        Op("combine", _combine, "torch", 4.0),
        Op("affine", _affine, "torch", 4.0),
        Op("affine_sum", _affine_sum, "torch", 4.0),
        Op("transpose", _transpose, "torch", 2.0),
        Op("columns", _columns, "torch", 4.0),
        Op("reform", _reform, "torch", 4.0, reads=2.0),
        Op("repeat", _repeat, "torch", 4.0, reads=2.0),
        Op("turn", _turn, "torch", 4.0, reads=2.0),
        Op("listed", _listed, "numpy", 4.0),
        Op("fill", _fill, "numpy", 4.0),
        Op("reindex", _reindex, "torch", 4.0, reads=3.0),
        Op("merge", _merge, "torch", 24.0, reads=6.0),
        Op("base_delta", _base_delta, "torch", 24.0, reads=6.0),
        Op("change", changes.low_rank, "torch", 24.0, reads=6.0),
        Op("low_rank_sum", changes.added, "torch", 12.0, reads=3.0),
        Op("domain_rows", changes.domain_rows, "torch", 8.0, reads=2.0),
        Op("sparse_change", changes.sparse, "torch", 24.0, reads=6.0),
        Op("sparse_places", changes.places, "torch", 4.0),
        Op("coded_change", changes.coded, "torch", 24.0, reads=6.0),
        Op("wanda", _wanda, "torch", 24.0, reads=6.0),
    )
}


def tables_of(task: Task) -> list[str]:
    """Names of the tables that a task looks up."""
    return [k for k in (task.params.get("order"), *(task.params.get("align") or ())) if k]


def needs(tasks: Sequence[Task]) -> str:
    """What the heaviest task imports: "nothing", "numpy" or "torch"."""
    wanted = {OPS[t.op].needs for t in tasks}
    return next((n for n in ("torch", "numpy") if n in wanted), "nothing")


def task_memory(task: Task, dtypes: Mapping[str, str], source_bytes: Callable[[Piece], int]) -> int:
    """Peak bytes that a task holds, beyond the process itself."""
    op = OPS[task.op]
    if op.run is None:
        return COPY_BUFFER
    read = sum(source_bytes(p) for p in task.inputs) + _decoded_bytes(task.params.get("decode"))
    made = [size_of(dtypes[o.name], o.shape) for o in task.outputs]
    if "encode" in task.params:  # what is encoded is first there in float32
        made += [4 * prod(shape) for shape in _shapes(task)]
    return int(op.reads * read + op.factor * max(made, default=0))


def run_task(
    task: Task, inputs: Sequence[Tensor], dtypes: Mapping[str, str], tables: Tables
) -> Iterator[tuple[Piece, Array]]:
    """Yield (output piece, bytes) for a computed task. `inputs` are torch tensors (or nothing, for
    draw).
    """
    op = OPS[task.op]
    assert op.run is not None
    params = {k: v for k, v in task.params.items() if k not in ("decode", "encode")}
    whole = forms.decoded(inputs, task.params.get("decode"))
    results = op.run(Call(whole, _shapes(task), params, tables))
    results = forms.encoded(results, task.params.get("encode"), [o.shape for o in task.outputs])
    for piece, value in zip(task.outputs, _converging(results, task), strict=True):
        if tuple(value.shape) != piece.shape:
            raise MoetoolError(
                "an operation made a wrong shape",
                tensor=piece.name,
                expected=list(piece.shape),
                found=list(value.shape),
                hint="report this as a bug of moetool",
            )
        yield piece, value


def _converging(results: Iterable[Array], task: Task) -> Iterator[Array]:
    """The results; where an algorithm finds none (a matrix holds NaN), a MoetoolError that names
    the output.
    """
    try:
        yield from results
    except MoetoolError as problem:
        problem.where.setdefault("tensor", task.outputs[0].name)
        raise
    except (ArithmeticError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "LinAlgError" not in type(problem).__name__:
            raise  # torch's own name is not asked for here: `draw` and `fill` run without torch
        raise MoetoolError(
            f"a tensor cannot be computed: {str(problem).partition(chr(10))[0][:120]}",
            tensor=task.outputs[0].name,
            expected="finite weights",
            hint="a weight is NaN or inf, or too large: --strict names the tensor",
        ) from None


def _shapes(task: Task) -> list[tuple[int, ...]]:
    """Shapes of an operation's results, before they are encoded."""
    if "encode" not in task.params:
        return [o.shape for o in task.outputs]
    outs, shapes = iter(task.outputs), []
    for entry in task.params["encode"]:
        pieces = list(islice(outs, entry["parts"] if entry else 1))
        shapes.append(tuple(entry["shape"]) if entry else pieces[0].shape)
    return shapes


def _decoded_bytes(how: Sequence[JsonObject | None] | None) -> int:
    """What decoded inputs hold beside the bytes that were read: whole matrices in float32."""
    return sum(4 * prod(e["of"] if "of" in e else e["shape"]) for e in how or () if e)


def rehearse(tasks: Sequence[Task], dtype_of: Callable[[Piece], str], tables: Tables) -> int:
    """Run one task of each kind on the meta device; returns how many kinds. Raises MoetoolError on
    a shape that does not fit.
    """
    from moetool.kernels import codec

    seen: set[tuple[Any, ...]] = set()
    for task in tasks:
        if OPS[task.op].needs != "torch":
            continue
        kind = (
            task.op,
            tuple(p.shape for p in task.inputs),
            tuple(o.shape for o in task.outputs),
            tuple(sorted((k, type(v).__name__) for k, v in task.params.items())),
        )
        if kind in seen:
            continue
        seen.add(kind)
        inputs = [codec.meta(p.shape, dtype_of(p)) for p in task.inputs]
        for _ in run_task(task, inputs, {}, tables):
            pass
    return len(seen)
