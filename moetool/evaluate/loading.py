"""What transformers makes of a quantized copy and of the same copy decoded by us: every parameter
by value, and the logits. A process of its own, so that its memory is its own:

    python -m moetool.evaluate.loading PACKED PLAIN ANSWER.json

The answer is written after each step: who reads it knows how far it went.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetool.data import JsonObject

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

TOKENS = 24


def main(arguments: list[str]) -> int:
    """Compare; 0 whatever was found: the answer says it."""
    packed, plain, answer = map(Path, arguments)
    said: JsonObject = {}

    def tell(**more: object) -> None:
        said.update(more)
        answer.write_text(json.dumps(said))

    tell(step="plain")
    try:
        reference = _plain(plain)
        expected = logits(reference)
        tell(step="packed")
        model = _packed(packed)
        early = unpacked(model)
        tell(step="forward")
        found = logits(model)
        tell(step="compare", **compare(reference, model, early))
        tell(step="done", logits=apart(expected, found))
    except Exception as problem:  # noqa: BLE001 - whatever a library makes of it is the answer
        tell(problem=f"{type(problem).__name__}: {str(problem).strip()[:400]}")
    return 0


def _plain(folder: Path) -> Any:
    from moetool.forward import stock
    from moetool.surgery.checkpoint import read_json

    stock.library()
    raw = read_json(folder / "config.json", what="model config")
    with stock.quietly():
        return stock.model_class(raw).from_pretrained(folder, dtype="auto").eval()


def _packed(folder: Path) -> Any:
    import torch

    from moetool.forward import load, stock

    torch.compiler.set_stance("force_eager")  # linears of bitnet are compiled: minutes for nothing
    with stock.quietly():
        return load.load(folder).eval()


def logits(model: Any) -> Tensor:
    """Of fixed tokens, in float32. The first forward decompresses what a loader keeps packed."""
    import torch

    vocab = model.get_input_embeddings().num_embeddings
    some = torch.Generator().manual_seed(1)
    ids = torch.randint(min(10, vocab - 1), min(150, vocab), (1, TOKENS), generator=some)
    with torch.no_grad():
        made: Tensor = model(input_ids=ids).logits.float()
    return made


def apart(expected: Tensor, found: Tensor) -> float:
    """Relative difference of logits [1, tokens, vocabulary], of the middle token: rounding sends a
    few tokens to another expert, and says nothing by that.
    """
    norms = expected.norm(dim=-1).clamp_min(1e-30)
    return float(((found - expected).norm(dim=-1) / norms).median())


def unpacked(model: nn.Module) -> dict[str, Tensor]:
    """The weights of bitsandbytes' linears by name, which the first forward may lay out anew."""
    named = ((f"{name}.weight", m) for name, m in model.named_modules() if _is_theirs(m))
    return {name: _of_bitsandbytes(module) for name, module in named}


def _is_theirs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.nn") and hasattr(module, "weight")


def compare(reference: nn.Module, model: nn.Module, early: Mapping[str, Tensor]) -> JsonObject:
    """How many tensors of the reference's state were compared, and the one that is farthest off, by
    the Frobenius norm of the difference. `early`: what was read before the first forward.
    """
    worst, where, count = 0.0, "", 0
    for name, expected in reference.state_dict().items():
        if not expected.is_floating_point():
            continue
        count += 1
        apart = _apart(expected, early[name] if name in early else _value(model, name))
        if not apart <= worst:
            worst, where = apart, name
    return {"parameters": count, "worst": worst, "where": where}


def _apart(expected: Tensor, found: Tensor | None) -> float:
    if found is None or found.shape != expected.shape:
        return float("inf")
    wanted = expected.float()
    error, norm = (found.float() - wanted).norm(), wanted.norm()
    return float(error / norm) if norm > 0 else float(error)


def _value(model: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer as numbers, whatever keeps it packed; None where there is none."""
    head, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(head)
        found = getattr(module, leaf)
    except AttributeError:
        return None
    if hasattr(found, "form"):  # experts that are decoded when they are asked for
        import torch

        return torch.stack([found[expert] for expert in range(found.shape[0])])
    scale = getattr(module, "weight_scale", None)
    if leaf == "weight" and scale is not None and type(module).__name__ == "AutoBitLinear":
        found = found.float() * scale.float()
    value: Tensor = found
    return value


def _of_bitsandbytes(module: Any) -> Tensor:
    from bitsandbytes import functional

    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        made: Tensor = functional.dequantize_4bit(module.weight.data, state)
        return made
    held = module.state if module.state.CB is not None else module.weight
    decoded: Tensor = held.CB.float() * held.SCB[:, None] / 127
    return decoded


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
