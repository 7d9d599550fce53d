"""What a layer's own number of experts is worth, on a testbed:

    python tests/bench/budgets.py TESTBED FOLDER [--refit]

Pruned by each --budget from one profile of the calibration text, as many experts in all, written
ragged; KL(SRC || OUT) on the held-out files.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import moetool
from moetool.methods.reduce.options import BUDGETS

SEQ, TOKENS, HELD = 256, 16_384, 12_288


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bed", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--refit", action="store_true", help="down_proj solved again")
    args = parser.parse_args()
    model, text = str(args.bed / "qwen3moe-16x4"), args.bed / "text"
    seen: dict[str, Any] = {"calibrate": [str(text / "calibration.jsonl")], "text_field": "text"}
    seen |= {"tokens": TOKENS, "seq_len": SEQ}
    stats = args.folder / "stats"
    if not stats.exists():
        moetool.profile(model, str(stats), **seen)
    looks = seen if args.refit else {"stats": str(stats)}
    held = [str(path) for path in sorted(text.glob("val.*.jsonl"))]
    for ratio, budget in product((0.25, 0.5), BUDGETS):
        out = str(args.folder / f"{budget}-{ratio}-{args.refit}")
        told = {"ratio": ratio, "budget": budget, "uneven": "ragged", "refit": args.refit}
        report = moetool.prune(model, out, method="reap", overwrite=True, **told, **looks)
        kept = {n: len(layer.get("keep", ())) for n, layer in report["decisions"]["layers"].items()}
        found = moetool.eval(
            out, reference=model, text=held, text_field="text", tokens=HELD, seq_len=512
        )
        print(f"| {ratio} | {budget} | {found['kl']:.4f} | {list(kept.values())} |", flush=True)


if __name__ == "__main__":
    main()
