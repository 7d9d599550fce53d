"""FFNs whose parts are experts, in transformers: saved again, generating, under an adapter, on disk;
and what a config may not say of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import moetool
from moetool.demo import MODEL, TEXT
from moetool.errors import MoetoolError
from moetool.modeling.block import blocks

IDS = torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def carved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("parts") / "out"
    cut = {"carve": "activation", "split": 8, "carve_shared": 1, "top_k": 3, "carve_marks": 8}
    moetool.upcycle(
        str(MODEL), str(out), calibrate=[str(TEXT)], tokens=512, seq_len=128, sync=False, **cut
    )
    return out


def loaded(folder: Path, **options: Any) -> Any:
    made, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(v for k, v in info.items() if k != "error_msgs"), info
    return made.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    made: Tensor = model(input_ids=IDS).logits
    return made


def test_saved_again_it_has_the_same_bytes(carved: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(carved)
    model.save_pretrained(tmp_path / "again")
    old, new = (load_file(f / "model.safetensors") for f in (carved, tmp_path / "again"))
    assert old.keys() == new.keys()
    assert all(old[n].dtype == new[n].dtype and torch.equal(old[n], new[n]) for n in old)
    assert torch.equal(logits(loaded(tmp_path / "again")), logits(loaded(carved)))


def test_a_cache_gives_what_the_whole_sequence_does(carved: Path) -> None:
    model = loaded(carved)
    said = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(model.generate(IDS, use_cache=c, **said) for c in (True, False)))
    with torch.no_grad():
        alone = model(input_ids=IDS[:1, :1]).logits
    assert torch.allclose(alone, logits(model)[:1, :1], atol=1e-4)


def test_linears_that_are_more_than_their_weight_run_whole(carved: Path, tmp_path: Path) -> None:
    """Under an adapter that adds nothing, and with a layer's weights on disk, it is the same; an
    adapter that adds something counts.
    """
    model, plain = loaded(carved), logits(loaded(carved))
    for block in blocks(model):
        block.gate_proj, block.down_proj = Adapted(block.gate_proj), Adapted(block.down_proj)
    assert torch.allclose(logits(model), plain, atol=1e-4)
    block.gate_proj.by = 1.1
    assert not torch.allclose(logits(model), plain, atol=1e-2)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{n}": "disk" if n == 1 else "cpu" for n in range(4)}
    away = loaded(carved, device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path)
    assert torch.allclose(logits(away), plain, atol=1e-4)


class Adapted(nn.Module):
    """A linear and what is added to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.by = base, 1.0

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.base(x) * self.by
        return made


def test_only_parts_that_run_have_gradients(carved: Path) -> None:
    model = loaded(carved).train()
    model(input_ids=IDS[:, :4], labels=IDS[:, :4]).loss.backward()
    for block in blocks(model):
        gradient = block.down_proj.weight.grad.T.reshape(8, -1).abs().sum(1)
        assert gradient[0] > 0 and block.router.gate.grad is None


@pytest.mark.parametrize(
    ("params", "experts", "said"),
    [
        ({"shared": 1}, 9, "parts of an FFN that cannot be cut so"),
        ({"shared": -1}, 9, "shared"),
        ({"shared": "1"}, 7, "shared"),
        ({"shard": 1}, 8, "shard"),
    ],
)
def test_what_a_config_says_wrongly_is_refused(
    params: dict[str, Any], experts: int, said: str, carved: Path, tmp_path: Path
) -> None:
    config = json.loads((carved / "config.json").read_text())
    config["moetool"]["groups"][0] |= {"params": params, "experts": experts}
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors").symlink_to(carved / "model.safetensors")
    with pytest.raises((MoetoolError, ValueError)) as raised:
        transformers.AutoModelForCausalLM.from_pretrained(out)
    assert said in str(raised.value)
