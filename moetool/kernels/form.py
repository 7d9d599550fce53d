"""One expert's matrices between the way a file holds them and one canonical form.

Canonical: gate_up [2*width, hidden] with gate above up, down [hidden, width], gate_up_bias
[2*width], down_bias [hidden].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tensor = torch.Tensor


def canonical(
    parts: Mapping[str, Tensor], *, transposed: bool = False, interleaved: bool = False
) -> dict[str, Tensor]:
    """Parts as stored (`gate`, `up`, `down`, or `gate_up`, `down`, and biases) -> canonical.

    transposed: matrices are used as x @ W (Llama 4, gpt-oss). interleaved: gate and up alternate
    (gpt-oss, Inkling).
    """
    if "gate" in parts:
        return {"gate_up": torch.cat([parts["gate"], parts["up"]]), "down": parts["down"]}
    made = {
        "gate_up": _turn(parts["gate_up"], transposed),
        "down": _turn(parts["down"], transposed),
    }
    made |= {r: parts[r] for r in ("gate_up_bias", "down_bias") if r in parts}
    if interleaved:
        for role in {"gate_up", "gate_up_bias"} & set(made):
            made[role] = torch.cat([made[role][0::2], made[role][1::2]])
    return made


def stored(
    made: Mapping[str, Tensor],
    roles: list[str],
    *,
    transposed: bool = False,
    interleaved: bool = False,
) -> list[Tensor]:
    """Canonical -> the tensors of these roles as the file holds them: the inverse of `canonical`."""
    out = []
    for role in roles:
        if role in ("gate", "up"):
            out.append(made["gate_up"].chunk(2)[role == "up"])
            continue
        value = made[role]
        if interleaved and role.startswith("gate_up"):
            value = torch.stack(list(value.chunk(2)), 1).reshape(value.shape)
        out.append(_turn(value, transposed) if value.dim() == 2 else value)
    return out


def _turn(matrix: Tensor, transposed: bool) -> Tensor:
    return matrix.T if transposed else matrix
