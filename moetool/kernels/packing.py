"""Codes of a few bits -> words, and back: 32 codes of b bits in b words of 32, little end first,
along the input dimension (compressed-tensors' pack-quantized).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def words(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [rows, columns] below 2^bits -> int32 [rows, ceil(columns * bits / 32)]."""
    rows, columns = codes.shape
    padded = F.pad(codes, (0, -columns % 32)).reshape(rows, -1, 32)
    made = torch.zeros((*padded.shape[:2], bits), dtype=torch.int64, device=codes.device)
    for at in range(32):
        word, shift = divmod(at * bits, 32)
        value = padded[:, :, at].long()
        made[:, :, word] |= (value << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            made[:, :, word + 1] |= value >> (32 - shift)
    signed = torch.where(made >= 1 << 31, made - (1 << 32), made)
    return signed.to(torch.int32).reshape(rows, -1)[:, : -(-columns * bits // 32)].contiguous()


def codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `words`: uint8 [rows, columns]."""
    rows = len(packed)
    if 8 % bits == 0:
        return _of_bytes(packed.contiguous().view(torch.uint8), bits).reshape(rows, -1)[:, :columns]
    full = F.pad(packed, (0, -packed.shape[1] % bits)).reshape(rows, -1, bits).long() & 0xFFFFFFFF
    made = torch.empty((rows, full.shape[1], 32), dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for at in range(32):
        word, shift = divmod(at * bits, 32)
        value = full[:, :, word] >> shift
        if shift + bits > 32:
            value = value | (full[:, :, word + 1] << (32 - shift))
        made[:, :, at] = (value & mask).to(torch.uint8)
    return made.reshape(rows, -1)[:, :columns]


def _of_bytes(lying: Tensor, bits: int) -> Tensor:
    """Codes that lie whole in bytes [...] -> [..., 8 / bits]."""
    made = lying.new_empty((*lying.shape, 8 // bits))
    for at in range(8 // bits):
        torch.bitwise_right_shift(lying, at * bits, out=made[..., at])
    return made if bits == 8 else made.bitwise_and_((1 << bits) - 1)
