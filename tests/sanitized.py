"""A small set of calls of one kernel, for compute-sanitizer to watch; each has to be right as well.

Run as `compute-sanitizer --tool memcheck python -m tests.sanitized sm90`, or `portable`; with
`--tool racecheck` and MLA_COMPILE_RACECHECK=1.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from mla_compile.kernels.config import GLUON, HALF, Config
from tests.cases import Case, assert_right, build
from tests.test_decode import run

# One tile and several, blocks that are cut or hold several tokens, CTAs with one item and more.
CASES = [
    Case("split", (300, 64, 0, 1), 1, 128, 512, 64, num_kv_splits=3),
    Case("one after another", (130,) * 80, 1, 128, 512, 64, page_size=1, num_kv_splits=1),
    Case("evenly", (190, 40, 500) * 50, 1, 128, 512, 64, page_size=64),
    Case("four tokens of 16 heads", (300, 70), 4, 16, 512, 64, torch.float16, num_kv_splits=2),
    Case("masked", (300, 70), 1, 40, 512, 64, paging="dense", mask="holes", num_kv_splits=2),
]
CONFIGS: dict[str, Config] = {
    "sm90": replace(GLUON["sm90"][-1], even_from=0),  # a schedule for few tiles as well
    "portable": HALF["sm90"][-1],
}


def main() -> None:
    for case in CASES:
        problem = build(case)
        assert_right(problem, *run(problem, "cuda", CONFIGS[sys.argv[1]]))
        print("right:", case.name, flush=True)


if __name__ == "__main__":
    main()
