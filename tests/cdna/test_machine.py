"""What the emulator refuses: small programs, each right until one thing is missing."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cdna.asm import Kernel, Resources, parse, parse_instruction
from tests.cdna.formats import Array
from tests.cdna.launch import Argument, Buffer, Run, launch
from tests.cdna.memory import (
    Fault,
    NotWaited,
    OutOfBounds,
    Race,
    ReadOnly,
    Uninitialised,
)

ARGUMENTS = """s_load_dwordx4 s[0:3], s[0:1], 0x0
v_lshlrev_b32_e32 v1, 2, v0
s_waitcnt lgkmcnt(0)
"""
COPY = f"""{ARGUMENTS}global_load_dword v2, v1, s[0:1]
s_waitcnt vmcnt(0)
global_store_dword v1, v2, s[2:3]
"""
# Wave w writes its lanes to LDS and reads those of the other wave.
EXCHANGE = f"""{ARGUMENTS}v_xor_b32_e32 v3, 0x100, v1
ds_write_b32 v1, v0
s_waitcnt lgkmcnt(0)
s_barrier
ds_read_b32 v2, v3
s_waitcnt lgkmcnt(0)
global_store_dword v1, v2, s[2:3]
"""
# The same twice, into the same LDS.
AGAIN = """s_barrier
v_add_u32_e32 v4, 1, v2
ds_write_b32 v1, v4
s_waitcnt lgkmcnt(0)
s_barrier
ds_read_b32 v2, v3
s_waitcnt lgkmcnt(0)
global_store_dword v1, v2, s[2:3]
"""
# A wave loads 64 words straight to LDS, at 256 bytes for itself, and both read what wave 0 loaded.
DIRECT = f"""{ARGUMENTS}v_readfirstlane_b32 s4, v1
s_mov_b32 m0, s4
v_and_b32_e32 v3, 0xfc, v1
global_load_lds_dword v1, s[0:1]
s_waitcnt vmcnt(0)
s_barrier
ds_read_b32 v2, v3
s_waitcnt lgkmcnt(0)
global_store_dword v1, v2, s[2:3]
"""


def program(text: str) -> Kernel:
    instructions = [parse_instruction(line) for line in f"{text}s_endpgm".split("\n")]
    descriptor = {
        "user_sgpr_kernarg_segment_ptr": 1,
        "user_sgpr_count": 2,
        "system_sgpr_workgroup_id_x": 1,
        "accum_offset": 8,
    }
    return Kernel("program", instructions, {}, descriptor, Resources(8, 0, 16, 0, 0, 0, 0, 16))


def run(text: str, waves: int = 2, lds: int = 512) -> tuple[Array, Run]:
    source = np.arange(64 * waves, dtype=np.uint32) + 1000
    target = np.zeros(64 * waves, np.uint32)
    arguments: list[Argument] = [
        Buffer(source.view(np.uint8)),
        Buffer(target.view(np.uint8), writable=True),
    ]
    done = launch(program(text), "gfx950", (1,), arguments, waves=waves, lds=lds)
    return target, done


def without(text: str, line: str, which: int = 0) -> str:
    """The program with one of its lines, the `which`-th of that text, taken out."""
    lines = text.split("\n")
    at = [k for k, candidate in enumerate(lines) if candidate == line][which]
    return "\n".join([*lines[:at], *lines[at + 1 :]])


def test_the_programs_are_right() -> None:
    lanes = np.arange(128)
    assert (run(COPY)[0] == lanes + 1000).all()
    assert (run(EXCHANGE)[0] == (lanes ^ 64)).all()
    assert (run(EXCHANGE + AGAIN)[0] == lanes + 1).all()
    assert (run(DIRECT)[0] == lanes % 64 + 1000).all()


@pytest.mark.parametrize(
    ("text", "line", "which"),
    [
        pytest.param(COPY, "s_waitcnt vmcnt(0)", 0, id="a-global-load"),
        pytest.param(COPY, "s_waitcnt lgkmcnt(0)", 0, id="a-scalar-load"),
        pytest.param(EXCHANGE, "s_waitcnt lgkmcnt(0)", 2, id="an-LDS-read"),
        pytest.param(DIRECT, "s_waitcnt vmcnt(0)", 0, id="a-load-to-LDS"),
    ],
)
def test_a_result_is_not_there_before_its_wait(text: str, line: str, which: int) -> None:
    with pytest.raises((NotWaited, Race)):
        run(without(text, line, which))


def test_a_result_is_not_overwritten_while_it_is_on_its_way() -> None:
    with pytest.raises(NotWaited, match="v2 waits for a load"):
        run(COPY.replace("s_waitcnt vmcnt(0)", "v_mov_b32_e32 v2, 0"))


def test_a_wait_for_all_but_n_retires_the_oldest() -> None:
    two = "global_load_dword v2, v1, s[0:1]\nglobal_load_dword v3, v1, s[0:1]\n"
    text = COPY.replace("global_load_dword v2, v1, s[0:1]\n", two)
    assert (run(text.replace("vmcnt(0)", "vmcnt(1)"))[0] == np.arange(128) + 1000).all()
    with pytest.raises(NotWaited):
        run(text.replace("vmcnt(0)", "vmcnt(1)").replace("v1, v2, s", "v1, v3, s"))


def test_scalar_loads_come_in_any_order() -> None:
    with pytest.raises(NotWaited, match="s0 waits for a load"):
        run(COPY.replace("lgkmcnt(0)", "lgkmcnt(1)"))


@pytest.mark.parametrize(
    ("text", "line", "which"),
    [
        pytest.param(EXCHANGE, "s_barrier", 0, id="write-then-read"),
        pytest.param(EXCHANGE, "s_waitcnt lgkmcnt(0)", 1, id="write-in-flight-at-the-barrier"),
        pytest.param(EXCHANGE + AGAIN, "s_barrier", 1, id="read-then-write"),
        pytest.param(DIRECT, "s_barrier", 0, id="load-to-LDS-then-read"),
    ],
)
def test_waves_share_lds_only_across_a_wait_and_a_barrier(text: str, line: str, which: int) -> None:
    with pytest.raises(Race, match=r"wave \d (wrote|read) LDS"):
        run(without(text, line, which))


def test_a_read_in_flight_at_a_barrier_is_not_ordered_by_it() -> None:
    late = without(EXCHANGE + AGAIN, "s_waitcnt lgkmcnt(0)", 2)
    late = without(late, "global_store_dword v1, v2, s[2:3]", 0)
    late = late.replace("v_add_u32_e32 v4, 1, v2", "v_mov_b32_e32 v4, v0")
    with pytest.raises(Race, match="read LDS"):
        run(late)


def test_lds_that_a_load_is_on_its_way_to_cannot_be_read() -> None:
    with pytest.raises(NotWaited, match="direct-to-LDS"):
        run(without(DIRECT, "s_waitcnt vmcnt(0)"), waves=1)


def test_a_load_to_lds_does_not_overtake_reads_of_its_own_wave() -> None:
    again = "ds_read_b32 v2, v3\nglobal_load_lds_dword v1, s[0:1]\n"
    with pytest.raises(NotWaited, match="direct-to-LDS"):
        run(DIRECT.replace("ds_read_b32 v2, v3\n", again), waves=1)


def test_lds_that_nobody_wrote_is_poison() -> None:
    target, done = run(without(EXCHANGE, "ds_write_b32 v1, v0"))
    assert done.unwritten == 128 and np.isnan(target.view(np.float32)).all()


def test_lds_beyond_its_allocation() -> None:
    with pytest.raises(OutOfBounds, match="LDS"):
        run(EXCHANGE, lds=508)
    with pytest.raises(Fault, match="do not fit"):
        run(EXCHANGE, lds=(160 << 10) + 4)


def test_memory_beyond_a_buffer() -> None:
    with pytest.raises(OutOfBounds, match=r"global_load_dword v2, v1, s\[0:1\] offset:4"):
        run(COPY.replace("v1, s[0:1]", "v1, s[0:1] offset:4"))
    with pytest.raises(OutOfBounds, match="nothing is mapped"):
        run(COPY.replace("v1, s[0:1]", "v1, s[0:1] offset:-4"))


def test_a_buffer_that_is_only_read() -> None:
    with pytest.raises(ReadOnly):
        run(COPY.replace("v1, v2, s[2:3]", "v1, v2, s[0:1]"))


def test_registers_that_nobody_wrote() -> None:
    with pytest.raises(Uninitialised, match="v5 was never written"):
        run(COPY.replace("v1, v2, s[2:3]", "v1, v5, s[2:3]"))
    with pytest.raises(Uninitialised, match="s9 was never written"):
        run(COPY.replace("s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(0)\ns_not_b32 s8, s9"))


def test_a_copy_of_what_nobody_wrote_is_as_undefined() -> None:
    copied = COPY.replace("s_waitcnt vmcnt(0)", "s_waitcnt vmcnt(0)\nv_mov_b32_e32 v2, v5")
    with pytest.raises(Uninitialised, match="v2 was never written"):
        run(copied)


def test_registers_that_the_descriptor_does_not_allocate() -> None:
    with pytest.raises(Fault, match="beyond what the kernel's descriptor allocates"):
        run(f"v_mov_b32_e32 v9, 0\n{COPY}")


def test_waves_that_wait_for_nobody() -> None:
    """The second wave leaves before a barrier: hardware counts it as arrived, so no deadlock."""
    text = "v_cmp_gt_u32_e32 vcc, 64, v0\ns_cbranch_vccz leave\ns_barrier\n"
    kernel = parse(f"k:\n{text}leave:\ns_endpgm\n.amdhsa_user_sgpr_count 0\n", "k")
    launch(kernel, "gfx942", (1,), [], waves=2, lds=0)
