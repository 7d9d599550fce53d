"""Where work can run: said before it begins, not after hours of it."""

from __future__ import annotations

import re
import textwrap
from importlib.util import find_spec

from moetool.errors import UsageError


def check_device(name: str) -> None:
    """Refuse a device that torch does not know or this machine does not have; `cpu` asks nobody."""
    if name == "cpu":
        return
    import torch

    try:
        wanted = torch.device(name)
        torch.empty(1, device=wanted).cpu()  # the meta device holds nothing to give back
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = shorten(str(problem).partition("\n")[0])
        raise UsageError(
            f"--device {name} cannot be used: {reason}",
            expected=", ".join(_there()),
            found=name,
            hint="leave out --device",
        ) from None


def shorten(message: str, room: int = 160) -> str:
    """Its first sentence; up to the last word that fits where that is longer than `room`."""
    first = re.split(r"(?<=[.!?])\s", message.strip(), maxsplit=1)[0]
    return textwrap.shorten(first, room, placeholder=" ...")


def _there() -> list[str]:
    """The devices of this machine."""
    import torch

    return ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]


def check_engine(name: str) -> None:
    """Refuse a cluster without its library."""
    if name == "ray" and find_spec("ray") is None:
        raise UsageError(
            "--engine ray needs Ray",
            hint="pip install 'moetool[ray]', or leave out --engine",
        )
