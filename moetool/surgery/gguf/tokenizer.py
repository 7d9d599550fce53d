"""A tokenizer as fields of a GGUF file: tokens, their kinds, merges or scores, special tokens, chat
template.

llama.cpp cuts text before merging by rules that it knows by name (`tokenizer.ggml.pre`). The name
is chosen by the regular expressions in tokenizer.json (archs/gguf_pre.json); where they are none
that it knows, `default` is written and said. Facts: the `gguf` package and llama.cpp's conversion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from moetool import strict_json
from moetool.data import JsonObject
from moetool.errors import MoetoolError
from moetool.surgery.containers.wire import HeaderField
from moetool.surgery.layout import DATA

NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = range(1, 7)
_HEAD = "tokenizer.ggml."
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
_SPACE = "▁"
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0


@dataclass(frozen=True)
class Tokenizer:
    """The fields, and what has to be said of them."""

    fields: tuple[HeaderField, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Files:
    """What a folder holds of a tokenizer."""

    tokenizer: JsonObject
    config: JsonObject = field(default_factory=dict)
    template: str = ""

    @classmethod
    def read(cls, folder: str | Path) -> Files | None:
        """None where there is no tokenizer.json."""
        at = Path(folder)
        if not (at / "tokenizer.json").is_file():
            return None
        config = _json(at / "tokenizer_config.json")
        template = config.get("chat_template")
        if (at / "chat_template.jinja").is_file():
            template = (at / "chat_template.jinja").read_text(encoding="utf-8")
        elif not isinstance(template, str):
            template = _json(at / "chat_template.json").get("chat_template")
        found = strict_json.load(at / "tokenizer.json", "tokenizer")
        return cls(found, config, template if isinstance(template, str) else "")


def _json(path: Path) -> JsonObject:
    return strict_json.load(path, "tokenizer config") if path.is_file() else {}


def read(folder: str | Path, count: int, config: JsonObject) -> Tokenizer:
    """The tokenizer of a model with `count` tokens. MoetoolError for one that does not fit it, or
    of a kind that llama.cpp has no word for.
    """
    files = Files.read(folder)
    if files is None:
        said = (
            "there is no tokenizer.json: the file holds no tokenizer, and llama.cpp takes numbers"
        )
        return Tokenizer((HeaderField(_HEAD + "model", "str", "none"),), (said,))
    model = files.tokenizer.get("model") or {}
    if model.get("type") not in ("BPE", None) or not isinstance(model.get("vocab"), dict):
        raise _wrong(folder, "a BPE with its vocabulary", str(model.get("type")))
    tokens = _tokens(files, count, folder)
    if model.get("byte_fallback"):
        made = _sentencepiece(model, tokens)
        warnings: tuple[str, ...] = ()
    else:
        pre = pre_tokenizer(files.tokenizer)
        said = (
            "llama.cpp knows no pre-tokenizer with the rules of this tokenizer.json: `default` was "
            "written, and it may cut text otherwise than transformers"
        )
        warnings = () if pre else (said,)
        made = _bytes(model, tokens, pre or "default")
    return Tokenizer((*made, *_special(files, config, count)), warnings)


@dataclass(frozen=True)
class Token:
    """A token as the file says it, and its kind."""

    text: str
    kind: int


def _tokens(files: Files, count: int, folder: str | Path) -> list[Token]:
    """A token for every row of the embedding; rows that no token has are unused."""
    vocab = files.tokenizer["model"]["vocab"]
    found = {number: Token(text, NORMAL) for text, number in vocab.items()}
    for added in files.tokenizer.get("added_tokens") or ():
        special = added.get("special") or _looks_special(added["content"])
        text = added["content"] if special else added["content"].replace(_SPACE, " ")
        found[added["id"]] = Token(text, CONTROL if special else DEFINED)
    if found and max(found) >= count:
        raise _wrong(folder, f"at most {count} tokens, as the config says", max(found) + 1)
    return [found.get(i, Token(f"[PAD{i}]", UNUSED)) for i in range(count)]


def _looks_special(text: str) -> bool:
    """Added tokens that control something though their tokenizer does not say so."""
    return (
        text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _bytes(model: JsonObject, tokens: Sequence[Token], pre: str) -> list[HeaderField]:
    """A BPE over bytes, as GPT-2's."""
    made = [HeaderField(_HEAD + "model", "str", "gpt2"), HeaderField(_HEAD + "pre", "str", pre)]
    made += _listed(tokens)
    merges = [_merge(m) for m in model.get("merges") or ()]
    return made + ([HeaderField(_HEAD + "merges", "[str]", merges)] if merges else [])


def _merge(pair: str | Sequence[str]) -> str:
    """Two parts with a space between them; a space inside a part as bytes are written here."""
    if isinstance(pair, str):
        return pair
    return " ".join(part.replace(" ", chr(ord(" ") + 256)) for part in pair)


def _sentencepiece(model: JsonObject, tokens: Sequence[Token]) -> list[HeaderField]:
    """A BPE over characters with bytes for what is unknown, as Llama 2's. Its merges go by score:
    what is merged first scores highest.
    """
    rank: dict[str, int] = {}
    for number, pair in enumerate(model.get("merges") or ()):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        rank.setdefault("".join(parts), number)
    unknown = model.get("unk_token")
    kinds, scores = [], []
    for token in tokens:
        kind, score = token.kind, -float(rank.get(token.text, -1) + 1)
        if kind in (CONTROL, DEFINED):
            score = _ADDED_SCORE
        elif kind == UNUSED:
            score = _UNUSED_SCORE
        elif _is_byte(token.text):
            kind = BYTE
        kinds.append(UNKNOWN if token.text == unknown else kind)
        scores.append(score)
    texts = [t.text for t in tokens]
    return [
        HeaderField(_HEAD + "model", "str", "llama"),
        HeaderField(_HEAD + "pre", "str", "default"),
        HeaderField(_HEAD + "tokens", "[str]", texts),
        HeaderField(_HEAD + "scores", "[f32]", scores),
        HeaderField(_HEAD + "token_type", "[i32]", kinds),
    ]


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _listed(tokens: Sequence[Token]) -> list[HeaderField]:
    return [
        HeaderField(_HEAD + "tokens", "[str]", [t.text for t in tokens]),
        HeaderField(_HEAD + "token_type", "[i32]", [t.kind for t in tokens]),
    ]


def _special(files: Files, config: JsonObject, count: int) -> Iterator[HeaderField]:
    """Which tokens begin, end and fill, whether they are added, and how a chat is written."""
    numbers = {t["content"]: t["id"] for t in files.tokenizer.get("added_tokens") or ()}
    numbers = files.tokenizer["model"]["vocab"] | numbers
    for word, key in _SPECIAL.items():
        number = numbers.get(_text(files, word), config.get(f"{word}_token_id"))
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and 0 <= number < count:
            yield HeaderField(f"{_HEAD}{key}_token_id", "u32", number)
    for word, adds in _added(files).items():
        yield HeaderField(f"{_HEAD}add_{word}_token", "bool", adds)
    if files.tokenizer["model"].get("byte_fallback"):
        yield HeaderField(_HEAD + "add_space_prefix", "bool", _prefixes(files.tokenizer))
    if files.template:
        yield HeaderField("tokenizer.chat_template", "str", files.template)


def _added(files: Files) -> dict[str, bool]:
    """Whether a text gets a first and a last token: as the template of the post-processor says,
    where there is one, else the config's flags. Always said: llama.cpp has its own opinion.
    """
    said = {w: files.config.get(f"add_{w}_token") is True for w in ("bos", "eos")}
    post = files.tokenizer.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing":
            ends = [e.get("SpecialToken", {}).get("id") for e in step.get("single") or [{}]]
            said["bos"] = ends[0] is not None and ends[0] == _text(files, "bos")
            said["eos"] = ends[-1] is not None and ends[-1] == _text(files, "eos")
    return said


def _text(files: Files, word: str) -> str | None:
    """The bos, eos, ... token as the config says it."""
    said = files.config.get(f"{word}_token")
    return said.get("content") if isinstance(said, dict) else said


def _prefixes(tokenizer: JsonObject) -> bool:
    """Whether a text gets a space before its first word."""
    steps = tokenizer.get("normalizer") or {}
    names = [s.get("type") for s in steps.get("normalizers", [steps])]
    before = tokenizer.get("pre_tokenizer") or {}
    return "Prepend" in names or before.get("prepend_scheme") in ("first", "always")


# --- how text is cut before merging


def pre_tokenizer(tokenizer: JsonObject) -> str:
    """llama.cpp's name for the rules of this tokenizer; empty where it knows none with those."""
    rules = list(_rules(tokenizer.get("pre_tokenizer") or {}))
    ignores = bool(tokenizer["model"].get("ignore_merges"))
    normal = tokenizer.get("normalizer") or {}
    if normal.get("type") not in (None, "NFC") and normal.get("normalizers") != []:
        return ""
    fitting = [p for p in _known() if p["rules"] == rules and p["ignore_merges"] in (None, ignores)]
    return str(fitting[0]["name"]) if fitting else ""


def _rules(step: JsonObject) -> Iterator[str]:
    """The steps of a pre-tokenizer in order: regular expressions, and words for the others."""
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _rules(inner)
    elif kind == "Split":
        pattern = step["pattern"]
        yield str(pattern.get("Regex", pattern.get("String")))
    elif kind == "Digits":
        yield "digits" if step.get("individual_digits") else "numbers"
    elif kind == "ByteLevel":
        if step.get("add_prefix_space"):
            yield "prefix space"
        if step.get("use_regex", True):
            yield "gpt-2"
    elif kind is not None:
        yield str(kind)


@lru_cache(maxsize=1)
def _known() -> list[Any]:
    found: list[Any] = json.loads((DATA / "gguf_pre.json").read_text(encoding="utf-8"))
    return found


def _wrong(folder: str | Path, expected: str, found: object) -> MoetoolError:
    return MoetoolError(
        "the tokenizer is none that a GGUF file can hold",
        file=Path(folder) / "tokenizer.json",
        expected=expected,
        found=found,
        hint="restore tokenizer.json from the original model, or move it away: the file is then "
        "written without a tokenizer",
    )
