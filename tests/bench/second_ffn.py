"""Mono-InternVL's own class against moetool: `python tests/bench/second_ffn.py MODEL --code DIR
--python PYTHON`, MODEL a Llama or an InternLM2.

Gives it a copy of each FFN for image tokens, draws these anew, writes it for the class with a second
FFN and prints the largest logit difference between that class and moetool's own model, relative to
the largest logit: float32, 2 x 90 random ids, of text and with 36 tokens marked. DIR: the folder
internvl/model of a clone of github.com/OpenGVLab/Mono-InternVL; PYTHON: one with transformers 4.57
and einops, for whom its code runs.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import moetool

# Run where the class is; its package imports more than the two files that are needed.
ASKED = """
import sys, types
sys.path.insert(0, sys.argv[1])
package = types.ModuleType("internlm2")
package.__path__ = [sys.argv[1] + "/internlm2"]
sys.modules["internlm2"] = package
import torch
from internlm2.configuration_internlm2 import InternLM2Config
from internlm2.modeling_internlm2_ve import InternLM2VEForCausalLM as Model
config = InternLM2Config.from_pretrained(sys.argv[2], attn_implementation="eager")
given = torch.load(sys.argv[3])
said = {"config": config, "torch_dtype": torch.float32, "output_loading_info": True}
model, info = Model.from_pretrained(sys.argv[2], **said)
assert not any(info.values()), info
with torch.no_grad():
    made = [
        model.eval()(input_ids=given["ids"], visual_token_mask=mask, use_cache=False).logits
        for mask in given["masks"]
    ]
torch.save(made, sys.argv[4])
"""


def drawn_anew(folder: Path) -> None:
    """Copies that are no longer their FFNs."""
    some = torch.Generator().manual_seed(1)
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for name, tensor in held.items():
            if ".experts.0." in name:
                noise = 1 + 0.3 * torch.randn(tensor.shape, generator=some)
                held[name] = (tensor.float() * noise).to(tensor.dtype)
        save_file(held, file, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--code", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        own, native, given, answer = (Path(made) / n for n in ("own", "native", "given", "answer"))
        clones = {"form": "full", "key": "modality", "experts": 1, "modality_ids": "7"}
        moetool.upcycle(str(said.model), str(own), **clones)
        drawn_anew(own)
        moetool.materialize(str(own), str(native), target="internlm2_ve")
        ids = torch.randint(5, 300, (2, 90), generator=torch.Generator().manual_seed(0))
        images = torch.zeros_like(ids)
        images[:, 4:40] = 1
        kinds = (torch.zeros_like(ids), images)
        torch.save({"ids": ids, "masks": [kind[..., None].float() for kind in kinds]}, given)
        words = [said.python, "-c", ASKED, said.code, native, given, answer]
        subprocess.run(words, check=True, capture_output=True, text=True)
        model = moetool.load(str(own), dtype="float32").eval()
        for name, kind, theirs in zip(("text", "marked"), kinds, torch.load(answer), strict=True):
            with torch.no_grad():
                apart = (model(input_ids=ids, modality=kind).logits - theirs).abs().max()
            print(f"| {name} | {float(apart / theirs.abs().max()):.2g} |")


if __name__ == "__main__":
    main()
