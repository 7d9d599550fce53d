"""The JSON of a safetensors header, read as strictly as the safetensors library reads it.

What is accepted here, `safetensors.safe_open` opens as well (tests/surgery/test_headers.py holds
the two against each other); a name that stands twice, which it takes, is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from moetool.data import JsonObject
from moetool.errors import MoetoolError

METADATA = "__metadata__"
_FIELDS = (b'"dtype"', b'"shape"', b'"data_offsets"')
_MARK = METADATA.encode()
_ODD = re.compile(rb"\\|-0")  # an escape may hide a key, and -0 is no whole number elsewhere
LARGEST = 2**64  # a size_t


def table(body: bytes, path: Path) -> JsonObject:
    """{tensor name: entry} of a header, metadata left out; MoetoolError that names `path`."""
    try:
        text = body.decode("utf-8")
        found = json.loads(text, parse_constant=_no_constant)
        if not isinstance(found, dict):
            raise MoetoolError(
                "the header is not a JSON object", file=path, hint="download the file again"
            )
        marked = METADATA in found
        if (
            _ODD.search(body)
            or body.count(_MARK) != marked
            or any(body.count(field) != len(found) - marked for field in _FIELDS)
        ):
            found = _slowly(text, path)
    except (ValueError, RecursionError) as problem:
        raise MoetoolError(
            f"the header is not JSON ({str(problem)[:200]})",
            file=path,
            hint="this is no safetensors file, or it is damaged: download it again",
        ) from None
    _check_metadata(found.pop(METADATA, None), path)
    return dict(found)


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _no_minus_zero(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no whole number")
    return int(digits)


def _slowly(text: str, path: Path) -> JsonObject:
    def unique(pairs: list[tuple[str, Any]]) -> JsonObject:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [k for k, _ in pairs]
            raise MoetoolError(
                "a name stands twice in the header",
                file=path,
                tensor=next(n for n in names if names.count(n) > 1),
                hint="the file was written by a broken tool: save it again",
            )
        for name in made:
            name.encode()  # half of a surrogate pair: UnicodeEncodeError is a ValueError
        return made

    found: JsonObject = json.loads(
        text, object_pairs_hook=unique, parse_constant=_no_constant, parse_int=_no_minus_zero
    )
    return found


def _check_metadata(metadata: Any, path: Path) -> None:
    """Texts by name, or nothing."""
    honest = metadata is None or (
        isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    )
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        honest = False
    if not honest:
        raise MoetoolError(
            "the header's metadata is malformed",
            file=path,
            expected="texts by name",
            found=json.dumps(metadata)[:80],
            hint="the safetensors library refuses the file too: save it again",
        )


def byte_count(shape: tuple[int, ...], bits: int) -> int | None:
    """Bytes of a tensor, counted as the library counts: None where a product does not fit 64 bits
    (a later 0 does not help), or a tensor of 4- or 6-bit numbers would end inside a byte.
    """
    count = 1
    for size in shape:
        count *= size
        if count >= LARGEST:
            return None
    if count * bits >= LARGEST or count * bits % 8:
        return None
    return count * bits // 8
