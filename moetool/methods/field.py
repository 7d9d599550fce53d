"""One option as everybody sees it: its name, its help, and how its value is read from text, YAML or
Python. Nothing heavy is imported here: `--help` reads this file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from moetool.errors import UsageError, did_you_mean
from moetool.units import parse_bytes, parse_number, parse_share

WHAT, TEXT, GATE, RUN, FINE = "What", "Text", "Quality gate", "How it runs", "Fine points"
Value = str | int | float | bool | tuple[str, ...] | None


@dataclass(frozen=True)
class Field:
    """One option as everybody sees it. `type` is bool, int, float, str, or tuple for an option that
    is repeated; `unit` says how text is read: "share" (0.25 or 25%), "bytes" (2GB), "whole" (one
    text, commas and all, of an option that is repeated), "files" (the same where a file of that
    name is there, otherwise cut at commas) or "".
    `of` names the ways it belongs to (empty: the whole verb).
    """

    name: str
    type: type
    default: Value
    help: str
    panel: str = FINE
    choices: tuple[str, ...] = ()
    unit: str = ""
    metavar: str = ""
    minimum: float | None = None
    maximum: float | None = None
    of: tuple[str, ...] = ()
    was: str = ""  # an older name, still taken
    old: tuple[tuple[str, str], ...] = ()  # words of before that are still taken, and today's
    needs: tuple[str, ...] = ()  # it does something only beside one of these (`engine=ray`)

    @property
    def spelled(self) -> str:
        """As on the command line and in recipes, without the dashes: `total-sparsity`."""
        return self.name.rstrip("_").replace("_", "-")

    def read(self, value: object) -> Value:
        """The value as the field holds it, from text, YAML or Python; UsageError that names it."""
        if value in (None, "") and self.default is None:
            return None
        if self.type is tuple:
            return self._several(value)
        if self.type is bool:
            return self._flag(value)
        if self.type is str:
            return self._word(value)
        return self._number(value)

    def _several(self, value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            whole = self.unit == "whole" or (self.unit == "files" and _is_there(value))
            return self._known((value,) if whole else tuple(filter(None, value.split(","))))
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return self._known(tuple(value))
        raise self._refused(value, "text, or a list of texts")

    def _known(self, texts: tuple[str, ...]) -> tuple[str, ...]:
        """The texts of a list, each one of the choices where there are some."""
        for text in texts:
            if self.choices and text not in self.choices:
                raise self._unknown(text)
        return texts

    def _flag(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise self._refused(value, "true or false")

    def _word(self, value: object) -> str:
        if isinstance(value, list):
            value = ",".join(map(str, value))
        old = dict(self.old)
        if str(value).lower() in old:
            return old[str(value).lower()]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise self._refused(value, "text")
        text = str(value)
        if self.choices and text not in self.choices:
            raise self._unknown(text)
        return text

    def _unknown(self, text: str) -> UsageError:
        return UsageError(
            f"--{self.spelled} {text!r} is not known",
            expected=", ".join(self.choices),
            hint=did_you_mean(text, self.choices),
        )

    def _number(self, value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._refused(value, "a number")
        try:
            made = self._parsed(value)
        except (ValueError, OverflowError):
            kind = "a whole number" if self.type is int else "a finite number"
            raise self._refused(value, kind) from None
        except UsageError as problem:
            said = f"--{self.spelled}: {problem.message}"
            raise UsageError(said, hint=problem.hint, **problem.where) from None
        if self.minimum is not None and not made >= self.minimum:
            raise UsageError(
                f"--{self.spelled} is too small",
                expected=f"at least {self.minimum:g}",
                found=value,
                hint="leave it out",
            )
        if self.maximum is not None and not made <= self.maximum:
            raise UsageError(
                f"--{self.spelled} is too large",
                expected=f"at most {self.maximum:,.0f}",
                found=value,
                hint="leave it out",
            )
        return made

    def _parsed(self, value: str | int | float) -> int | float:
        if self.unit == "bytes":
            return parse_bytes(value if isinstance(value, str) else int(value))
        if self.unit == "share":
            return parse_share(value)
        if self.type is int and isinstance(value, float):
            if not value.is_integer():
                raise ValueError(value)
            return int(value)
        return parse_number(value) if self.type is float else int(value)

    def _refused(self, value: object, expected: str) -> UsageError:
        return UsageError(
            f"--{self.spelled}={value!r} cannot be", expected=expected, hint=self.help
        )


def _is_there(text: str) -> bool:
    """Whether FILE, or FILE:SHARE, names a file."""
    return os.path.exists(text) or os.path.exists(text.rpartition(":")[0])
