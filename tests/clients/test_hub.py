"""The text half of a model with a second FFN for image tokens, in vLLM's InternLM2 (its class with
the second FFN went after 0.23): names, and the heads that lie joined in `wqkv`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from safetensors.torch import load_file, save_file

import moetool
from clients import others
from clients.sources import PLAIN

pytestmark = pytest.mark.clients
SIZE = {**PLAIN, "hidden_size": 256, "num_attention_heads": 8, "tie_word_embeddings": False}


def halved(native: Path, out: Path) -> Path:
    """Without the second FFNs, and with a config that needs no code of the Hub."""
    held = load_file(native / "model.safetensors")
    config: dict[str, Any] = json.loads((native / "config.json").read_text())
    out.mkdir()
    text = {n: t for n, t in held.items() if "feed_forward_ve" not in n}
    save_file(text, out / "model.safetensors", {"format": "pt"})
    own = {"architectures": ["InternLM2ForCausalLM"], "model_type": "llama"}
    (out / "config.json").write_text(json.dumps(config | own))
    return out


def test_vllm_computes_its_text(tmp_path: Path) -> None:
    others.python("vllm")
    source = tiny.save("llama", tmp_path / "source", dtype="bfloat16", **SIZE)
    own, native = tmp_path / "own", tmp_path / "native"
    said = {"form": "full", "key": "modality", "experts": 1, "modality_ids": "7"}
    moetool.upcycle(str(source), str(own), **said)
    moetool.materialize(str(own), str(native), target="internlm2_ve")
    shuffled = halved(native, tmp_path / "shuffled")
    held = load_file(shuffled / "model.safetensors")
    wrong = {n: t.roll(32, 0) if n.endswith("wqkv.weight") else t for n, t in held.items()}
    save_file(wrong, shuffled / "model.safetensors", {"format": "pt"})
    text = halved(native, tmp_path / "text")
    (answer,) = others.ask("vllm", [[text, source, shuffled]], tmp_path)
    assert answer["state"] == "read", answer
    assert answer["kl"] < 1e-5 < 1e-3 < answer["rounding"], answer
