"""Tile sizes and split counts: pure functions of ints, by table; then what the compilers say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from mla_compile import report
from mla_compile.dims import Dims
from mla_compile.kernels import decode
from mla_compile.kernels.config import (
    BYTE,
    FALLBACK,
    FULL,
    FULL_FALLBACK,
    GLUON,
    HALF,
    Config,
    choose,
    combine_blocks,
    combine_of,
    evenly,
    num_splits,
    pick,
    tuned_arch,
    workspace_numel,
)
from mla_compile.validate import MAX_SPLITS

H200 = 132
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


@pytest.mark.parametrize(
    ("arch", "rows", "Lkv", "size", "expected"),
    [
        ("sm90", 1, 512, 2, HALF["sm90"][0]),
        ("sm90", 16, 512, 2, HALF["sm90"][0]),
        ("sm90", 17, 512, 2, HALF["sm90"][1]),
        ("sm90", 128, 512, 2, HALF["sm90"][1]),
        ("sm90", 128, 512, 4, FULL["sm90"][0]),
        ("sm90", 128, 1024, 2, FALLBACK[0]),
        ("gfx942", 128, 512, 2, HALF["gfx942"][1]),
        ("gfx942", 8, 512, 4, FULL_FALLBACK[0]),
        ("gfx950", 64, 512, 2, HALF["gfx950"][1]),
        ("sm80", 128, 512, 2, HALF["sm80"][1]),
        ("sm80", 128, 512, 4, FULL["sm80"][0]),
        ("sm86", 16, 512, 2, HALF["sm89"][0]),
        ("sm121", 128, 512, 2, HALF["sm120"][1]),
        ("sm103", 128, 512, 2, HALF["sm100"][1]),
        ("sm86", 128, 512, 4, FULL_FALLBACK[0]),
        ("sm90", 128, 1024, 4, FULL_FALLBACK[0]),
        ("gfx1200", 128, 512, 2, HALF["gfx1201"][1]),
        ("gfx1101", 128, 512, 2, HALF["gfx1201"][1]),
        ("sm75", 128, 512, 2, FALLBACK[0]),
        ("interpreter", 128, 512, 2, FALLBACK[0]),
    ],
)
def test_pick(arch: str, rows: int, Lkv: int, size: int, expected: Any) -> None:
    assert pick(arch, rows=rows, Lkv=Lkv, q_bytes=size, kv_bytes=size) == expected


def test_older_tritons_have_configs_of_their_own_on_amd() -> None:
    assert tuned_arch("gfx950", "3.6.0") == "gfx950-3.6"
    assert tuned_arch("gfx950", "3.10.1+rocm") == "gfx950"
    assert tuned_arch("gfx942", "3.7.0") == "gfx942-3.7"
    assert tuned_arch("gfx942", "3.8.1") == "gfx942-3.8"
    assert tuned_arch("gfx950", "3.8.1") == "gfx950"
    assert tuned_arch("sm90", "3.6.0") == "sm90"


def chosen(
    arch: str, rows: int = 128, R: int = 64, rare: str = "", pinned: str | None = None, **sizes: int
) -> tuple[Config, str]:
    sizes = {"Lkv": 512, "q_bytes": 2, "kv_bytes": 2} | sizes
    return choose(arch, rows=rows, R=R, rare=rare, pinned=pinned, **sizes)


@pytest.mark.parametrize(
    ("arch", "call", "expected", "why"),
    [
        ("gfx942", {}, GLUON["gfx942"][1], "the table of gfx942"),
        ("gfx942", {"rows": 16}, GLUON["gfx942"][0], "the table of gfx942"),
        ("gfx942", {"rows": 17}, GLUON["gfx942"][1], "the table of gfx942"),
        ("gfx942-3.7", {}, GLUON["gfx942-3.7"][1], "the table of gfx942-3.7"),
        ("gfx950", {}, GLUON["gfx950"][1], "the table of gfx950"),
        ("gfx950", {"rows": 8}, GLUON["gfx950"][0], "the table of gfx950"),
        ("gfx950", {"rare": "attn_mask"}, HALF["gfx950"][1], "cdna4 lacks attn_mask"),
        ("gfx950", {"R": 0}, HALF["gfx950"][1], "cdna4 lacks dims 512 + 0"),
        ("gfx950", {"Lkv": 256, "R": 32}, HALF["gfx950"][1], "cdna4 lacks dims 256 + 32"),
        (
            "gfx942",
            {"q_bytes": 4, "kv_bytes": 4},
            FULL_FALLBACK[0],
            "cdna3 lacks elements of 4 bytes",
        ),
        ("gfx942", {"kv_bytes": 1}, BYTE["gfx942"][1], "cdna3 lacks elements of 1 byte"),
        ("gfx942", {"pinned": "portable"}, HALF["gfx942"][1], "pinned"),
        ("gfx942", {"pinned": "cdna3"}, GLUON["gfx942"][1], "pinned"),
        ("gfx942", {"pinned": ""}, GLUON["gfx942"][1], "the table of gfx942"),
        ("sm90", {}, GLUON["sm90"][0], "the table of sm90"),
        ("sm90", {"rows": 16}, GLUON["sm90"][0], "the table of sm90"),
        ("sm90", {"rows": 16, "keys": 8192}, GLUON["sm90"][0], "the table of sm90"),
        ("sm90", {"rows": 16, "keys": 8191}, HALF["sm90"][0], "sm90 lacks speed below 8192 keys"),
        ("sm90", {"rows": 16, "keys": 1, "pinned": "sm90"}, GLUON["sm90"][0], "pinned"),
        ("sm90", {"rows": 17, "keys": 1}, GLUON["sm90"][0], "the table of sm90"),
        ("sm90", {"rare": "attn_mask"}, HALF["sm90"][1], "sm90 lacks attn_mask"),
        ("sm90", {"q_bytes": 4, "kv_bytes": 4}, FULL["sm90"][0], "sm90 lacks elements of 4 bytes"),
        ("sm90", {"pinned": "portable"}, HALF["sm90"][1], "pinned"),
        ("sm80", {}, HALF["sm80"][1], "all there is for sm80"),
        ("gfx90a", {}, FALLBACK[0], "all there is for gfx90a"),
    ],
)
def test_choose(arch: str, call: dict[str, Any], expected: Config, why: str) -> None:
    assert chosen(arch, **call) == (expected, why)


@pytest.mark.parametrize(
    ("arch", "call", "message"),
    [
        ("gfx942", {"pinned": "cdna4"}, "portable or cdna3 on gfx942, got cdna4"),
        ("sm90", {"pinned": "cdna3"}, "portable or sm90 on sm90, got cdna3"),
        ("gfx942", {"pinned": "cdna3", "rare": "logit_cap"}, "a kernel that has logit_cap"),
    ],
)
def test_a_kernel_that_cannot_serve_is_not_pinned(
    arch: str, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"MLA_COMPILE_KERNEL: expected .*{message}"):
        chosen(arch, **call)


def test_an_fp8_cache_under_bf16_picks_as_bf16_does() -> None:
    assert pick("sm90", rows=64, Lkv=512, q_bytes=2, kv_bytes=1) == HALF["sm90"][1]


def test_on_gfx942_an_fp8_cache_takes_tiles_that_do_not_spill() -> None:
    assert pick("gfx942", rows=64, Lkv=512, q_bytes=2, kv_bytes=1) == BYTE["gfx942"][1]
    assert pick("gfx942", rows=64, Lkv=512, q_bytes=2, kv_bytes=2) == HALF["gfx942"][1]


@pytest.mark.parametrize(
    ("masks", "pin", "expected"),
    [
        ((), "", "cdna4, 64 rows × 64 keys: the table of gfx950"),
        ((), "portable", "portable, 64 rows × 32 keys: pinned"),
        (("mask",), "", "portable, 64 rows × 32 keys: cdna4 lacks attn_mask of keys"),
    ],
)
def test_explain_says_which_kernel_a_gpu_runs_and_why(
    masks: tuple[str, ...], pin: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_device", lambda _: ("gfx950", 256))
    monkeypatch.setenv("MLA_COMPILE_KERNEL", pin)
    value = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    site = SimpleNamespace(
        latent=SimpleNamespace(key=SimpleNamespace(node=SimpleNamespace(meta={"val": value}))),
        dims={"Sq": 1, "N": 128, "Lkv": 512, "R": 64},
        masks=[SimpleNamespace(leaf=SimpleNamespace(labels=set())) for _ in masks],
        queries=(),
        heads=(),
        causal=False,
        paging=None,
    )
    assert report.kernel(site) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "table",
    [*HALF.values(), *BYTE.values(), *FULL.values(), *GLUON.values(), FALLBACK, FULL_FALLBACK],
)
def test_configs_rise_in_rows(table: tuple[Any, ...]) -> None:
    rows = [config.block_m for config in table]
    assert rows == sorted(set(rows))


@pytest.mark.parametrize(
    ("programs", "context", "least", "most"),
    [
        pytest.param(256, 4096, 1, 1, id="batch-128-of-128-heads-is-not-split"),
        pytest.param(256, 512, 1, 1, id="batch-128-short-is-not-split"),
        pytest.param(256, 8192, 1, 1, id="batch-128-long-is-not-split"),
        pytest.param(2, 32768, 60, 66, id="batch-1-long-fills-the-GPU-once"),
        pytest.param(2, 4096, 32, 64, id="batch-1-splits-to-a-tile-or-two"),
        pytest.param(2, 64, 1, 1, id="one-tile-cannot-be-split"),
        pytest.param(32, 4096, 4, 4, id="batch-16-fills-the-GPU-once"),
        pytest.param(0, 4096, 1, 1, id="an-empty-batch"),
        pytest.param(2, 0, 1, 1, id="an-empty-cache"),
    ],
)
def test_num_splits_on_an_h200(programs: int, context: int, least: int, most: int) -> None:
    assert least <= num_splits(programs, context // 64, H200) <= most


@pytest.mark.parametrize(
    ("heads", "B", "context", "fast"),
    [
        (128, 1, 512, {8}),
        (128, 1, 2048, {16, 32}),
        (128, 1, 4096, {32}),
        (128, 1, 8192, {32, 43}),
        (128, 1, 16384, {43, 52, 64}),
        (128, 1, 32768, {57, 64}),
        (128, 2, 4096, {13, 16, 22}),
        (128, 2, 8192, {22, 26, 32}),
        (128, 4, 2048, {11, 16}),
        (128, 4, 4096, {13, 16}),
        (64, 1, 4096, {32, 64}),
        (64, 1, 8192, {43, 64}),
        (64, 1, 16384, {64}),
        (64, 2, 4096, {32}),
        (64, 2, 8192, {32, 43}),
        (64, 4, 4096, {13, 16, 22}),
        (32, 1, 512, {8}),
        (32, 1, 4096, {32, 64}),
        (32, 1, 8192, {43, 64}),
        (32, 1, 16384, {52, 64, 86}),
        (32, 1, 32768, {64, 86, 103}),
        (32, 2, 4096, {32}),
        (32, 4, 1024, {16}),
        (32, 4, 4096, {16, 22}),
        (16, 1, 4096, {32, 64}),
        (16, 1, 8192, {43, 64}),
        (16, 1, 16384, {64, 86}),
        (16, 1, 32768, {86, 103}),
        (16, 2, 4096, {22, 32}),
        (16, 2, 8192, {32, 43}),
        (16, 4, 2048, {11, 16}),
        (16, 4, 4096, {13, 16, 22}),
    ],
)
def test_splits_of_hoppers_kernel_are_within_4_percent_of_the_fastest_seen(
    heads: int, B: int, context: int, fast: set[int]
) -> None:
    config = GLUON["sm90"][0]
    programs = B * -(-heads // config.block_m)
    rates = (config.stream, combine_of(config, heads), config.late, config.again)
    assert num_splits(programs, context // 64, H200, *rates) in fast


@pytest.mark.parametrize(
    ("arch", "units", "heads", "expected"),
    [
        pytest.param("gfx942", 304, 128, 1, id="MI300X-128-heads"),
        pytest.param("gfx942", 304, 16, 7, id="MI300X-16-heads-three-programs-a-unit"),
        pytest.param("gfx950", 256, 128, 1, id="MI355X-128-heads-one-program-a-unit"),
        pytest.param("gfx950", 256, 16, 3, id="MI355X-16-heads-no-more-partials-than-HBM-is-worth"),
    ],
)
def test_num_splits_on_amd_at_batch_128(arch: str, units: int, heads: int, expected: int) -> None:
    config, _ = chosen(arch, rows=heads)
    programs, tiles = 128 * -(-heads // config.block_m), 4096 // config.block_n
    at_once = units * config.per_unit
    assert num_splits(programs, tiles, at_once, config.stream, config.combine) == expected


@pytest.mark.parametrize(
    ("B", "context", "expected"),
    [(2, 4096, False), (4, 4096, False), (2, 8192, False), (8, 4096, True), (128, 512, True)],
)
def test_a_schedule_is_for_programs_of_many_tiles(B: int, context: int, expected: bool) -> None:
    assert evenly(GLUON["sm90"][0], 2 * B, context // 64, H200) is expected
    assert evenly(GLUON["gfx950"][1], 2 * B, context // 64, 132) is expected
    assert not evenly(HALF["sm90"][-1], 2 * B, context // 64, H200)


def test_num_splits_never_exceeds_tiles_or_the_limit() -> None:
    for programs in (1, 2, 31, 200):
        for tiles in (1, 2, 3, 100, 5000):
            assert 1 <= num_splits(programs, tiles, 304) <= min(tiles, MAX_SPLITS)


@pytest.mark.parametrize("splits", [2, 3, 64, MAX_SPLITS])
@pytest.mark.parametrize("Lkv", [16, 24, 512, 1000])
@pytest.mark.parametrize("tiled", [False, True])
def test_combine_blocks_stay_within_the_register_budget(splits: int, Lkv: int, tiled: bool) -> None:
    rows, block_s, block_l = combine_blocks(splits, Lkv, tiled)
    assert rows == 1 + tiled
    assert block_s >= min(splits, 64) and block_l >= min(Lkv, 16)
    assert rows * block_s * block_l <= (4096 if tiled and block_s == 64 else 2048)


def test_workspace_holds_out_m_and_l_of_every_row_and_split() -> None:
    assert workspace_numel(Dims(B=2, T=3, Sq=2, N=5, Lkv=7, R=0), 4) == 3 * 5 * 4 * 9


LIMITS = {"sm90": 227, "gfx942": 64, "gfx950": 160}  # KB of shared memory of a workgroup
UNTIMED = {
    "sm80": 163,
    "sm86": 99,
    "sm89": 99,
    "sm100": 227,
    "sm120": 99,
    "gfx1100": 64,
    "gfx1201": 64,
}


def offline(*arguments: str) -> list[dict[str, Any]]:
    """What the compilers make of shipped configs; a GPU is not needed, nor the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.offline", *arguments],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return offline(*LIMITS)


def test_configs_never_timed_fit_without_spills_and_use_matrix_units() -> None:
    """Those of RDNA from Triton 3.9 on: before, it keeps all chunks of a query."""
    archs = [arch for arch in UNTIMED if arch.startswith("sm") or VERSION >= (3, 9)]
    found = offline(*archs, "--plain")
    assert {(row["arch"], row["path"]) for row in found} == {
        (arch, path) for arch in archs for path in ("bf16", "combine")
    }
    for row in found:
        assert row["shared"] <= UNTIMED[row["arch"]] * 1024, row
        assert row["spilled"] == 0, row
        assert row["matrix"] > 0 or row["path"] == "combine", row


@pytest.mark.extra
@pytest.mark.parametrize("arch", UNTIMED)
def test_every_path_of_a_config_never_timed_fits(arch: str) -> None:
    found = offline(arch)
    assert {row["path"] for row in found} >= {"bf16, dense under a mask", "fp32"}
    for row in found:
        assert row["shared"] <= UNTIMED[arch] * 1024, row


def test_every_kernel_compiles_for_every_arch_within_its_shared_memory(
    compiled: list[dict[str, Any]],
) -> None:
    assert {row["arch"] for row in compiled} == set(LIMITS)
    for row in compiled:
        assert row["shared"] <= LIMITS[row["arch"]] * 1024, row


def test_the_plain_bf16_path_does_not_spill(compiled: list[dict[str, Any]]) -> None:
    plain = [row for row in compiled if row["path"] in ("bf16", "combine")]
    assert len(plain) == 3 * 3
    for row in plain:
        assert row["spilled"] == 0, row


def test_no_cdna_kernel_spills(compiled: list[dict[str, Any]]) -> None:
    gluon = [row for row in compiled if row["path"].startswith("cdna")]
    assert len(gluon) == 2 * 2 * 2
    for row in gluon:
        assert row["spilled"] == 0 and row["matrix"] > 0, row


def test_the_hopper_kernel_hardly_spills(compiled: list[dict[str, Any]]) -> None:
    """On Triton 3.9 what an item needs once, before not even that."""
    allowed = 32 if VERSION >= (3, 9) else 0
    hopper = [row for row in compiled if row["path"] == "sm90"]
    assert len(hopper) == 2
    for row in hopper:
        assert row["spilled"] <= allowed and row["wgmma"] > 0, row


def test_the_plain_bf16_path_uses_matrix_units(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        if row["path"] == "bf16":
            wanted = "wgmma" if row["arch"] == "sm90" and row["rows"] == 64 else "matrix"
            assert row[wanted] > 0, row
