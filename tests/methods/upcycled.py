"""Models of moetool's own type whose experts are no longer what they were at birth, and what they
answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import moetool

IDS = torch.randint(10, 150, (2, 24), generator=torch.Generator().manual_seed(1))


def trained(source: Path, out: Path, **options: Any) -> Path:
    """An upcycle whose experts are no longer what they were at birth."""
    moetool.upcycle(str(source), str(out), **options)
    train(out)
    return out


def train(folder: Path) -> None:
    """Draw what experts and routers hold anew, in place."""
    (file,) = folder.glob("*.safetensors")
    held, drawn = load_file(file), torch.Generator().manual_seed(3)
    for name, tensor in held.items():
        if name.endswith(("lora_B", "output_scale", "delta_values")):
            held[name] = (torch.randn(tensor.shape, generator=drawn) * 0.05).to(tensor.dtype)
        elif name.endswith("router.weight"):
            held[name] = torch.randn(tensor.shape, generator=drawn).to(tensor.dtype)
        elif name.endswith("weight_packed"):
            held[name] = tensor.roll(1, 0)
    save_file(held, file, {"format": "pt"})


def own_logits(folder: Path) -> torch.Tensor:
    """As the plain Auto class gives them, in float32."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(v for k, v in info.items() if k != "error_msgs"), info
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits
    return made


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest number of `other`."""
    return float((one - other).abs().max() / other.abs().max())
