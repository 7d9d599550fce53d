"""Routers whose weights a small network corrects: as MoExtend's code says it, in every family that
can have them.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from every.test_ragged_families import OPEN, usual
from modeling.grown import IDS, apart
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moetool
from moetool.modeling import carrier
from moetool.surgery import calibrated, groups
from moetool.surgery.calibrated import Correction
from moetool.surgery.layout import Layout, families
from moetool.surgery.text_model import text_model

ABLE = [f for f in families()["moe"] if not calibrated.why_not(Layout.load(f))]
Models = Callable[..., Path]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits
    return made


def corrected(router: Any, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """MoExtend's weights of what the stock router chose, in float64."""
    held = router.calibration
    into, out = (part.weight.double() for part in (held.up, held.down))
    shares = scores.double().softmax(-1)
    whole = shares + torch.nn.functional.gelu(shares @ into.T) @ out.T
    weights = whole.gather(-1, chosen)
    summed = getattr(router, "norm_topk_prob", type(router).__name__ != "JambaTopKRouter")
    return weights / weights.sum(-1, keepdim=True) if summed else weights


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the classes', of their defaults
@pytest.mark.parametrize("family", sorted(set(ABLE) - OPEN))
def test_the_routers_of_every_family_that_can(family: str) -> None:
    """At birth the stock router; else the paper's formula."""
    config, layout = usual(family), Layout.load(family)
    layer = text_model(config).moe_layers()[-1]
    said = groups.ragged_config(config, Correction((layer,), 4))
    with torch.device("meta"):
        made = carrier.MoetoolConfig.from_dict(copy.deepcopy(said))
        model = carrier.over(getattr(transformers, layout.cls), family)(made)
    routers = [m for m in model.modules() if hasattr(m, "calibration")]
    assert len(routers) == 1
    router = routers[0].to_empty(device="cpu").float().eval()
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for held in router.parameters():
            held.normal_(0, 0.1, generator=dice)
        x = torch.randn(5, router.weight.shape[-1], generator=dice)
        scores, weights, chosen = type(router).forward(router, x)
        want = corrected(router, scores, chosen)
        assert torch.allclose(router(x)[1].double(), want, atol=1e-6)
        assert not torch.allclose(router(x)[1], weights, atol=1e-6)
        router.calibration.down.weight.zero_()
        assert torch.allclose(router(x)[1], weights, atol=1e-6)


@pytest.fixture(scope="module")
def extended(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with a copy in two layers, whose routers are corrected."""
    out = tmp_path_factory.mktemp("extended") / "out"
    told = {"copy_expert": "1", "layers": "1,3", "calibration": 16}
    report = moetool.extend(str(models("mixtral")), str(out), **told)
    assert report["calibration"] == 16 and report["experts"] == [8, 9]
    return out


@pytest.mark.parametrize("layers", ["1,3", "all"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_extended_models(family: str, layers: str, models: Models, tmp_path: Path) -> None:
    """At birth they compute what copies alone do; saved again the same tensors; text goes through
    the whole model; `verify` knows every byte.
    """
    source, told = str(models(family)), {"copy_expert": "1", "layers": layers}
    moetool.extend(source, str(tmp_path / "bare"), **told)
    moetool.extend(source, str(tmp_path / "out"), calibration=16, **told)
    model = moetool.load(tmp_path / "out", dtype="float32")
    plain = logits(moetool.load(tmp_path / "bare", dtype="float32"))
    assert apart(logits(model), plain) <= 1e-6
    for name, held in model.named_parameters():
        if name.endswith("calibration.down.weight"):
            held.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(len(name)))
    changed = logits(model)
    assert apart(changed, plain) > 1e-3
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert before.keys() == after.keys() and sum("calibration" in n for n in before) > 3
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype="float32", output_loading_info=True
    )
    assert not any(info.values()) and torch.equal(logits(again), changed)
    text = tmp_path / "ids.jsonl"
    text.write_text(json.dumps({"input_ids": IDS[0].tolist()}))
    seen = moetool.eval(str(tmp_path / "again"), text=[str(text)])
    with torch.no_grad():
        loss = float(again(input_ids=IDS[:1], labels=IDS[:1]).loss)
    assert seen["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert moetool.verify(str(tmp_path / "out"), against=[source])["verified"] == "bytes"
    seen = moetool.inspect(str(tmp_path / "again"))
    assert seen["kind"] == "moe" and not seen["unknown_tensors"]


def test_it_trains_alone(extended: Path) -> None:
    """What corrects the weights learns while everything else rests; in another process, too."""
    model = moetool.load(extended, dtype="float32")
    model = pickle.loads(pickle.dumps(model)).train()
    for name, held in model.named_parameters():
        held.requires_grad_("calibration" in name)
    step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS, output_router_logits=True).loss
        loss.backward()
        losses.append(float(loss.detach()))
        step.step()
        step.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"layers": [1], "width": 0}, "from 1 to"),
        ({"layers": [1, 1], "width": 8}, "each once"),
        ({"layers": [9], "width": 16}, "some of"),
        ({"layers": [1], "widht": 16}, "did you mean width"),
        ([1], "no object"),
    ],
)
def test_the_config_is_read_strictly(said: Any, expected: str, extended: Path) -> None:
    config = json.loads((extended / "config.json").read_text())
    config["moetool"]["calibration"] = said
    with pytest.raises(moetool.MoetoolError) as refused:
        text_model(config)
    assert expected in str(refused.value)


def test_what_is_refused(extended: Path, models: Models, tmp_path: Path) -> None:
    """Another router, another cut, a tensor that is missing: each in a sentence."""
    told = {"copy_expert": "1", "calibration": 16}
    with pytest.raises(moetool.UsageError, match="no plain softmax"):
        moetool.extend(str(models("glm4_moe")), str(tmp_path / "out"), **told)
    for verb in (moetool.prune, moetool.extend):
        with pytest.raises(moetool.MoetoolError, match="networks that correct"):
            verb(str(extended), str(tmp_path / "out"), **({} if verb is moetool.prune else told))
    with pytest.raises(moetool.MoetoolError, match="weights are corrected"):
        moetool.profile(str(extended), str(tmp_path / "stats"), calibrate=["random"], tokens=64)
    shutil.copytree(extended, tmp_path / "less")
    held = load_file(extended / "model.safetensors")
    lost = next(n for n in held if n.endswith("calibration.down.weight"))
    save_file({n: t for n, t in held.items() if n != lost}, tmp_path / "less/model.safetensors")
    with pytest.raises(moetool.MoetoolError) as refused:
        AutoModelForCausalLM.from_pretrained(tmp_path / "less")
    assert "calibration.down.weight" in refused.value.where["tensor"]
