"""What values a matrix can hold that is stored in few bits: levels times a scale. No torch here, so
that forms can say it while planning.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

# The largest scale that a dtype holds; E8M0 is a power of two, stored as its exponent + 127.
LARGEST = {"BF16": 3.3895313892515355e38, "F16": 65504.0, "F32": 3.4028234663852886e38}
LARGEST["E8M0"] = 2.0**127
# The least magnitude whose inverse is finite.
LEAST = {"BF16": 2.0**-126, "F16": 2.0**-24, "F32": 2.0**-126, "E8M0": 2.0**-127}
E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The quantiles of a normal distribution of QLoRA (arXiv 2305.14314), as bitsandbytes has them.
_NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # in the order of bitsandbytes' codes


@dataclass(frozen=True)
class Grid:
    """Levels and what scales them: `group` neighbours along the input share a scale, 0 is a row.

    levels: ascending, in units of the scale; both zeros of a format of floats may be among them
    (-0.0, then 0.0). full: what the largest magnitude of a group is divided by to get its scale
    when nothing is searched. scale: dtype of stored scales, BF16, F16, F32 or E8M0. signed: whether
    a scale may be negative. table: as bitsandbytes rounds, in float32, multiplying by the inverse
    of the largest magnitude, and to the lower level where two are as near; others divide and take
    the even one.
    """

    levels: tuple[float, ...]
    group: int
    full: float
    scale: str
    signed: bool = True
    table: bool = False

    @cached_property
    def integers(self) -> bool:
        """Whether the levels are neighbouring integers."""
        first = self.levels[0]
        return first == int(first) and all(v == first + i for i, v in enumerate(self.levels))

    def shared(self, width: int) -> int:
        """Neighbours of a row of `width` weights that share a scale."""
        return self.group or width

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """Float32 numbers between neighbouring levels: a value up to the i-th is of level i or
        lower, one above it is higher.
        """
        return tuple(self._threshold(i) for i in range(len(self.levels) - 1))

    def _threshold(self, i: int) -> float:
        low, high = self.levels[i : i + 2]
        middle = _float32((low + high) / 2)
        if self.table:
            return middle
        # What is as near to both goes to the level an even number of steps from its zero.
        steps = sum(low < v <= 0 if low < 0 else 0 <= v < low for v in set(self.levels))
        both = low == 0 and high == 0
        return _below(middle) if both or steps % 2 else middle


def integers(bits: int, group: int, scale: str, *, signed: bool = True) -> Grid:
    """The symmetric integers of `bits` bits: -2^(bits-1) .. 2^(bits-1) - 1."""
    half = 2 ** (bits - 1)
    return Grid(tuple(map(float, range(-half, half))), group, half - 0.5, scale, signed)


def e4m3(group: int, scale: str) -> Grid:
    """float8_e4m3fn, both zeros: level i is byte 254 - i below the zero at 127, else i - 127."""
    sizes = [_e4m3(byte) for byte in range(127)]
    return Grid(_mirrored(sizes), group, 448.0, scale)


def e2m1(group: int, scale: str) -> Grid:
    """FP4 of OCP, both zeros: level i is code 15 - i below the zero at 8, else code i - 8."""
    return Grid(E2M1, group, 6.0, scale, signed=scale != "E8M0")


def nf4(group: int, scale: str = "F32") -> Grid:
    """The table of bitsandbytes' nf4; level i is code i."""
    return Grid(_NF4, group, 1.0, scale, table=True)


def fp4(group: int, scale: str = "F32") -> Grid:
    """The table of bitsandbytes' fp4, both zeros; level i is code `FP4_CODES[i]`."""
    sizes = [_float32(v / 12.0) for v in _FP4]
    values = [*sizes, *(-v for v in sizes)]
    return Grid(tuple(values[code] for code in FP4_CODES), group, 1.0, scale, table=True)


# bitsandbytes takes code 0 for values up to zero and 8, a second zero, for those above.
FP4_CODES = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


def _mirrored(sizes: Iterable[float]) -> tuple[float, ...]:
    above = list(sizes)
    return (*(-v for v in reversed(above)), *above)


def _e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3, byte & 7
    if not exponent:
        return float(mantissa * 2.0**-9)
    return float((8 + mantissa) * 2.0 ** (exponent - 10))


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _below(value: float) -> float:
    """The float32 before this one."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    before = bits - 1 if value > 0 else (bits & 0x7FFFFFFF | -0x80000000) + 1
    return float(struct.unpack("<f", struct.pack("<i", before))[0])
