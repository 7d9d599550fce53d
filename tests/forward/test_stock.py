"""No code of a checkpoint runs, no question is asked at the keyboard, no pickle is opened: whatever
config, tokenizer and template say.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moetool
from moetool import MoetoolError
from moetool.evaluate import logits
from moetool.forward import chat, stock
from moetool.forward.documents import Document
from moetool.surgery.checkpoint import Checkpoint

PACKAGE = Path(moetool.__file__).parent
DEMO = PACKAGE / "demo" / "model"
RAN = "RAN"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


class Eager(io.StringIO):
    """A keyboard at which somebody says yes to everything."""

    def readline(self, *_: Any) -> str:
        raise AssertionError("somebody read standard input")

    read = readline


@pytest.fixture(autouse=True)
def keyboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Eager("y\n" * 9))


def change(path: Path, **fields: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | fields))


def bait(folder: Path, name: str) -> None:
    """Code that leaves a mark where it runs."""
    mark = folder.parent / RAN
    classes = "".join(f"\nclass {c}: pass\n" for c in ("Tok", "Conf", "Model"))
    (folder / name).write_text(f"open({str(mark)!r}, 'w').close()\n{classes}")


class Mine:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def spoiled(model: Path, how: str) -> None:
    """Everything that loads code of a checkpoint in transformers, one way at a time."""
    bait(model, "evil.py")
    config, words = model / "config.json", model / "tokenizer_config.json"
    if how == "tokenizer":
        change(words, auto_map={"AutoTokenizer": ["evil.Tok", "evil.Tok"]})
    elif how == "tokenizer without class":
        change(words, auto_map={"AutoTokenizer": ["evil.Tok", None]}, tokenizer_class="Tok")
        change(config, model_type="mine", auto_map={"AutoConfig": "evil.Conf"})
    elif how == "tokenizer of the Hub":
        change(words, auto_map={"AutoTokenizer": ["org/name--evil.Tok", None]})
    elif how == "config":
        change(config, auto_map={"AutoConfig": "evil.Conf", "AutoModelForCausalLM": "evil.Model"})
    elif how == "kernel":
        change(config, attn_implementation="org/kernel", _attn_implementation="org/kernel")
    elif how == "kernel within":
        change(config, text_config={"attn_implementation": "org/kernel"})
    elif how == "experts kernel":
        change(config, experts_implementation="org/kernel")
    elif how == "pickle beside":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Mine(str(model.parent / RAN))))
    elif how == "adapter":
        change(model / "adapter_config.json", base_model_name_or_path="org/name", peft_type="LORA")
        (model / "adapter_model.bin").write_bytes(pickle.dumps(Mine(str(model.parent / RAN))))
    elif how == "class":
        change(config, architectures=["pipeline"])
    elif how == "class path":
        change(config, architectures=["evil.Model"])


# What cannot be read without that code, or is no config of the family; all else works without.
REFUSED = {
    "tokenizer without class": ["tokenizer", "config"],
    "kernel within": ["config", "model"],
}
WAYS = [
    "tokenizer",
    "tokenizer without class",
    "tokenizer of the Hub",
    "config",
    "kernel",
    "kernel within",
    "experts kernel",
    "pickle beside",
    "adapter",
    "class",
    "class path",
]


@pytest.mark.parametrize("how", WAYS)
def test_no_code_of_a_checkpoint_runs(how: str, model: Path) -> None:
    spoiled(model, how)
    checkpoint = Checkpoint.open(model)
    refused = []
    try:
        stock.tokenizer(model)("words")
    except MoetoolError as problem:
        assert problem.hint
        refused.append("tokenizer")
    try:
        stock.empty_model(checkpoint.config, checkpoint.folder)
    except MoetoolError as problem:
        assert problem.hint
        refused.append("config")
    try:
        loaded = logits.load(checkpoint)
        assert loaded.config._attn_implementation in ("eager", "sdpa")
    except MoetoolError as problem:
        assert problem.hint
        refused.append("model")
    assert not (model.parent / RAN).exists()
    assert refused == REFUSED.get(how, [])


def test_code_runs_when_the_caller_says_so(model: Path) -> None:
    """The way in is there, and it is the flag alone."""
    spoiled(model, "tokenizer without class")
    with pytest.raises(MoetoolError):
        stock.tokenizer(model, trust_remote_code=True)
    assert (model.parent / RAN).exists()


TOKENIZER = """
from transformers import PreTrainedTokenizerFast
open({!r}, "w").close()
class Tok(PreTrainedTokenizerFast): pass
"""


def needing_code(folder: Path) -> None:
    """A model whose tokenizer is a class of its own, which works."""
    mark = str(folder.parent / RAN)
    (folder / "own.py").write_text(TOKENIZER.format(mark))
    words = folder / "tokenizer_config.json"
    change(words, tokenizer_class="Tok", auto_map={"AutoTokenizer": [None, "own.Tok"]})


def test_trust_remote_code_is_the_only_way_in(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a yes at the keyboard; and what ran is said, in what is measured and in the record."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    moetool.upcycle(str(model), str(tmp_path / "moe"))
    needing_code(tmp_path / "moe")
    (tmp_path / "t.txt").write_text("some words\n" * 9)
    text, out = [str(tmp_path / "t.txt")], tmp_path / "out"
    moe, given = str(tmp_path / "moe"), {"trust_remote_code": True}
    plain = moetool.eval(moe, text=text)
    assert not (tmp_path / RAN).exists()
    assert not any("--trust-remote-code" in note for note in plain["notes"])
    said = (
        moetool.eval(moe, text=text, **given)["notes"],
        moetool.profile(moe, str(tmp_path / "stats"), calibrate=text, **given)["warnings"],
        moetool.prune(moe, str(out), calibrate=text, **given)["warnings"],
    )
    assert (tmp_path / RAN).exists()
    for found in said:
        assert any("--trust-remote-code" in line and moe in line for line in found), found
    assert json.loads((out / "moetool.json").read_text())["options"]["trust_remote_code"] is True
    assert not (out / "own.py").exists()


@pytest.mark.parametrize("command", ["eval", "profile"])
def test_text_does_not_run_code_either(command: str, model: Path, tmp_path: Path) -> None:
    from moetool.cli import main

    spoiled(model, "tokenizer without class")
    (tmp_path / "text.txt").write_text("some words\n" * 9)
    text = ["--text", str(tmp_path / "text.txt")]
    if command == "profile":
        text = [str(tmp_path / "stats"), "--calibrate", str(tmp_path / "text.txt")]
    assert main([command, str(model), *text]) in (1, 2)
    assert not (tmp_path / RAN).exists()


def test_verify_never_opens_a_pickle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    moetool.upcycle(str(model), str(tmp_path / "out"))
    spoiled(model, "pickle beside")
    change(model / "pytorch_model.bin.index.json", weight_map={"lm_head.weight": "evil.bin"})
    found = moetool.verify(str(tmp_path / "out"), against=[str(model)])
    assert found["logits"]["same_greedy"] and not (tmp_path / RAN).exists()


TOKENIZERS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "an object": b"{}",
    "null": b"null",
    "version only": b'{"version":"1.0"}',
    "another model": b'{"version":"1.0","model":{"type":"Nonsense"}}',
    "not UTF-8": b"\xff\xfe\x00",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "merges of nothing": b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[["a","b"]]}}',
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_tokenizers_get_a_sentence(name: str, model: Path) -> None:
    (model / "tokenizer.json").write_bytes(TOKENIZERS[name])
    with pytest.raises(MoetoolError, match="no tokenizer that loads") as caught:
        stock.tokenizer(model)
    assert caught.value.hint


CONFIGS: dict[str, dict[str, Any]] = {
    "class a text": {"architectures": "LlamaForCausalLM"},
    "class a number": {"architectures": [7]},
    "class a module": {"architectures": ["utils"]},
    "no class": {"architectures": []},
    "unknown family": {"model_type": "mine"},
    "family a list": {"model_type": ["llama"]},
    "heads a text": {"num_attention_heads": "four"},
    "no heads": {"num_attention_heads": 0},
    "activation": {"hidden_act": "rm -rf"},
    "rope": {"rope_parameters": {"rope_type": "nonsense", "rope_theta": "x"}},
    "hidden null": {"hidden_size": None},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_broken_configs_get_a_sentence(name: str, model: Path) -> None:
    raw = json.loads((model / "config.json").read_text()) | CONFIGS[name]
    try:
        stock.empty_model(raw, str(model))
    except MoetoolError as problem:
        assert problem.hint and "transformers" in problem.message
    else:
        assert name.startswith(("class", "no class"))


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
WIDE = "{% set x = 'x' * 9999999999 %}{{ x }}"
TEMPLATES = {
    "too large": ("{# " + "x" * chat.LARGEST + " #}", "too large"),
    "endless": (ENDLESS, "does not end"),
    "wide": (WIDE, "too much memory"),
    "raises": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "no syntax": ("{% for %}", "refuses this chat"),
    "divides": ("{{ 1 / 0 }}", "refuses this chat"),
    "escapes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses this chat"),
    "recurses": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses this chat"),
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chat, "SECONDS", 3.0)
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < 9


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_bounded(name: str, model: Path) -> None:
    tokenizer = stock.tokenizer(model)
    tokenizer.chat_template, word = TEMPLATES[name]
    document = Document("a.jsonl:7", messages=({"role": "user", "content": "hello"},))
    with pytest.raises(MoetoolError, match=word) as caught:
        chat.ids(tokenizer, document)
    assert caught.value.where["file"] == "a.jsonl:7" and caught.value.hint
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert chat.ids(tokenizer, document) == tokenizer("hello")["input_ids"]


# Only forward/stock.py asks transformers for something that could bring code of a checkpoint; the
# generator of layouts builds classes from configs of its own.
LOADS = ("from_pretrained", "from_config", "_from_config", "from_dict", "load_adapter")
# load.py and loading.py call the stock class that stock.py names: code of a checkpoint has no way in.
LOADERS = {"forward/load.py", "evaluate/loading.py"}
# carrier.py is what transformers asks for a config of moetool's own type: it derives a stock class;
# derived.py is that class, whose from_pretrained looks at what was loaded.
ALLOWED = {
    "forward/stock.py",
    "archs/generate.py",
    "archs/model.py",
    "modeling/carrier.py",
    "modeling/derived.py",
    *LOADERS,
}


def calls(wanted: Callable[[ast.Call], bool]) -> set[str]:
    return {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and wanted(node)
    }


def test_one_place_asks_transformers() -> None:
    def asks(node: ast.Call) -> bool:
        return isinstance(node.func, ast.Attribute) and node.func.attr in LOADS

    assert calls(asks) <= ALLOWED and "forward/stock.py" in calls(asks)
    autos = {
        str(p.relative_to(PACKAGE))
        for p in PACKAGE.rglob("*.py")
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.Attribute | ast.Name)
        and getattr(n, "attr", getattr(n, "id", "")).startswith("Auto")
    }
    assert autos == {"forward/stock.py", "modeling/plugin.py"}  # which registers a class there


def test_every_call_says_that_code_is_not_trusted() -> None:
    """trust_remote_code at every from_pretrained, and use_safetensors where weights are read."""
    tree = ast.parse((PACKAGE / "forward" / "stock.py").read_text())
    found = [
        {k.arg for k in n.keywords}
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and n.func.attr == "from_pretrained"
    ]
    assert len(found) == 3
    assert all({"trust_remote_code", "local_files_only"} <= names for names in found)
    assert sum("use_safetensors" in names for names in found) == 1


def test_nobody_unpickles_evaluates_or_asks() -> None:
    def name(node: ast.Call) -> str:
        return ast.unparse(node.func)

    bad = {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "input", "np.load"}
    assert not calls(lambda n: name(n) in bad and "weights_only=True" not in ast.unparse(n))
    readers = calls(lambda n: "stdin" in name(n) and "isatty" not in name(n))
    assert readers == {"forward/text.py"} | (readers & {"forward/batches.py"})
