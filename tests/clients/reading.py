"""Reads quantized checkpoints as a stock loader does, and says what became of each: run with the
python of a loader's environment, or imported. Needs torch and transformers (4 or 5) alone.

    python reading.py JOBS.json ANSWERS.json       JOBS: [[checkpoint, the same dequantized], ...]

Values decide, never the loading info: every parameter of the loaded model is compared with the
parameter of the dequantized checkpoint that the same class loads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def logits(model: Any) -> Any:
    """Of two fixed sequences, in float32."""
    import torch

    ids = torch.randint(10, 150, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def values(model: Any, classes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every parameter and buffer (of modules of these classes alone, where some are named) as
    numbers; what bitsandbytes keeps packed is unpacked.
    """
    found = {}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        value = value.detach()
        module = model.get_submodule(name.rpartition(".")[0])
        kind = type(module).__name__
        if classes and kind not in classes:
            continue
        if kind in BITSANDBYTES:
            value = _unpacked(module, name.rpartition(".")[2], value)
        elif kind == "AutoBitLinear" and name.endswith(".weight"):
            value = value.float() * module.weight_scale.float()
        if value is not None:
            found[name] = value
    return found


def _unpacked(module: Any, part: str, value: Any) -> Any:
    from bitsandbytes import functional

    if part == "bias":
        return value
    if part != "weight":
        return None
    if type(module).__name__ == "Linear4bit":
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    held = module.state if module.state.CB is not None else module.weight
    return held.CB.float() * held.SCB[:, None] / 127


def linears(model: Any, plain: Any) -> float:
    """The largest error of what a linear puts out, by the largest of it: where inputs are rounded
    too, logits of small random models tell nothing.
    """
    import torch

    worst, draw = 0.0, torch.Generator().manual_seed(2)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            x = torch.randn(1, 4, module.in_features, generator=draw).to(module.weight.dtype)
            with torch.no_grad():
                expected, got = module(x).float(), model.get_submodule(name)(x).float()
            worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
    return worst


def compare(folder: str, back: str) -> dict[str, Any]:
    """`state`: equal, differs, or raises; `worst`: the largest error of a parameter by the largest
    value of it; `logits`: of the logits likewise; `linears`: of what linears put out; `packed`:
    parameters that are still packed.
    """
    import torch
    import transformers

    def load(path: str) -> Any:
        named = json.loads((Path(path) / "config.json").read_text())["architectures"][0]
        wrapped = named.endswith("ForConditionalGeneration")
        kind = transformers.AutoModelForImageTextToText if wrapped else None
        kind = kind or transformers.AutoModelForCausalLM
        return kind.from_pretrained(path, dtype=torch.bfloat16).eval()

    torch.compiler.set_stance("force_eager")  # bitnet's linears are compiled: minutes for nothing
    at = "load"
    try:
        model = load(folder)
        packed = sum(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
        still = values(model, BITSANDBYTES)  # it repacks them at the first forward
        at = "forward"
        got = logits(model)
    except Exception as problem:  # noqa: BLE001 - it is what we ask for
        return {"state": "raises", "at": at, "said": f"{type(problem).__name__}: {problem}"[:300]}
    plain = load(back)
    expected, found = values(plain), values(model) | still
    worst, where = 0.0, ""
    for name, value in expected.items():
        other = found.get(name)
        if other is None or other.shape != value.shape:
            return {"state": "differs", "worst": None, "where": name, "said": str(other)[:80]}
        other = other.to(value.dtype)
        if torch.equal(other, value):
            continue
        gap = (other.float() - value.float()).abs().max() / value.float().abs().max()
        if not gap <= worst:
            worst, where = float(gap), name
    reference = logits(plain)
    apart = float((got - reference).abs().max() / reference.abs().max())
    state = "differs" if where else "equal"
    made = {"state": state, "worst": worst, "where": where, "logits": apart}
    return made | {"linears": linears(model, plain), "packed": packed}


def main() -> int:
    jobs, answers = map(Path, sys.argv[1:])
    made = [compare(*job[:2]) for job in json.loads(jobs.read_text())]
    answers.write_text(json.dumps(made))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
