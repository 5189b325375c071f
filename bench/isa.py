"""What every AMD binary we ship needs and does, read from the compiled code; no GPU needed.

python -m bench.isa                # all
python -m bench.isa gfx950 soft    # those whose names contain all of these words
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.common import table
from tests.cdna.compiler import Compiler, Request
from tests.cdna.gate import Report, report
from tests.cdna.limits import breaches, judge
from tests.cdna.shipped import MATRIX, plan


def row(name: str, r: Report, verdict: str) -> dict[str, str]:
    return {
        "binary": name,
        "kernel": r.name,
        "VGPR": f"{r.vgprs}",
        "AGPR": f"{r.agprs}",
        "spills": f"{r.vgpr_spills}v {r.sgpr_spills}s",
        "scratch": f"{r.scratch}",
        "LDS KB": f"{r.lds / 1024:.1f}",
        "programs/CU": f"{r.programs}",
        "waves/SIMD": f"{r.waves:g}",
        "MFMA": listed(r.matrix),
        "theory": listed(r.expected_matrix),
        "loads × bytes": listed(dict(sorted(r.loads.items(), reverse=True))),
        "narrow LDS reads": f"{r.narrow}",
        "gate": verdict,
    }


def listed(counts: Mapping[Any, int]) -> str:
    return " ".join(f"{n}×{what}" for what, n in counts.items())


def main() -> None:
    words = sys.argv[1:]
    chosen = [s for s in MATRIX if all(word in str(s) for word in words)]
    rows, seen = [], set[Request]()
    with tempfile.TemporaryDirectory() as cache:
        compiler = Compiler(Path(cache))
        planned = [(s, plan(s, compiler)) for s in chosen]
        for shipped, requests in planned:
            for request in requests:
                if request in seen:
                    continue
                seen.add(request)
                r = report(request, compiler.submit(request).result())
                problems = r.problems(shipped.arch) + breaches(shipped.arch, r)
                wrong, excused = judge(str(shipped), problems)
                rows.append(row(str(shipped), r, "; ".join(wrong or excused) or "ok"))
        compiler.close()
    print(table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
