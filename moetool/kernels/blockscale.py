"""Matrices stored in few bits with a scale for each block: fp8 as DeepSeek-V3 ships it, mxfp4 as
gpt-oss does.

fp8: E4M3 values, one scale for each block of rows x columns (128 x 128; blocks at the edges are
smaller), W = value * scale (DeepSeek-V3, inference/kernel.py, weight_dequant).

mxfp4: E2M1 values, two a byte, the lower nibble first, 32 neighbours along the input dimension
share a power of two stored as its exponent + 127 (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
FP8_LARGEST = 448.0
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Halfway between neighbours of FP4; at a tie the even code is taken, as IEEE rounding does.
_TO_LOWER, _TO_UPPER = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)
GROUP = 32
_STEP = 1 << 15  # groups worked on at once


def decode_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [..., rows, columns] in E4M3, scale [..., blocks down, blocks across] -> float32."""
    made, factors = floats(weight), powers(scale) if scale.dtype == torch.uint8 else scale.float()
    for number in range(factors.shape[-2]):
        rows = slice(number * block[0], (number + 1) * block[0])
        across = factors[..., number : number + 1, :].repeat_interleave(block[1], -1)
        made[..., rows, :].mul_(across[..., : made.shape[-1]])
    return made


def encode_rows(matrix: Tensor, scale: torch.dtype) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> (E4M3, scales [rows, 1]): a row's largest value at 448, computed in the
    matrix's own dtype as compressed-tensors does; a row of zeros gets eps of the scale's dtype.
    """
    factors = (matrix.abs().amax(-1, keepdim=True) / FP8_LARGEST).to(scale)
    least = torch.finfo(scale).eps
    factors = torch.where(factors == 0, torch.full_like(factors, least), factors)
    scaled = matrix / factors.to(matrix.dtype)
    return scaled.clamp_(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn), factors


def encode_fp8(
    matrix: Tensor, block: tuple[int, int], scale: torch.dtype, *, power: bool = False
) -> tuple[Tensor, Tensor]:
    """[..., rows, columns] -> (E4M3, scales in the dtype `scale`), each block's largest value at
    448. `power`: scales are rounded up to powers of two; uint8 holds the exponent + 127.
    """
    rows, columns = matrix.shape[-2:]
    down, across = -(-rows // block[0]), -(-columns // block[1])
    factors = matrix.new_empty((*matrix.shape[:-2], down, across), dtype=torch.float32)
    made = torch.empty_like(matrix, dtype=torch.float8_e4m3fn)
    for i in range(down):
        strip = matrix[..., i * block[0] : (i + 1) * block[0], :].float()
        most = strip.abs().amax(-2)
        most = torch.nn.functional.pad(most, (0, across * block[1] - columns))
        most = most.reshape(*most.shape[:-1], across, block[1]).amax(-1)
        chosen = torch.where(most > 0, most / FP8_LARGEST, torch.ones_like(most))
        if power:
            chosen = chosen.log2().ceil().exp2()
        stored = chosen if scale == torch.uint8 else chosen.to(scale).float()
        factors[..., i, :] = stored
        wide = stored.repeat_interleave(block[1], -1)[..., None, :columns]
        scaled = (strip / wide).clamp(-FP8_LARGEST, FP8_LARGEST)
        made[..., i * block[0] : (i + 1) * block[0], :] = scaled.to(torch.float8_e4m3fn)
    if scale == torch.uint8:
        return made, (factors.log2() + 127).to(torch.uint8)
    return made, factors.to(scale)


def floats(weight: Tensor) -> Tensor:
    """E4M3 -> float32, by a table: a cast of torch's takes three times as long on a CPU."""
    if weight.device.type != "cpu":
        return weight.float()
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    made: Tensor = table.index_select(0, weight.reshape(-1).view(torch.uint8).int())
    return made.reshape(weight.shape)


def powers(exponents: Tensor) -> Tensor:
    """uint8 exponents + 127 -> the powers of two in float32, exactly."""
    bits = exponents.int()
    return torch.where(bits == 0, torch.full_like(bits, 0x00400000), bits * (1 << 23)).view(
        torch.float32
    )


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [..., rows, groups, 16] and scales [..., rows, groups], uint8 -> float32 [..., 32 *
    groups, rows]: as gpt-oss uses it, x @ W.
    """
    values = torch.tensor((*FP4, *(-v for v in FP4)), device=blocks.device)
    codes = torch.arange(256, device=blocks.device)
    pairs = torch.stack([values[codes & 15], values[codes >> 4]], -1)
    bytes_of, factors = blocks.reshape(-1, GROUP // 2), powers(scales).reshape(-1, 1)
    made = torch.empty(len(bytes_of), GROUP, device=blocks.device)
    for start in range(0, len(made), _STEP):
        some = slice(start, start + _STEP)
        torch.mul(pairs[bytes_of[some].int()].flatten(-2), factors[some], out=made[some])
    return made.reshape(*scales.shape[:-1], -1).transpose(-1, -2)


def encode_mxfp4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[..., columns, rows] -> (blocks, scales): the inverse of `decode_mxfp4`.

    The scale is the standard's (largest exponent of the group, less 2), or the next power of two
    where that leaves a smaller squared error, since the standard's clips values above 6.
    """
    x = matrix.transpose(-1, -2)
    shape = (*x.shape[:-1], x.shape[-1] // GROUP)
    groups = x.float().reshape(-1, GROUP)
    blocks = torch.empty(len(groups), GROUP // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(len(groups), dtype=torch.uint8, device=x.device)
    for start in range(0, len(groups), _STEP):
        some = slice(start, start + _STEP)
        blocks[some], scales[some] = _packed(groups[some].contiguous())
    return blocks.reshape(*shape, GROUP // 2), scales.reshape(shape)


def _packed(x: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes [groups, 16], exponents + 127 [groups]) of float32 [groups, 32]."""
    least = _exponent(x.abs().amax(-1)) - 2
    codes, error = _nearest(x, least)
    other, wider = _nearest(x, least + 1)
    better = wider < error * (1 - 1e-9)  # sums of another order must not choose otherwise
    codes = torch.where(better[..., None], other, codes)
    exponents = (least + better.int()).clamp(-127, 127)
    return codes[..., 0::2] | codes[..., 1::2] * 16, (exponents + 127).to(torch.uint8)


def _exponent(largest: Tensor) -> Tensor:
    """The exponent of a positive float32, read off its bits; that of the smallest scale for 0."""
    return (largest.view(torch.int32) // (1 << 23) - 127).clamp(min=-125)


def _nearest(x: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """(codes in uint8, squared error of each group) of x rounded to FP4 times 2^exponent."""
    scale = powers((exponent.clamp(-127, 127) + 127).to(torch.uint8))[..., None]
    size = (x / scale).abs()
    codes = torch.zeros_like(size, dtype=torch.uint8)
    for middle in _TO_LOWER:
        codes += size > middle
    for middle in _TO_UPPER:
        codes += size >= middle
    made = torch.tensor(FP4, device=x.device)[codes.int()]
    error = ((made - size) * scale).double().square().sum(-1)
    return codes | (((x < 0) & (codes > 0)).to(torch.uint8) << 3), error
