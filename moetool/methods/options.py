"""Options, written once.

A method's options are a frozen dataclass: groups of fields that several methods share (below) and
fields of its own, each made by `option`. The command line, `methods show`, the check of recipes,
the signatures of the Python verbs and the JSON Schema are all made from them. Nothing heavy is
imported here: `--help` reads this file.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar, cast

from moetool.errors import UsageError, did_you_mean
from moetool.forward import drawn
from moetool.methods.field import FINE, GATE, RUN, TEXT, WHAT, Field, Value
from moetool.surgery.reform import FORMS

if TYPE_CHECKING:
    from typing import Any

CLIENTS = ("transformers5", "transformers4", "vllm", "llama.cpp", "mlx")
CHECKED = ("transformers5",)  # those that can be asked on this machine
PANELS = (WHAT, TEXT, GATE, RUN, FINE)

Chosen = TypeVar("Chosen")


def option(
    default: Any,
    text: str | Callable[[], str],
    panel: str = FINE,
    *,
    choices: Sequence[str] | Callable[[], Iterable[str]] = (),
    **more: Any,
) -> Any:
    """A field with its help; `text` and `choices` may be functions, so that a registry is asked
    when somebody looks. `more`: unit, metavar, minimum, maximum, was, old, needs of
    `Field`.
    """
    return field(
        default=default, metadata={"help": text, "panel": panel, "choices": choices, **more}
    )


def same(group: type, name: str, **change: Any) -> Any:
    """A field of another group, under the same words; `change`: its default, help, panel, ..."""
    found = next(f for f in dataclasses.fields(group) if f.name == name)
    default = change.pop("default", found.default)
    return field(default=default, metadata={**found.metadata, **change})


def fields(cls: type, of: tuple[str, ...] = ()) -> tuple[Field, ...]:
    """The options of a dataclass, in the order of its fields."""
    return _fields(cast("Hashable", cls), of)


@lru_cache(maxsize=64)
def _fields(group: Hashable, of: tuple[str, ...]) -> tuple[Field, ...]:
    cls = cast("type", group)
    hints = typing.get_type_hints(cls)
    return tuple(_field(f, hints[f.name], of) for f in dataclasses.fields(cls) if f.metadata)


def _field(made: dataclasses.Field[Any], hint: object, of: tuple[str, ...]) -> Field:
    more = dict(made.metadata)
    choices, text = more.pop("choices"), more.pop("help")
    return Field(
        name=made.name,
        type=_plain(hint),
        default=cast("Value", made.default),
        help=text() if callable(text) else text,
        choices=tuple(choices() if callable(choices) else choices),
        of=of,
        **more,
    )


def _plain(hint: object) -> type:
    """bool, int, float, str or tuple, of an annotation like `float | None` or `tuple[str, ...]`."""
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return str
    found = typing.get_origin(hint) or hint
    if found not in (bool, int, float, str, tuple):
        raise TypeError(f"an option cannot be {hint!r}")
    return cast("type", found)


def build(cls: type[Chosen], values: Mapping[str, object], what: str) -> Chosen:
    """An options dataclass from names and values of any origin; unknown names and values that do
    not fit are UsageErrors. `what` is who takes them, for the message.
    """
    made = cls(**read(fields(cls), values, what))
    check_partners(fields(cls), made)
    return made


def check_partners(known: Sequence[Field], made: object) -> None:
    """Refuse an option that was told something and does nothing without another one."""
    for one in known:
        partners = [n for n in one.needs if hasattr(made, n.partition("=")[0])]
        told = getattr(made, one.name) != one.default
        if told and partners and not any(_is_told(made, n) for n in partners):
            shown = " or ".join(f"--{n.replace('_', '-').replace('=', ' ')}" for n in partners)
            raise UsageError(
                f"--{one.spelled} does nothing without {shown}",
                expected=shown,
                found=f"--{one.spelled} alone",
                hint=f"add it, or leave out --{one.spelled}",
            )


def _is_told(made: object, partner: str) -> bool:
    name, _, value = partner.partition("=")
    found = getattr(made, name)
    return bool(found == value if value else found)


def read(known: Sequence[Field], values: Mapping[str, object], what: str) -> dict[str, Value]:
    """The values by field name, each as its field holds it; UsageError as `build` says."""
    named = {f.name.rstrip("_"): f for f in known} | {f.name: f for f in known}
    named |= {f.was: f for f in known if f.was}
    clean: dict[str, Value] = {}
    for key, given in values.items():
        found = named.get(key.replace("-", "_"))
        if found is None:
            raise UsageError(
                f"{what} has no option {key!r}", hint=did_you_mean(key, [f.spelled for f in known])
            )
        value = found.read(given)
        if clean.get(found.name, value) != value:
            raise UsageError(
                f"--{found.spelled} and its older name say different things",
                found=f"{clean[found.name]}, {value}",
                hint=f"give --{found.spelled} alone",
            )
        clean[found.name] = value
    return clean


# --- groups


@dataclass(frozen=True)
class Common:
    """What every command that writes understands."""

    seed: int = option(0, "everything random derives from it", RUN)
    jobs: int = option(0, "workers; 0: as many as cores and --memory allow", RUN, minimum=0)
    memory: int | None = option(
        None,
        "promise: refuse, or use fewer workers, rather than need more (2GB)",
        RUN,
        unit="bytes",
        metavar="SIZE",
    )
    max_shard_size: int = option(
        5_000_000_000, "largest output file", RUN, unit="bytes", metavar="SIZE", was="max_shard"
    )
    overwrite: bool = option(False, "replace OUT, and an unfinished other output in its place", RUN)
    sync: bool = option(
        True,
        "wait until the disk holds the output before it gets its name; --no-sync is faster",
        RUN,
    )
    clone: bool = option(
        True,
        "share blocks with the source and between equal tensors where the file system can (btrfs, "
        "XFS); --no-clone writes every byte",
        RUN,
    )
    strict: bool = option(False, "refuse sources with NaN or inf instead of warning", RUN)
    dry_run: bool = option(False, "say what would be written, and write nothing", RUN)
    device: str = option(
        "cpu", "where tensors are computed: cpu, cuda, cuda:1", RUN, metavar="DEVICE"
    )
    engine: str = option(
        "local", "threads on this machine, or a Ray cluster", RUN, choices=("local", "ray")
    )
    ray_address: str = option(
        "", "Ray cluster; empty starts one here", RUN, metavar="ADDRESS", needs=("engine=ray",)
    )


@dataclass(frozen=True)
class Text:
    """Text that goes through a model, and how it is cut."""

    calibrate: tuple[str, ...] = option(
        (),
        "text to calibrate on: .txt, .jsonl, .parquet, a Hub dataset, - for standard input; or "
        "no text: own (what the model writes itself) or random (token ids); repeat it",
        TEXT,
        unit="files",
        metavar="FILE[:SHARE]",
    )
    stats: str = option(
        "", "a profile made by `moetool profile`, instead of --calibrate", TEXT, metavar="DIR"
    )
    tokens: int = option(262_144, "tokens of calibration text", TEXT, minimum=1)
    seq_len: int = option(2048, "tokens of a sequence", TEXT, minimum=2)
    pack: bool = option(
        True, "join documents and cut them into whole sequences, or one sequence a document", TEXT
    )
    text_field: str = option(
        "",
        "field of .jsonl and .parquet that holds the text",
        TEXT,
        metavar="NAME",
        needs=("calibrate", "text"),
    )
    batch_tokens: int = option(4096, "tokens that go through a layer at once", TEXT, minimum=1)
    trust_remote_code: bool = option(
        False,
        "run the Python code that comes with the model, where its tokenizer needs it: it can do "
        "whatever you can, so read it first",
        TEXT,
        needs=("calibrate", "text"),
    )
    sample: int = option(
        2048, "tokens of a layer kept for methods that run all experts", TEXT, minimum=0
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """What is text of --calibrate: all but what the model writes, and random ids."""
        return tuple(spec for spec in self.calibrate if not drawn.means(spec))

    def check_one_text(self) -> None:
        """Refuse text and a profile of text at once."""
        if self.calibrate and self.stats:
            raise UsageError(
                "--calibrate and --stats exclude each other",
                hint="a profile holds what calibration would see: give one of them",
            )


@dataclass(frozen=True)
class Solving:
    """Methods that solve for weights, layer after layer."""

    propagate: bool = option(
        False, "look at each layer with the layers below it already changed", WHAT
    )
    refit: bool | None = option(
        None,
        "solve down_proj of the experts that stay again, so that each layer's output stays as "
        "near as it can; default: wherever there is text. --no-refit leaves every kept expert "
        "byte for byte",
        WHAT,
    )
    own_share: float = option(
        0.4,
        "of the tokens that --refit solves on, the share that the model writes itself and that is "
        "not from the text (random ids where the model does not fit into --memory), so that it "
        "keeps what the text does not show; 0: text alone",
        unit="share",
        metavar="SHARE",
    )
    refit_tokens: int = option(
        32_768,
        "tokens that --refit solves on; what that costs is said before the work",
        minimum=1,
    )


@dataclass(frozen=True)
class Storing:
    """In which form (a file of surgery/forms/) the matrices of an output are stored."""

    form: str = option(
        "auto",
        "how quantized matrices are stored: auto (as in SRC where they are only moved; full where "
        "anything is computed), same (as in SRC; what is computed is rounded again) or full",
        FINE,
        choices=FORMS,
    )


@dataclass(frozen=True)
class Served:
    """Where an output must work."""

    for_: tuple[str, ...] = option(
        (),
        "clients in which it must work: what one of them refuses or computes wrongly is refused "
        "before any work (without it that is only said)",
        WHAT,
        choices=("auto", *CLIENTS),
        metavar="CLIENT,...",
    )

    @property
    def named(self) -> tuple[str, ...]:
        """The clients of --for; `auto` names none."""
        return tuple(name for name in dict.fromkeys(self.for_) if name != "auto")

    @property
    def serves(self) -> tuple[str, ...]:
        """Those for which an output that does not work is refused."""
        return self.named


@dataclass(frozen=True)
class Gate:
    """How much may be lost before the command fails."""

    max_kl: float = option(
        0.0,
        "gate: exit code 4, and nothing that loads, when the KL divergence from SRC is larger "
        "(0: none)",
        GATE,
    )
    max_perplexity_increase: float | None = option(
        None, "the same for perplexity, for example 2%", GATE, unit="share", metavar="SHARE"
    )
    text: tuple[str, ...] = option(
        (),
        "held-out text for the gate and the report; default for the gate: the calibration text; "
        "repeat it",
        GATE,
        unit="files",
        metavar="FILE",
    )
    text_tokens: int = option(
        32_768,
        "tokens of --text",
        GATE,
        minimum=1,
        needs=("text", "max_kl", "max_perplexity_increase"),
    )

    @property
    def gated(self) -> bool:
        return self.max_kl > 0 or self.max_perplexity_increase is not None

    def check_gate(self) -> None:
        """Refuse a limit that nothing could keep."""
        if self.max_kl < 0:
            raise UsageError(
                "--max-kl is not negative", found=self.max_kl, hint="for example --max-kl 0.05"
            )


@dataclass(frozen=True)
class Checking:
    """How an output is run, to hold it against its source."""

    load: bool | None = option(
        None,
        "load both in stock transformers and compare logits; default: if they fit --memory",
        WHAT,
    )
    memory: int = option(
        8_000_000_000,
        "models larger than this in float32 are not loaded",
        RUN,
        unit="bytes",
        metavar="SIZE",
    )
    loader: str = option(
        "",
        "of a quantized output: load its first layers with this loader, and compare every "
        "parameter by value",
        WHAT,
        choices=("", *CHECKED),
    )
    device: str = same(Common, "device", help="where models run")


def spelled(cls: type) -> str:
    """ConvertLayout -> convert-layout."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()
