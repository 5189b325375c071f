"""Which registers an instruction reads and writes, and which counter tells when it is done."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.cdna.asm import EXEC, M0, VCC, Instruction

NO_RESULT = re.compile(
    r"s_(cmpk?|bitcmp[01]|c?branch|waitcnt|barrier|nop|endpgm|setprio|sleep|sethalt|setreg|dcache|icache)"
    r"|v_nop|ds_(write|(add|sub|max|min|and|or|xor)_(?!rtn))|(global|flat|scratch|buffer)_store"
    r"|buffer_(wbl2|inv)"
)
TWO_RESULTS = re.compile(
    r"v_(add|sub|subrev|addc|subb|subbrev)_co_|v_mad_(u64_u32|i64_i32)|v_div_scale"
)
SWAPS = re.compile(r"v_swap|v_permlane(16|32)_swap")
# The old destination is a source.
ACCUMULATES = re.compile(r"v_(fmac|mac|dot2c)_|s_(addk|mulk)_|s_cmovk?_")
# Bits of the old destination stay, but the rest does not depend on them.
MERGES = re.compile(
    r"v_writelane|v_cvt_(scalef32_)?pk_(fp8|bf8)_|v_fma_mix(lo|hi)|(load|read)_.*d16|s_bitset"
)
MULTIPLY_ADD64 = ("v_mad_u64_u32", "v_mad_i64_i32")
ATOMIC = re.compile(r"(global|flat|buffer)_atomic_")


@dataclass(frozen=True, slots=True)
class Effects:
    reads: frozenset[int]
    writes: frozenset[int]
    merges: frozenset[int]  # destinations of which a part stays as it was
    unneeded: frozenset[int]  # sources that compilers leave undefined where only low bits matter
    counter: str  # "vm" vector memory, "lds", "smem", or "" where the result is there at once
    to_lds: bool  # a load that writes LDS instead of registers


def effects(i: Instruction) -> Effects:
    name, operands = i.mnemonic, i.operands
    to_lds = "_load_lds_" in name or (name.startswith("buffer_load") and "lds" in i.modifiers)
    atomic = bool(ATOMIC.match(name))
    if (atomic and "sc0" not in i.modifiers) or NO_RESULT.match(name) or to_lds or not operands:
        results = 0
    else:
        results = 2 if TWO_RESULTS.match(name) else 1
    kept = atomic and results and name.startswith("buffer")  # one operand is data and result
    reads = {r for o in operands[0 if kept else results :] for r in o.regs}
    if name.startswith("v_pk_") and name.endswith(("_f32", "_b32")):
        reads = _packed_reads(i)
    writes = {r for o in operands[:results] for r in o.regs}
    if SWAPS.match(name):
        reads = writes = {r for o in operands[:2] for r in o.regs}
    if ACCUMULATES.match(name):
        reads |= writes
    merged = bool(MERGES.search(name)) or _writes_part(i)
    if name.startswith("v_div_fmas") or "vccz" in name or "vccnz" in name:
        reads |= {VCC, VCC + 1}
    if "saveexec" in name or name.startswith("v_cmpx"):
        writes |= {EXEC, EXEC + 1}
    if to_lds:
        reads.add(M0)
    return Effects(
        frozenset(reads),
        frozenset(writes),
        frozenset(writes) if merged else frozenset(),
        frozenset({operands[4].regs[1]} if name in MULTIPLY_ADD64 and operands[4].regs else ()),
        _counter(name),
        to_lds,
    )


def _packed_reads(i: Instruction) -> set[int]:
    """Of a pair only the halves that are selected."""
    sources = i.operands[1:]
    low = i.numbers("op_sel", (0,) * len(sources))
    high = i.numbers("op_sel_hi", (1,) * len(sources))
    if i.mnemonic == "v_pk_mov_b32":
        return {o.regs[low[k]] for k, o in enumerate(sources) if o.regs}
    chosen = [(o, half) for k, o in enumerate(sources) if o.regs for half in (low[k], high[k])]
    return {o.regs[min(half, o.count - 1)] for o, half in chosen}


def _writes_part(i: Instruction) -> bool:
    """A vector result that keeps some bits or lanes even where EXEC is all ones."""
    if i.encoding == "sdwa":
        return i.modifiers.get("dst_unused") == "UNUSED_PRESERVE"
    if "dpp" in i.encoding:
        partial = any(i.number(mask, 0xF) != 0xF for mask in ("row_mask", "bank_mask"))
        return partial or "bound_ctrl" not in i.modifiers
    op_sel = i.numbers("op_sel", ())
    packed = i.mnemonic.startswith(("v_pk_", "v_mfma"))
    return not packed and len(op_sel) == len(i.operands) > 1 and op_sel[-1] == 1


def _counter(name: str) -> str:
    if name.startswith(("buffer_wb", "buffer_inv")):
        return ""
    if name.startswith(("global_", "buffer_", "flat_", "scratch_")):
        return "vm"
    if name.startswith("ds_"):
        return "lds"
    return "smem" if name.startswith(("s_load_", "s_buffer_load_")) else ""
