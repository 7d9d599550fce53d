"""Adapters, modulations, and copies by modality: written by the command, run in transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from modeling.grown import IDS, apart
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import moetool
from moetool.errors import MoetoolError, UsageError
from moetool.modeling import balance, signals
from moetool.modeling.balance import Scores
from moetool.modeling.block import blocks

Models = Callable[..., Path]
CHECKPOINTING = "activation_checkpointing_enable"  # its name in newer ones
IMAGE = 5  # a token of the tiny models
MIXED = torch.tensor([[7, 11, IMAGE, IMAGE, 13, IMAGE, 17, 19]])
ONE_COPY: dict[str, Any] = {
    "form": "full",
    "key": "modality",
    "experts": 1,
    "top_k": 1,
    "modality_ids": str(IMAGE),
}
SHARED: dict[str, Any] = {
    "form": "full",
    "key": "modality",
    "experts": 3,
    "top_k": 2,
    "allowed": "0111/1110",
    "routers": "each",
    "modality_ids": str(IMAGE),
}


def loaded(folder: Path, auto: Any = AutoModelForCausalLM) -> Any:
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(input_ids=ids, **more).logits
    return made


def shaken(model: Any, only: str) -> None:
    """Random numbers in every parameter whose name holds `only`."""
    draw = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{"form": "adapter"}, {"form": "adapter", "adapter_at": "before"}, {"form": "film"}],
    ids=["adapter", "adapter-before", "film"],
)
def test_exact_at_birth_and_itself_when_saved(
    options: dict[str, Any], family: str, models: Models, tmp_path: Path
) -> None:
    source, out = models(family), tmp_path / "out"
    width = {"adapter_dim": 8} if options["form"] == "adapter" else {}
    report = moetool.upcycle(str(source), str(out), experts=3, layers="0,1", **options, **width)
    assert report["certificate"]["level"] == "exact"
    model, stock = loaded(out), loaded(source)
    assert apart(logits(model, IDS), logits(stock, IDS)) <= 1e-5
    shaken(model, ".experts.")
    assert apart(logits(model, IDS), logits(stock, IDS)) > 1e-3
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again"), IDS), logits(model, IDS))


def reference(block: Any, form: str, x: Tensor) -> Tensor:
    """A block of a Llama in float64, token by token and expert by expert."""
    weight = {n: p.detach().double() for n, p in block.named_parameters()}

    def ffn(h: Tensor) -> Tensor:
        gate, up = (h @ weight[f"{n}_proj.weight"].T for n in ("gate", "up"))
        return functional.silu(gate) * up @ weight["down_proj.weight"].T

    def change(e: int, h: Tensor) -> Tensor:
        at = f"experts.{e}."
        if form == "film":
            scale, shift = (
                h @ weight[f"{at}film_{n}.weight"].T + weight[f"{at}film_{n}.bias"]
                for n in ("scale", "shift")
            )
            return scale * h + shift
        down, up = (weight[f"{at}adapter_{n}.weight"] for n in ("down", "up"))
        return functional.gelu(h @ down.T) @ up.T

    rows = []
    for token in x.double():
        best, expert = (token @ weight["router.weight"].T).topk(2)
        each = []
        for e in expert.tolist():
            h = ffn(token)
            each.append(ffn(token + change(e, token)) if form == "before" else h + change(e, h))
        rows.append((best.softmax(-1)[:, None] * torch.stack(each)).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["adapter", "before", "film"])
def test_as_the_formulas_say(form: str, models: Models, tmp_path: Path) -> None:
    width = {} if form == "film" else {"adapter_dim": 8}
    at = {"adapter_at": "before"} if form == "before" else {}
    name = "film" if form == "film" else "adapter"
    moetool.upcycle(
        str(models("llama")), str(tmp_path / "out"), experts=4, form=name, **width, **at
    )
    model = loaded(tmp_path / "out")
    shaken(model, "experts")
    shaken(model, "router")
    block, x = next(blocks(model)), torch.randn(9, 64)
    with torch.no_grad():
        assert apart(block(x[None])[0].double(), reference(block, form, x)) < 1e-5


@pytest.mark.parametrize("options", [ONE_COPY, SHARED], ids=["one-copy", "shared"])
def test_copies_by_modality(options: dict[str, Any], models: Models, tmp_path: Path) -> None:
    """Exact at birth; with a copy for images alone, text never notices what becomes of it."""
    source = models("llama")
    report = moetool.upcycle(str(source), str(tmp_path / "out"), **options)
    assert report["certificate"]["level"] == "exact"
    model, stock = loaded(tmp_path / "out"), loaded(source)
    at_birth = logits(model, MIXED)
    assert apart(at_birth, logits(stock, MIXED)) <= 1e-5
    shaken(model, ".experts.")
    with_images = logits(model, MIXED)
    assert apart(with_images, at_birth) > 1e-3
    text = torch.tensor([[7, 11, 13, 17, 19]])
    alone = options is ONE_COPY
    assert torch.equal(logits(model, text), logits(stock, text)) == alone
    assert torch.equal(with_images[:, :2], at_birth[:, :2]) == alone
    kinds = signals.of_ids(MIXED, [[IMAGE]])
    assert torch.equal(logits(model, MIXED, modality=kinds), with_images)
    for wrong in (-kinds, kinds * 7, kinds.float()):
        with pytest.raises(UsageError, match="not one of the model's"):
            model(input_ids=MIXED, modality=wrong)
    embedded = model.get_input_embeddings()(MIXED)
    with torch.no_grad():
        given = model(inputs_embeds=embedded, modality=kinds).logits
        assert apart(given, with_images) <= 1e-6
        with pytest.raises(UsageError, match="what kind of token"):
            model(inputs_embeds=embedded)
    made = model.generate(MIXED, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, MIXED.shape[1] + 3)


def test_each_modality_has_a_router_of_its_own(models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **SHARED)
    model = loaded(tmp_path / "out")
    block = next(blocks(model))
    scorer, x = block.router, torch.randn(4, 64)
    scores = scorer(x, signals.Heard({"modality": torch.tensor([[0, 1, 0, 1]])}))
    assert scorer.weight.shape == (8, 64)
    text, image = scorer.weight[:4], scorer.weight[4:]
    wanted = torch.stack([x[0] @ text.T, x[1] @ image.T, x[2] @ text.T, x[3] @ image.T])
    allowed = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]] * 2).bool()
    assert torch.equal(scores.isinf(), ~allowed)
    assert torch.allclose(scores[allowed], wanted[allowed], atol=1e-6)


def test_generating_knows_the_prompts_modality(models: Models, tmp_path: Path) -> None:
    """As it is said, with a cache and without, and refused where nothing looks at it."""
    source = models("llama")
    moetool.upcycle(str(source), str(tmp_path / "out"), **ONE_COPY)
    model = loaded(tmp_path / "out")
    shaken(model, ".experts.")
    said = torch.tensor([[1, 1, 1, 0, 0, 1, 0, 0]])
    assert not torch.equal(logits(model, MIXED, modality=said), logits(model, MIXED))
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    how |= {"return_dict_in_generate": True, "modality": said}
    cached, whole = (model.generate(MIXED, use_cache=use, **how) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    assert apart(torch.stack(cached.logits), torch.stack(whole.logits)) < 1e-5
    first = logits(model, MIXED, modality=said)[:, -1]
    assert apart(cached.logits[0], first) < 1e-5
    with pytest.raises(UsageError, match="does not fit"):
        model(input_ids=MIXED, modality=said[:, :3])
    with pytest.raises(UsageError, match="no route of this model looks at task"):
        model(input_ids=MIXED, task=torch.tensor([0]))


def test_a_layer_by_itself_does_not_guess(models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **ONE_COPY)
    model = loaded(tmp_path / "out")
    block, x = next(blocks(model)), torch.randn(1, MIXED.shape[1], 64)
    with pytest.raises(UsageError, match="by itself"):
        block(x)
    logits(model, MIXED)
    with pytest.raises(UsageError, match="by itself"):  # though as many tokens came before
        block(x)
    signals.say(block, modality=signals.of_ids(MIXED, [[IMAGE]]))
    assert torch.isfinite(block(x)).all()


def test_a_router_of_nan_is_refused(models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), experts=2, form="null")
    model = loaded(tmp_path / "out")
    next(blocks(model)).router.weight.data[0, 0] = torch.nan
    with pytest.raises(MoetoolError, match="holds no numbers"):
        logits(model, MIXED)


@pytest.mark.parametrize(
    "options", [{"form": "lora", "rank": 4}, {"form": "null"}, {"form": "full"}]
)
def test_always_on(options: dict[str, Any], models: Models, tmp_path: Path) -> None:
    """No router, and the source's function; two experts beside are added, copies are averaged."""
    source = models("llama")
    report = moetool.upcycle(str(source), str(tmp_path / "out"), key="always", experts=2, **options)
    assert report["certificate"]["level"] == "exact" and report["top_k"] == 2
    model = loaded(tmp_path / "out")
    assert not [n for n, _ in model.named_parameters() if "router" in n]
    assert apart(logits(model, MIXED), logits(loaded(source), MIXED)) <= 1e-5
    assert model(input_ids=MIXED, output_router_logits=True).aux_loss is None


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_any_form_by_modality(form: str, models: Models, tmp_path: Path) -> None:
    source, more = models("llama"), {"rank": 4} if form == "lora" else {"adapter_dim": 8}
    ids = {"modality_ids": str(IMAGE)}
    args = {"experts": 2, "form": form, "key": "modality", **ids, **more}
    moetool.upcycle(str(source), str(tmp_path / "out"), **args)
    model, stock = loaded(tmp_path / "out"), loaded(source)
    assert apart(logits(model, MIXED), logits(stock, MIXED)) <= 1e-5
    shaken(model, ".experts.1.")
    text = torch.tensor([[7, 11, 13, 17, 19]])
    assert apart(logits(model, text), logits(stock, text)) <= 1e-5
    assert apart(logits(model, MIXED), logits(stock, MIXED)) > 1e-3


def test_each_modality_is_balanced_by_itself() -> None:
    """Text spreads evenly over its two choices, images do not over theirs; pooled, one would not
    see it.
    """
    low = -torch.inf
    text = [[0.0, 0.0, low, low]] * 4
    image = [[low, low, 9.0, -9.0]] * 4
    part = torch.tensor([0] * 4 + [1] * 4)
    chosen = torch.tensor([0, 1, 0, 1, 2, 2, 2, 2])[:, None]
    found = balance.of_layer(Scores(torch.tensor(text + image), chosen, part=part))
    assert float(found) == pytest.approx((1 + 2) / 2)
    alone = Scores(torch.tensor([[0.0, low], [low, 0.0]]), torch.tensor([[0], [1]]))
    assert balance.of_layer(replace(alone, part=torch.tensor([0, 1]))) is None


def test_gradients_are_the_same_when_layers_run_again(models: Models, tmp_path: Path) -> None:
    """The modality is still there when checkpointing recomputes a layer."""
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **ONE_COPY)
    found = []
    for again in (False, True):
        model = loaded(tmp_path / "out").train()
        if again:
            getattr(model, CHECKPOINTING, model.gradient_checkpointing_enable)()
        model(input_ids=MIXED, labels=MIXED).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    one, other = found
    assert one.keys() == other.keys() and any(
        ".experts.0." in n and g.any() for n, g in one.items()
    )
    assert all(torch.allclose(one[n], other[n], atol=1e-7) for n in one)


def test_image_tokens_of_a_model_that_sees(models: Models, tmp_path: Path) -> None:
    """LLaVA names its image token itself; pixels and text go through as before."""
    source = models("llava")
    moetool.upcycle(str(source), str(tmp_path / "out"), key="modality", experts=1)
    model, stock = (loaded(f, AutoModelForImageTextToText) for f in (tmp_path / "out", source))
    config = stock.config
    size = config.vision_config.image_size // config.vision_config.patch_size
    image = next(
        getattr(config, n) for n in ("image_token_id", "image_token_index") if hasattr(config, n)
    )
    ids = torch.tensor([[7, *[image] * size**2, 11, 13]])
    pixels = torch.randn(1, 3, *[config.vision_config.image_size] * 2)
    whole = logits(stock, ids, pixel_values=pixels)
    assert apart(logits(model, ids, pixel_values=pixels), whole) <= 1e-5
    shaken(model, ".experts.")
    assert apart(logits(model, ids, pixel_values=pixels), whole) > 1e-3
    assert torch.equal(logits(model, ids[:, -2:]), logits(stock, ids[:, -2:]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "adapter", "adapter_dim": 999}, "wider"),
        ({"form": "film", "shared": True}, "does nothing"),
        ({"form": "full", "key": "modality", "experts": 1, "top_k": 1}, "names no token"),
        ({**ONE_COPY, "modality_ids": "a"}, "no numbers"),
        ({**ONE_COPY, "modality_ids": "999999"}, "no tokens of the model"),
        ({**ONE_COPY, "modality_ids": "5,7/5"}, "a token twice"),
        ({"key": "modality", "form": "lora", "experts": 1, "modality_ids": "5"}, "only expert"),
        ({"key": "modalty"}, "modality"),
        ({"modality_ids": "5"}, "belong together"),
        ({**ONE_COPY, "experts": 4, "top_k": 2}, "usual table"),
        ({**SHARED, "allowed": "01/10"}, "does not fit"),
        ({**SHARED, "allowed": "0001/1110"}, "does not fit"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    options: dict[str, Any], said: str, models: Models, tmp_path: Path
) -> None:
    with pytest.raises(MoetoolError, match=said):
        moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_route_by_modality_that_does_not_fit_is_refused(models: Models, tmp_path: Path) -> None:
    moetool.upcycle(str(models("llama")), str(tmp_path / "out"), **ONE_COPY)
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"ids"', '"idz"'))
    with pytest.raises(MoetoolError, match="a route by modality"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_copies_with_an_activation_of_their_own(
    family: str, models: Models, tmp_path: Path
) -> None:
    """As the family's own FFN with that activation; whole copies otherwise."""
    source, out = models(family), tmp_path / "out"
    report = moetool.upcycle(
        str(source), str(out), target="moetool", experts=3, activation="relu", layers="0"
    )
    assert report["certificate"]["level"] == "none" and "relu" in report["certificate"]["why"]
    model, stock, x = loaded(out), loaded(source), torch.randn(5, 64)
    ffn = next(m for n, m in stock.named_modules() if n.endswith("0.mlp"))
    name = next(n for n, _ in ffn.named_children() if "act" in n)
    before = ffn(x[None]).detach()
    setattr(ffn, name, torch.nn.ReLU())
    with torch.no_grad():
        made, wanted = next(blocks(model))(x[None]), ffn(x[None])
    assert apart(made, wanted) <= 1e-5 and apart(made, before) > 1e-3
    with pytest.raises(MoetoolError, match=r"relu|no gated FFN"):
        moetool.materialize(str(out), str(tmp_path / "native"))
    with pytest.raises(UsageError, match="part of the FFN"):
        moetool.upcycle(str(source), str(tmp_path / "no"), site="attention", activation="relu")
