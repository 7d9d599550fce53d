"""llm-compressor's rounding on the same token ids, in a virtual environment of its own: `PYTHON
peer_llmcompressor_quantize.py MODEL TOKENS.jsonl rtn|gptq OUT EXPERTS [ATTN]`, formats as int4/128;
ATTN where attention has another one.

Prints one JSON object: {"cpu": seconds of calibration and rounding, "peak": bytes}. Loading and
saving are not counted.
"""

import json
import os
import resource
import sys
import time
import warnings

warnings.simplefilter("ignore")
os.environ["TQDM_DISABLE"] = "1"
import torch  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

IGNORE = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]


def scheme(spelled: str, targets: list[str]) -> dict:
    word, _, group = spelled.partition("/")
    return {
        "targets": targets,
        "weights": {
            "num_bits": int(word.removeprefix("int")),
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": int(group),
        },
    }


def causal(n: int) -> torch.Tensor:
    """llm-compressor 0.14.0.1 traces the model without a causal mask when none is given; a mask of
    four dimensions is taken as it is.
    """
    return torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]


def main(model_path: str, tokens: str, how: str, out: str, *formats: str) -> None:
    torch.set_num_threads(1)
    rows = [json.loads(line)["input_ids"] for line in open(tokens)]
    data = DataLoader(
        rows,
        batch_size=1,
        shuffle=False,
        collate_fn=lambda r: {"input_ids": torch.tensor(r), "attention_mask": causal(len(r[0]))},
    )
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(model_path)
    experts, *attn = formats
    groups = {"group_0": scheme(experts, ["re:.*mlp.*proj$"] if attn else ["Linear"])}
    if attn:
        groups["group_1"] = scheme(attn[0], ["re:.*self_attn.*proj$"])
    kind = GPTQModifier if how == "gptq" else QuantizationModifier
    calibration = {
        "dataset": data,
        "max_seq_length": max(map(len, rows)),
        "num_calibration_samples": len(rows),
        "shuffle_calibration_samples": False,
        "moe_calibrate_all_experts": os.environ.get("ALL_EXPERTS", "1") == "1",
    }
    cpu = time.process_time()
    oneshot(
        model=model,
        processor=words,
        recipe=kind(config_groups=groups, ignore=IGNORE),
        **(calibration if how == "gptq" else {}),
    )
    cpu = time.process_time() - cpu
    model.to(torch.bfloat16).save_pretrained(out, save_compressed=True)
    words.save_pretrained(out)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"cpu": cpu, "peak": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
