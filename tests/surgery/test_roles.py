"""Which matrices can be quantized: held against transformers' own modules, for every family."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moetool.archs import model as built
from moetool.surgery import roles
from moetool.surgery.checkpoint import Checkpoint
from moetool.surgery.layout import DATA, Layout, families
from moetool.surgery.roles import ROLES, Roles
from moetool.surgery.spec import Stored, size_of
from moetool.surgery.text_model import text_model

INDEX = json.loads((DATA / "index.json").read_text())
CLASSES = INDEX["moe"] | INDEX["dense"]
FEW = ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "gpt2", "llava", "t5", "jamba"]
INSIDE = ("experts", "shared", "dense", "attn")


def expected(name: str) -> Iterator[tuple[str, tuple[int, ...], bool, Any]]:
    """Each tensor on disk, whether it is the weight of an nn.Linear inside the text model's layers,
    and the config, of a family as transformers builds it.
    """
    import transformers
    from torch import nn

    from moetool.archs import generate

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    family = generate.Family.of(name, CLASSES[name])
    config = generate.Probe.of(family).config
    model = built.meta(family.cls, config)
    stack = Layout.load(name).stack
    modules = dict(model.named_modules())

    def linear(parameter: str) -> bool:
        module, _, leaf = parameter.rpartition(".")
        inside = stack is None or module.startswith(f"{stack}.")
        return inside and leaf == "weight" and isinstance(modules[module], nn.Linear)

    parameters = [n for n, _ in model.named_parameters()]
    for wanted in (True, False):
        part = [n for n in parameters if linear(n) is wanted]
        for tensor, shape in built.disk(model, part).items():
            yield tensor, shape, wanted, config


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow])
        for kind in ("moe", "dense")
        for n in families()[kind]
    ],
)
def test_every_linear_has_one_role_and_nothing_else_has(name: str) -> None:
    """No linear of a layer is left out without a word; tables, convolutions, norms and parameters
    of other modules have no role. Experts are held in test_every_expert_is_one.
    """
    layout = Layout.load(name)
    linears = 0
    for tensor, shape, linear, config in expected(name):
        data = config.to_dict()
        stored = Stored(tensor, "BF16", shape, "f", 0, size_of("BF16", shape))
        at = text_model(data)
        role = roles._role(at, stored, data)
        matched = at.match(tensor)
        if matched and str(matched.slot.role).startswith("expert."):
            continue
        if not linear or layout.overlay.linears == "transposed":
            assert role not in INSIDE, (tensor, shape, role)
            continue
        linears += 1
        if layout.stack is not None:
            assert role in ROLES or "router" in role, (tensor, shape, role)
    assert linears or layout.overlay.linears or layout.stack is None


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "gpt_oss"])
def test_every_expert_is_one(family: str, models: Callable[..., Path]) -> None:
    """All weights of routed experts, and nothing else, are `experts`; the rest is named."""
    source = Checkpoint.open(models(family))
    found = Roles.of(source)
    experts = [m for m in found.matrices if m.role == "experts"]
    mixture_of = json.loads((models(family) / "config.json").read_text())
    count = next(mixture_of[k] for k in ("num_local_experts", "num_experts", "n_routed_experts")
                 if k in mixture_of)  # fmt: skip
    weights = sum(m.piece.count for m in experts)
    lying = sum(
        t.elements
        for n, t in source.tensors.items()
        if ".experts." in n or "block_sparse_moe.input_linear" in n or "output_linear" in n
        if not n.endswith("bias")
    )
    assert weights == lying > 0
    if all(m.expert is not None for m in experts):
        assert {m.expert for m in experts} == set(range(count))
    names = {m.name for m in found.matrices} | set(found.without)
    places = {m.piece.name for m in found.matrices}
    for name, tensor in source.tensors.items():
        if len(tensor.shape) >= 2:
            assert name in names or name in places, name
    assert not any("router" in m.name or ".gate.weight" in m.name for m in found.matrices)


def test_what_is_left_is_named_with_its_reason(models: Callable[..., Path]) -> None:
    reasons = Roles.of(Checkpoint.open(models("qwen2_moe"))).without
    assert reasons["model.layers.1.mlp.shared_expert_gate.weight"].startswith("routers")
    assert reasons["model.layers.1.mlp.gate.weight"].startswith("routers")
    vision = Roles.of(Checkpoint.open(models("llava"))).without
    assert all("outside the text model" in why for n, why in vision.items() if "vision" in n)
    assert any("vision" in n for n in vision)
    tied = Roles.of(Checkpoint.open(models("llama", tie_word_embeddings=True)))
    assert {m.role for m in tied.matrices} == {"embed", "attn", "dense"}
    untied = Roles.of(Checkpoint.open(models("llama", tie_word_embeddings=False)))
    assert {m.role for m in untied.matrices} == {"embed", "attn", "dense", "lm_head"}


def test_kinds_of_layers_that_the_data_does_not_name(models: Callable[..., Path]) -> None:
    """llama4's dense layers are in no default config."""
    found = {m.name: m for m in Roles.of(Checkpoint.open(models("llama4_text"))).matrices}
    for layer in (0, 2):
        one = found[f"model.layers.{layer}.feed_forward.up_proj.weight"]
        assert (one.role, one.layer) == ("dense", layer)


def test_further_tokens_are_named(models: Callable[..., Path], tmp_path: Path) -> None:
    """Layers behind the last one (MTP) get no format, experts of theirs included."""
    from safetensors.torch import load_file, save_file

    source = models("deepseek_v3")
    tensors = load_file(source / "model.safetensors")
    more = {n.replace("layers.3.", "layers.4."): t for n, t in tensors.items() if "layers.3." in n}
    save_file({**tensors, **{n: t.clone() for n, t in more.items()}}, tmp_path / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    found = Roles.of(Checkpoint.open(tmp_path))
    assert not any(".layers.4." in m.name for m in found.matrices)
    matrices = [n for n, t in more.items() if t.dim() == 2]
    assert matrices and set(matrices) <= set(found.without)
    assert all("MTP" in found.without[n] for n in matrices if "gate.weight" not in n)
