"""moetool: turn dense checkpoints into mixtures of experts, make those smaller, and measure what
it did to them.

The command line's verbs as functions (`help(moetool.prune)` lists its options), and
`moetool.load`, a model to run; nothing heavy is imported until one is called. Errors are
`moetool.MoetoolError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moetool.data import JsonObject
from moetool.errors import MoetoolError, Stopped, UsageError, VerificationFailed
from moetool.modeling import plugin

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from moetool.forward.load import load
    from moetool.surgery.plan import Plan
    from moetool.verbs import inspect

    Verb = Callable[..., JsonObject]
    add_tokens: Verb
    convert_layout: Verb
    dequantize: Verb
    eval: Verb
    extend: Verb
    materialize: Verb
    merge: Verb
    plan: Callable[..., Plan]
    profile: Verb
    prune: Verb
    quantize: Verb
    run: Verb
    upcycle: Verb
    verify: Verb

__all__ = [
    "MoetoolError",
    "Stopped",
    "UsageError",
    "VerificationFailed",
    "add_tokens",
    "convert_layout",
    "dequantize",
    "eval",
    "extend",
    "inspect",
    "load",
    "materialize",
    "merge",
    "plan",
    "profile",
    "prune",
    "quantize",
    "run",
    "upcycle",
    "verify",
]
__version__ = "0.2.0"
plugin.announce()  # transformers loads models with groups of experts from here on


def __getattr__(name: str) -> Any:
    """A verb is made when somebody asks for it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moetool.verbs import make

    made = globals()[name] = make(name)
    return made


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
