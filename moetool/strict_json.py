"""JSON that every reader takes: UTF-8 in and out, no NaN, no half of a character.

Python's own reader also takes UTF-16, byte order marks and numbers of any length, and its writer
writes `NaN`; transformers, safetensors and other languages stop there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetool.data import JsonMapping, JsonObject
from moetool.errors import MoetoolError
from moetool.reading import SMALL, read


def parse(data: bytes, path: str | Path, what: str, *, file_names: bool = False) -> JsonObject:
    """The object that the bytes hold; MoetoolError that names `path` for anything else.
    `file_names`: names of files stand in it, which may be no text (see `text`).
    """
    try:
        found = json.loads(data.decode("utf-8"))
        if b"\\u" in data and not file_names:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (
        ValueError,
        RecursionError,
    ) as problem:  # ValueError: not JSON, not UTF-8, endless digits
        raise MoetoolError(
            f"the {what} is not JSON ({str(problem)[:200]})",
            file=path,
            hint="restore it from the original model",
        ) from None
    if not isinstance(found, dict):
        raise MoetoolError(
            f"the {what} is not a JSON object",
            file=path,
            expected="an object",
            found=type(found).__name__,
            hint="restore it from the original model",
        )
    return found


def load(path: Path, what: str, *, limit: int = SMALL, file_names: bool = False) -> JsonObject:
    """The object in a file; MoetoolError when it is not there, no regular file, or no object."""
    try:
        data = read(path, what, limit=limit)
    except FileNotFoundError:
        raise MoetoolError(
            f"the {what} is missing",
            file=path,
            hint="it belongs beside the weights: copy it from the original model",
        ) from None
    except OSError as problem:
        raise MoetoolError(
            f"cannot read the {what}: {problem.strerror}",
            file=path,
            hint="check the path and its permissions",
        ) from None
    return parse(data, path, what, file_names=file_names)


Shape = JsonMapping  # name -> type, or tuple of types, or the shape of an object


def check_shape(found: JsonMapping, shape: Shape, path: str | Path, what: str) -> None:
    """MoetoolError naming the first part of a file of ours that is missing, or not what moetool
    writes there.
    """
    if not isinstance(found, Mapping):
        found = {}
    for name, kind in shape.items():
        value = found.get(name)
        inner = isinstance(kind, Mapping)
        wanted = Mapping if inner else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is int):
            raise MoetoolError(
                f"the {what} is damaged: {name} is not what moetool writes there",
                file=path,
                found="nothing" if value is None else str(value)[:80],
                hint="make it again",
            )
        if inner:
            check_shape(value, kind, path, f"{what}, {name},")


def text(data: Any, *, indent: int | None = None, ascii: bool = False) -> str:
    """JSON of anything moetool says: what is not finite is null, and bytes of a file name that are
    no text are escaped, so that the result can be encoded as UTF-8.
    """
    try:
        made = json.dumps(data, indent=indent, ensure_ascii=ascii, allow_nan=False)
    except ValueError:
        made = json.dumps(finite(data), indent=indent, ensure_ascii=ascii, allow_nan=False)
    return made.encode("utf-8", "backslashreplace").decode()


def finite(data: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return data


def lined(data: JsonMapping, last: str) -> str:
    """An object whose value under `last` is long: one part of that value on a line, so that it can
    be read, compared and edited.
    """
    head = text({k: v for k, v in data.items() if k != last}, ascii=True)[1:-1]
    parts = ",\n  ".join(f"{json.dumps(k)}: {text(v, ascii=True)}" for k, v in data[last].items())
    return f"{{{head},\n {json.dumps(last)}: {{\n  {parts}\n }}\n}}"
