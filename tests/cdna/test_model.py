"""The timing model: its parts where the answer is known, the published times it is fitted to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import amd_model
from bench.amd_model import LAUNCH, POINTS, Shape, Tiles, _pieces, calibration, scheduled, seconds
from bench.cu import BRANCH, GPUS, Step, clocks, lds_clocks, mfma_clocks

MI300X, MI355X = GPUS["gfx942"], GPUS["gfx950"]
LANES = np.arange(64)


@pytest.mark.parametrize(
    ("stride", "size", "expected"),
    [
        pytest.param(4, 4, 2, id="consecutive-words-are-128-bytes-a-clock"),
        pytest.param(128, 4, 64, id="one-bank-serves-a-lane-a-clock"),
        pytest.param(0, 4, 2, id="one-word-for-all-is-broadcast"),
        pytest.param(16, 16, 8, id="consecutive-16-bytes-without-conflict"),
        pytest.param(1024, 16, 64, id="rows-of-1-KB-all-conflict"),
        pytest.param(1040, 16, 8, id="rows-padded-by-16-bytes-do-not"),
    ],
)
def test_lds_clocks_on_an_mi300x(stride: int, size: int, expected: int) -> None:
    assert lds_clocks(MI300X, LANES * stride, size, reads=True) == expected


def test_an_mi355x_reads_lds_twice_as_wide() -> None:
    assert lds_clocks(MI355X, LANES * 16, 16, reads=True) == 4
    assert lds_clocks(MI355X, LANES * 16, 16, reads=False) == 8


@pytest.mark.parametrize(
    ("arch", "name", "expected"),
    [  # AMD's matrix instruction calculator, passes of 4 clocks
        ("gfx942", "v_mfma_f32_16x16x16_bf16", 16),
        ("gfx942", "v_mfma_f32_32x32x8_f16", 32),
        ("gfx950", "v_mfma_f32_16x16x32_bf16", 16),
        ("gfx950", "v_mfma_f32_32x32x16_bf16", 32),
        ("gfx942", "v_mfma_f32_16x16x4_f32", 32),
    ],
)
def test_matrix_instructions_take_the_clocks_of_amds_calculator(
    arch: str, name: str, expected: int
) -> None:
    assert mfma_clocks(GPUS[arch], name) == expected


def turn(*steps: Step, waves: int = 1) -> float:
    return clocks(list(steps), waves)


def mfma(accumulator: int) -> Step:
    return Step("mfma", 16.0, (0,), (accumulator,), (accumulator,))


def test_a_loop_of_matrix_instructions_runs_at_their_rate() -> None:
    assert turn(*[mfma(100 + n) for n in range(50)]) == pytest.approx(50 * 16, abs=1)


def test_other_instructions_issue_in_the_shadow_of_a_matrix_instruction() -> None:
    alone = turn(*[mfma(100 + n) for n in range(50)])
    shadowed = [s for n in range(50) for s in (mfma(100 + n), Step("valu"), Step("valu"))]
    assert turn(*shadowed) <= alone + BRANCH


def test_a_wait_exposes_the_latency_of_the_load_before_it() -> None:
    load = Step("vm", 16.0, writes=(7,), latency=900.0)
    assert turn(load, Step("wait", vm=0)) > 900
    assert turn(load, *[Step("valu")] * 300, Step("wait", vm=0)) < 1300


def test_waves_of_four_simds_share_the_lds() -> None:
    read = Step("lds", 32.0, writes=(7,), latency=48.0)
    assert turn(*[read] * 20, waves=4) == pytest.approx(4 * turn(*[read] * 20), rel=0.1)


def test_waves_meet_at_a_barrier() -> None:
    steps = [*[Step("valu")] * 10, Step("barrier")]
    assert turn(*steps, waves=4) == pytest.approx(turn(*steps), abs=13)


def test_a_call_bound_by_hbm_takes_what_its_bytes_take() -> None:
    shape = Shape(128, 16, 65536)
    tiles = Tiles(16, 16, 1, (100.0,))
    assert seconds(MI300X, tiles, shape, 1) == pytest.approx(shape.bytes / 4.0e12)


def test_splitting_pays_where_programs_are_few_and_costs_where_they_are_many() -> None:
    tiles = Tiles(64, 64, 1, (5000.0,))
    few, many = Shape(1, 128, 32768), Shape(512, 128, 4096)
    assert seconds(MI355X, tiles, few, 64) < seconds(MI355X, tiles, few, 1) / 10
    assert seconds(MI355X, tiles, many, 4) > seconds(MI355X, tiles, many, 1)


def test_the_points_it_is_fitted_to_are_met_and_all_are_shown() -> None:
    rows = calibration()
    errors = {(r["kernel"], r["batch"], r["heads"], r["context"]): r["error"] for r in rows}
    assert len(errors) == len(POINTS)
    assert abs(int(errors["AITER Gluon, 64 rows", 128, 128, 16384].split()[0])) <= 3
    assert abs(int(errors["AITER Gluon, 16 rows", 1, 16, 10_000_000].split()[0])) <= 3
    triton = [e for (kernel, *_, Skv), e in errors.items() if "Triton" in kernel and Skv >= 4096]
    assert max(abs(int(e.split()[0])) for e in triton) <= 3


ASM = """
peer:
.LBB0_1:
    ds_read_b128 v[0:3], v9
    s_waitcnt lgkmcnt(0)
    v_mfma_f32_16x16x16_bf16 v[4:7], v[0:1], v[2:3], v[4:7]
    s_cbranch_scc1 .LBB0_1
    s_endpgm
.section .rodata
    .amdhsa_kernel peer
    .end_amdhsa_kernel
    .vgpr_count: 128
"""


def test_a_peer_is_modelled_from_its_assembly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peer.s"
    path.write_text(ASM)
    options = f"--path {path} --arch gfx942 --tile 16 16 --waves 4 --lds 16384"
    monkeypatch.setattr("sys.argv", ["amd_model", *options.split()])
    amd_model.main()
    printed = capsys.readouterr().out
    assert "Modelled, not measured" in printed and "peer" in printed


TILE = Tiles(64, 64, 1, (5000.0,))


def test_sequences_that_fill_whole_rounds_are_not_cut_only_another_kernel_runs() -> None:
    shape = Shape(128, 128, 4096)  # 256 blocks for 256 units
    assert scheduled(MI355X, TILE, shape) == pytest.approx(seconds(MI355X, TILE, shape, 1) + LAUNCH)


def test_units_that_would_be_idle_get_their_share() -> None:
    shape = Shape(128, 128, 8192)  # 256 blocks for 304 units
    gpu = replace(MI300X, hbm=1000.0)  # to which parts are nothing
    assert scheduled(gpu, TILE, shape) < 0.9 * seconds(gpu, TILE, shape, 1)


@pytest.mark.parametrize(
    ("each", "groups", "expected"),
    [
        ([64, 64, 60, 64], 2, {1}),  # in rounds
        ([64, 64, 60], 13, {4}),  # as many groups for each
        ([64, 0, 1, 60], 13, {1, 6, 7}),  # by the line
    ],
)
def test_every_tile_is_in_one_piece(each: list[int], groups: int, expected: set[int]) -> None:
    pieces = list(_pieces(each, groups))
    assert sum(tiles for _, tiles, _ in pieces) == sum(each)
    assert {of for *_, of in pieces} == expected


def test_a_long_sequence_among_short_ones_is_shared_out() -> None:
    shape = Shape(128, 128, 32768, "one long")
    spread = Shape(128, 128, sum(shape.lens) // 128)
    assert scheduled(MI355X, TILE, shape) < 2 * scheduled(MI355X, TILE, spread)
    assert scheduled(MI355X, TILE, shape) < seconds(MI355X, TILE, shape, 1) / 10
