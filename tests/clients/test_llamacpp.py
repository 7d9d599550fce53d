"""llama.cpp itself reads what `quantize --format gguf:...` wrote: the same logits as transformers,
the same tokens as the tokenizer. Opt-in, see tests/clients/__init__.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from methods.upcycled import trained
from surgery import tokenizers_by_hand as by_hand
from surgery.gguf_models import OVERRIDES

import moetool as api
from moetool.surgery.checkpoint import Checkpoint

pytestmark = pytest.mark.clients
PYTHON = Path(os.environ.get("MOETOOL_CLIENTS", "")) / "llama.cpp" / "bin" / "python"
KINDS = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4", "bf16")
ROWS = [[(7 * i + 3 * i * i + 50 * row) % 160 for i in range(40)] for row in range(2)]
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x**2 + 10_000  # tabs\t\tand   spaces\n\n",
    "Größe, naïveté, 東京で 12345 円, \U0001f999!! 'twas I'LL don't",
    "  leading and trailing  \n",
    "a<|im_start|>user\nhi<|im_end|>b",
)


def ask(jobs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What llama.cpp answers."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON}: MOETOOL_CLIENTS names no folder with llama.cpp")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("reading_llamacpp.py")
    done = subprocess.run(
        [PYTHON, script, folder / "jobs.json", folder / "answers.npz"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(folder / "answers.npz"))


def kl(reference: torch.Tensor, answer: np.ndarray) -> float:
    """Mean over places of KL(reference || answer), in float64."""
    a, b = (torch.log_softmax(torch.as_tensor(x).double(), -1) for x in (reference, answer))
    return float((a.exp() * (a - b)).sum(-1).mean())


def stock(folder: Path, rows: list[list[int]]) -> torch.Tensor:
    """transformers' logits in float32."""
    with torch.no_grad():
        return tiny.load(folder)(torch.tensor(rows)).logits


@pytest.mark.parametrize("family", OVERRIDES)
def test_the_same_logits(models: Callable[..., Path], tmp_path: Path, family: str) -> None:
    """float16 holds the weights of these models, so the function is the same one; of what is
    rounded llama.cpp rounds activations too: near the dequantized model, not equal to it.
    """
    source = models(family, dtype="float16", **OVERRIDES[family])
    jobs, full = {}, {}
    for kind in ("f16", *KINDS):
        out = tmp_path / kind
        api.quantize(str(source), str(out), format=f"gguf:{kind}")
        jobs[kind] = {"file": str(out / "model.gguf"), "rows": ROWS}
        api.dequantize(str(out), str(tmp_path / f"{kind}-full"), dtype="float32")
        full[kind] = stock(tmp_path / f"{kind}-full", ROWS)
    reference, answers = stock(source, ROWS), ask(jobs, tmp_path)
    assert {k for k in answers if k.endswith("refused")} == set()
    assert torch.equal(full["f16"], reference)
    assert kl(reference, answers["f16/logits"]) < 2e-5
    assert kl(full["bf16"], answers["bf16/logits"]) < 1e-3
    for kind in KINDS:
        mine, theirs = kl(reference, full[kind].numpy()), kl(reference, answers[f"{kind}/logits"])
        assert kl(full[kind], answers[f"{kind}/logits"]) < 0.3 * mine + 1e-3, kind
        assert theirs < 1.5 * mine + 1e-3, kind


def test_a_model_in_several_files(models: Callable[..., Path], tmp_path: Path) -> None:
    source = models("qwen3_moe", dtype="float16", **OVERRIDES["qwen3_moe"])
    api.quantize(str(source), str(tmp_path / "out"), format="gguf:f16", max_shard_size=100_000)
    first = sorted((tmp_path / "out").glob("*.gguf"))[0]
    assert first.name.startswith("model-00001-of-")
    answers = ask({"split": {"file": str(first), "rows": ROWS}}, tmp_path)
    assert kl(stock(source, ROWS), answers["split/logits"]) < 2e-5


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: by_hand.of_bytes(None),
    "qwen2": lambda: by_hand.of_bytes(by_hand.QWEN2),
    "llama3": lambda: by_hand.of_bytes(by_hand.LLAMA3),
    "sentencepiece": by_hand.of_characters,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_same_tokens(models: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    size = {"vocab_size": 1024}
    folder = tmp_path / "model"
    shutil.copytree(models("llama", dtype="float16", **OVERRIDES["llama"], **size), folder)
    words = {"bos_token": "<s>", "eos_token": "</s>"} if kind == "sentencepiece" else {}
    by_hand.save(TOKENIZERS[kind](), folder, **words)
    api.quantize(str(folder), str(tmp_path / "out"), format="gguf:f16")
    file = str(tmp_path / "out" / "model.gguf")
    answers = ask({"made": {"file": file, "texts": TEXTS}}, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for number, text in enumerate(TEXTS):
        assert answers[f"made/tokens/{number}"].tolist() == tokenizer(text)["input_ids"], text


def _testbed() -> Path:
    return Path(os.environ.get("MOETOOL_TESTBED", "")) / "qwen3moe-16x4"


def _smollm() -> Path:
    cache = os.environ.get("MOETOOL_TEST_CACHE", Path.home() / ".cache" / "moetool-tests")
    return Path(cache) / "SmolLM2-135M-Instruct"


@pytest.mark.parametrize("where", [_testbed, _smollm], ids=["testbed", "smollm"])
def test_trained_models_and_their_tokenizers(where: Callable[[], Path], tmp_path: Path) -> None:
    """Real weights in f16 and q4_0, real tokenizers: the same tokens of every text."""
    from transformers import AutoTokenizer

    source = where()
    if not (source / "config.json").exists():
        pytest.skip(f"{source} is not there")
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [tokenizer(" ".join(TEXTS * 2))["input_ids"][:128]]
    jobs = {}
    for kind in ("f16", "q4_0"):
        api.quantize(str(source), str(tmp_path / kind), format=f"gguf:{kind}")
        file = str(tmp_path / kind / "model.gguf")
        jobs[kind] = {"file": file, "rows": rows, "texts": TEXTS}
    answers, reference = ask(jobs, tmp_path), stock(source, rows)
    assert kl(reference, answers["f16/logits"]) < 1e-4
    api.dequantize(str(tmp_path / "q4_0"), str(tmp_path / "full"), dtype="float32")
    full = stock(tmp_path / "full", rows)
    assert kl(full, answers["q4_0/logits"]) < 0.3 * kl(reference, full.numpy())
    for number, text in enumerate(TEXTS):
        found = answers[f"f16/tokens/{number}"].tolist()
        assert found == tokenizer(text)["input_ids"], text
    assert Checkpoint.open(tmp_path / "q4_0").travelling()


def test_ternary_experts(models: Callable[..., Path], tmp_path: Path) -> None:
    """Its product with experts takes TQ2_0; it rounds their activations to 8 bits."""
    wide = models("qwen2", hidden_size=256, intermediate_size=512)
    own = trained(wide, tmp_path / "own", experts=3, form="ternary", top_k=1)
    api.materialize(str(own), str(tmp_path / "native"), target="qwen2_moe")
    api.quantize(str(tmp_path / "native"), str(tmp_path / "small"), plan="experts=gguf:tq2_0")
    job = {"file": str(tmp_path / "small" / "model.gguf"), "rows": ROWS}
    answer = ask({"small": job}, tmp_path)["small/logits"]
    assert kl(stock(tmp_path / "native", ROWS), answer) < 1e-4
