"""MFMA: D = A·B + C over the lanes of a wave. EXEC is ignored.

A lane holds row (of A) or column (of B) lane % M; lane group g = lane // M holds the K elements
g·k .. g·k + k - 1 of it, where k = K·M / 64, packed from the low bits up. Result register r of a
lane holds column lane % M and row 4·G·(r // 4) + 4·g + r % 4, where G = 64 / M is the number of
groups.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.cdna.asm import Instruction, Operand, Unknown
from tests.cdna.formats import FP8, Array, f32, from_bf16, from_f16, u32
from tests.cdna.machine import Machine, Step, constant

NAME = re.compile(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_(bf16|f16|f32|(?:fp8|bf8)_(?:fp8|bf8))(?:_1k)?")
BITS = {"bf16": 16, "f16": 16, "f32": 32, "fp8": 8, "bf8": 8}


def build(m: Machine, i: Instruction) -> Step | None:
    match = NAME.fullmatch(i.mnemonic)
    if match is None:
        return None
    M, N, K = map(int, match.groups()[:3])
    formats = match[4].split("_") * 2
    groups = 64 // M
    if M != N or M not in (16, 32) or K % groups or i.modifiers:
        raise Unknown(f"the emulator does not know `{i.text}`")
    target, a, b, c = i.operands
    A, B = _matrix(m, a, formats[0], M, K), _matrix(m, b, formats[1], N, K)
    count = M * N // 64
    assert target.reg is not None
    first = m.row(target.reg)
    result = m.V[first : first + count]
    C = _accumulator(m, c, count)

    def step() -> None:
        product = A() @ B().transpose(0, 2, 1)  # [waves, M, N]
        rows = product.reshape(m.count, M // (4 * groups), groups, 4, N)
        D = rows.transpose(1, 3, 0, 2, 4).reshape(count, m.count, 64) + C()
        result[:, m.at] = D.view(u32)

    return step


def _matrix(m: Machine, o: Operand, fmt: str, M: int, K: int) -> Callable[[], Array]:
    """[waves, M, K] floats of a source."""
    assert o.reg is not None
    first, bits, groups = m.row(o.reg), BITS[fmt], 64 // M
    source, per = m.V[first : first + o.count], 32 // BITS[fmt]
    if o.count * per * groups != K:
        raise Unknown(f"{o.text} does not hold {K // groups} elements of {fmt}")
    decode: Callable[[Array], Array] = {
        "bf16": from_bf16,
        "f16": from_f16,
        "f32": lambda x: x.view(f32),
        "fp8": lambda x: FP8[m.arch]["fp8"][x],
        "bf8": lambda x: FP8[m.arch]["bf8"][x],
    }[fmt]
    cut = u32((1 << bits) - 1) if bits < 32 else u32(0xFFFFFFFF)

    def read() -> Array:
        words = source[:, m.at]  # [registers, waves, 64]
        values = np.stack([decode(words >> u32(bits * k) & cut) for k in range(per)], 1)
        values = values.reshape(o.count * per, m.count, groups, M)
        return values.transpose(1, 3, 2, 0).reshape(m.count, M, K)

    return read


def _accumulator(m: Machine, o: Operand, count: int) -> Callable[[], Array]:
    if o.reg is None:
        value = np.full(1, constant(o) & 0xFFFFFFFF, u32).view(f32)
        return lambda: value
    first = m.row(o.reg)
    source = m.V[first : first + count]
    return lambda: source[:, m.at].view(f32)
