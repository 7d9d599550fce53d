"""What MoTE's experts are without moetool: `python tests/bench/home.py MODEL`, a dense model.

Upcycles it to ternary experts, writes them in full and in 4 bits, and prints a table: bytes of each
output, the largest logit difference from moetool's own model relative to its largest logit (stock
transformers, float32, 2 x 64 random ids), and the KL at birth that `upcycle` reports.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

import moetool

EXPERTS, TOKENS = 2, 64


def logits(folder: Path) -> torch.Tensor:
    """Of fixed random ids, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    most, drawn = min(49_000, model.config.vocab_size), torch.Generator().manual_seed(0)
    ids = torch.randint(10, most, (2, TOKENS), generator=drawn)
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=ids).logits
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    source = parser.parse_args().model
    with tempfile.TemporaryDirectory() as made:
        own, native, small = (Path(made) / name for name in ("own", "native", "small"))
        said = {"experts": EXPERTS, "top_k": 1, "router": "normal:0.02"}
        born = moetool.upcycle(str(source), str(own), form="ternary", **said)
        full = moetool.materialize(str(own), str(native), target="qwen2_moe")
        packed = moetool.quantize(
            str(native), str(small), plan="experts=int4/channel", loader_check=False
        )
        wanted = logits(own)
        print(f"KL at birth {born['quality']['kl']:.4f} on {born['quality']['tokens']} predictions")
        print("| output | bytes | logits |\n|---|---|---|")
        rows = (("the source", source, 0), ("moetool", own, born["output_bytes"]))
        rows += (("qwen2_moe", native, full["output_bytes"]),)
        rows += (("qwen2_moe, experts int4", small, packed["output_bytes"]),)
        for name, folder, size in rows:
            apart = (logits(folder) - wanted).abs().max() / wanted.abs().max()
            print(f"| {name} | {size or ''} | {float(apart):.2g} |")


if __name__ == "__main__":
    main()
