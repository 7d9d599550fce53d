"""moetool.load: experts packed in stock models compute what the model in full does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from methods.test_profiles import ids
from safetensors.torch import save_file
from surgery.test_bnb import tensors
from torch.nn.utils import parametrize

import moetool as api
from moetool.errors import MoetoolError
from moetool.modeling.packed import Packed

Made = Callable[..., Any]
_SHORT = {"num_hidden_layers": 2}
_SPARSE = {"moe_intermediate_size": 64, **_SHORT}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_SPARSE, "head_dim": 32},
    "mixtral": {**_SHORT, "head_dim": 32},
    "qwen2_moe": {**_SPARSE, "shared_expert_intermediate_size": 64},
    "deepseek_v3": {**_SPARSE, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 32},
    "glm4_moe": {**_SPARSE, "head_dim": 32},
}
IDS = torch.randint(10, 150, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def stored(models: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """stored("mixtral", "nf4") -> (the tiny model so, and its matrices again in full float32)."""
    root, made = tmp_path_factory.mktemp("stored"), {}

    def get(family: str, plan: str) -> tuple[Path, Path]:
        if (family, plan) not in made:
            folder = root / f"{family}-{len(made)}"
            source = str(models(family, **FAMILIES[family]))
            how = {"method": "rtn", "search": "none", "force": True}
            said = {"plan": plan} if "=" in plan else {"format": plan}
            api.quantize(source, str(folder), **how, **said)
            full = folder.with_name(folder.name + "-full")
            api.dequantize(str(folder), str(full))
            made[family, plan] = folder, full
        return made[family, plan]

    return get


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(input_ids=IDS).logits
    return made


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def values(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter by its stock name, decoded where it is packed."""
    from bitsandbytes import functional

    found: dict[str, torch.Tensor] = {}
    for head, module in model.named_modules():
        for name, held in {**module._parameters, **module._modules}.items():
            if isinstance(held, Packed):
                found[f"{head}.{name}"] = torch.stack([held[e] for e in range(held.shape[0])])
            elif isinstance(held, torch.Tensor) and not isinstance(module, Packed):
                state = getattr(held, "quant_state", None)
                value = functional.dequantize_4bit(held.data, state) if state else held.data
                found[f"{head}.{name}"] = value
        if parametrize.is_parametrized(module):
            found |= {f"{head}.{name}": getattr(module, name) for name in module.parametrizations}
    return {n: v for n, v in found.items() if ".parametrizations" not in n}


CASES = [(f, "nf4") for f in FAMILIES]
CASES += [("qwen3_moe", p) for p in ("nf4-double", "fp4", "experts=bnb-int8")]
CASES += [("mixtral", "fp4-double"), ("deepseek_v3", "experts=bnb-int8")]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_it_computes_what_the_full_model_does(family: str, plan: str, stored: Made) -> None:
    """Parameters equal, logits to rounding, the same text; the class is the stock one."""
    folder, full = stored(family, plan)
    model, expected = api.load(folder, dtype="float32"), tiny.load(full)
    assert isinstance(model, type(expected)) and not model.training
    mine, theirs = values(model), dict(expected.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    assert apart(logits(model), logits(expected)) < 1e-6
    how = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(IDS[:1], **how), expected.generate(IDS[:1], **how))
    assert model.config.quantization_config.to_dict()["quant_method"] == "bitsandbytes"


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts(how: str, stored: Made) -> None:
    folder, full = stored("qwen3_moe", "nf4")
    model = api.load(folder, dtype=torch.float32, experts_implementation=how)
    assert model.config._experts_implementation == how
    assert apart(logits(model), logits(tiny.load(full))) < 1e-6


@pytest.mark.parametrize(("plan", "most"), [("nf4", 0.5625), ("experts=bnb-int8", 1.1)])
def test_experts_stay_packed(plan: str, most: float, stored: Made) -> None:
    """Bytes a weight of all that the experts hold, after a forward pass too."""
    model = api.load(stored("qwen3_moe", plan)[0], dtype=torch.bfloat16)
    for _ in range(2):
        held = 0
        for module in model.modules():
            if isinstance(module, Packed):
                held += sum(p.nbytes for p in module.parameters())
            elif parametrize.is_parametrized(module):
                for chain in module.parametrizations.values():
                    held += chain.original.nbytes + chain[0].quant_state.absmax.nbytes
        assert held <= most * 8 * 3 * 64 * 64
        assert logits(model).isfinite().all()


def test_linears_are_the_librarys(stored: Made) -> None:
    """Attention in bf16 runs in bitsandbytes' own classes and kernels."""
    from bitsandbytes.nn import Linear4bit

    folder, full = stored("qwen3_moe", "nf4")
    model = api.load(folder, dtype="bfloat16")
    assert isinstance(model.model.layers[1].self_attn.q_proj, Linear4bit)
    assert model.is_loaded_in_4bit and model.config.dtype == torch.bfloat16
    assert apart(logits(model).float(), logits(tiny.load(full))) < 0.1


def test_what_transformers_loads_goes_through_it(models: Made, tmp_path: Path) -> None:
    """Full models, dense ones in nf4, experts in int4: from_pretrained, nothing else."""
    source = models("llama", head_dim=32)
    assert apart(logits(api.load(source)), tiny.logits(source)) == 0
    api.quantize(str(source), str(tmp_path / "nf4"), format="nf4", method="rtn")
    model = api.load(tmp_path / "nf4", dtype="float32", device_map="cpu")
    assert model.is_loaded_in_4bit
    mixture = models("qwen3_moe", dtype="bfloat16", **FAMILIES["qwen3_moe"])
    api.quantize(str(mixture), str(tmp_path / "int4"), format="int4/32", method="rtn")
    assert type(api.load(tmp_path / "int4")).__name__ == "Qwen3MoeForCausalLM"


def test_a_generation_config_travels(stored: Made, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stored("qwen3_moe", "nf4")[0], folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    model = api.load(folder)
    assert model.generation_config.max_new_tokens == 3
    assert model.config.name_or_path == str(folder)
    assert model.generate(IDS[:1]).shape[1] == IDS.shape[1] + 3


def test_what_cannot_be_loaded_is_said(models: Made, stored: Made, tmp_path: Path) -> None:
    """One sentence each: no checkpoint, a form nobody loads, a dtype that is none, a package."""
    with pytest.raises(MoetoolError, match="does not exist"):
        api.load(tmp_path / "nothing")
    folder, _ = stored("qwen3_moe", "nf4")
    with pytest.raises(MoetoolError, match="no dtype"):
        api.load(folder, dtype="int8")
    delta = tmp_path / "delta"
    how = {"calibrate": [str(ids(tmp_path))], "tokens": 600, "seq_len": 40, "pack": False}
    api.merge(str(models("qwen3_moe")), str(delta), method="d2-moe", form="factored", **how)
    with pytest.raises(MoetoolError, match="no class for") as problem:
        api.load(delta)
    assert "moetool dequantize" in str(problem.value)
    lost = tmp_path / "lost"
    shutil.copytree(folder, lost)
    lying = tensors(lost)
    lying.pop("model.norm.weight")
    save_file(lying, lost / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoetoolError, match="did not load the whole model") as problem:
        api.load(lost)
    assert problem.value.where["tensor"] == "model.norm.weight"


def test_a_missing_package_is_named(stored: Made) -> None:
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import moetool\nassert 'torch' not in sys.modules\n"
        "try: moetool.load(sys.argv[1])\nexcept moetool.MoetoolError as problem: print(problem)"
    )
    folder = str(stored("qwen3_moe", "nf4")[0])
    done = subprocess.run(
        [sys.executable, "-c", program, folder], capture_output=True, text=True, check=True
    )
    assert "bitsandbytes is not installed" in done.stdout and "pip install" in done.stdout
