"""llm-compressor's REAP on the same token ids, in a virtual environment of its own: `PYTHON
peer_llmcompressor.py MODEL TOKENS.jsonl RATIO OUT`.

Prints one JSON object: {"cpu": seconds of calibration and pruning, "wall": ..., "kept": {layer:
[experts]}}. Loading and saving are not counted.
"""

import json
import os
import re
import sys
import time
import warnings

warnings.simplefilter("ignore")
os.environ["TQDM_DISABLE"] = "1"
import torch  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main(model_path: str, tokens: str, ratio: float, out: str) -> None:
    rows = [json.loads(line)["input_ids"] for line in open(tokens)]
    # llm-compressor 0.14.0.1 traces the model without a causal mask when none is given: the router
    # counts of its first layer are those of attention
    # that sees the future. A mask of four dimensions is taken as it is.

    def causal(n: int) -> torch.Tensor:
        return torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]

    data = DataLoader(
        rows,
        batch_size=1,
        shuffle=False,
        collate_fn=lambda r: {"input_ids": torch.tensor(r), "attention_mask": causal(len(r[0]))},
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(model_path)
    report = out + "-kept.json"
    wall, cpu = time.perf_counter(), time.process_time()
    oneshot(
        model=model,
        processor=words,
        dataset=data,
        recipe=REAPPruningModifier(sparsity=ratio, report_path=report),
        max_seq_length=max(map(len, rows)),
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
        moe_calibrate_all_experts=False,  # what its own message advises for REAP
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    model.save_pretrained(out)
    words.save_pretrained(out)
    kept = json.load(open(report))
    kept = kept.get("retained_experts", kept)
    print(
        json.dumps(
            {
                "cpu": cpu,
                "wall": wall,
                "kept": {re.search(r"layers\.(\d+)", k)[1]: v for k, v in kept.items()},
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
