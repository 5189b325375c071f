"""Runs the pass on the graph Inductor would give it, and the result eagerly: no code generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import default_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule

from mla_compile.passes.inductor import Verdict
from mla_compile.passes.site import Miss, MLASite
from mla_compile.report import Recorder, Report

OP = torch.ops.mla_compile.mla_decode.default
NAIVE = {torch.ops.aten.exp.default, torch.ops.aten.amax.default, torch.ops.aten._softmax.default}


@dataclass
class Compiled:
    """A function compiled with the pass in strict mode, what it said of it, made and reported."""

    fn: Callable[..., Any]
    dynamic: bool | None = None
    fullgraph: bool = True  # else Dynamo breaks the graph at some exceptions of the pass
    verdicts: list[Verdict] = field(default_factory=list)
    graphs: list[Graph] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        torch._dynamo.reset()
        how: Any = {"dynamic": self.dynamic, "fullgraph": self.fullgraph}
        return torch.compile(self.fn, backend=self.backend, **how)(*args, **kwargs)

    def backend(self, gm: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def partition(gm: GraphModule, inputs: Any, **options: Any) -> tuple[GraphModule, ...]:
            self.run_pass(gm)
            return default_partition(gm, inputs, **options)

        def inference(gm: GraphModule, inputs: Any) -> Any:
            self.run_pass(gm)
            return make_boxed_func(gm.forward)

        return aot_module_simplified(
            gm,
            inputs,
            fw_compiler=lambda gm, _: make_boxed_func(gm.forward),
            inference_compiler=cast(Any, inference),
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )

    def run_pass(self, gm: GraphModule) -> None:
        recorder = Recorder(self.report)
        recorder.strict, recorder.record = True, self.verdicts.append
        recorder(gm.graph)
        gm.graph.lint()
        gm.recompile()
        self.graphs.append(gm.graph)

    @property
    def sites(self) -> list[MLASite]:
        return [v for v in self.verdicts if isinstance(v, MLASite)]

    @property
    def misses(self) -> list[Miss]:
        return [v for v in self.verdicts if isinstance(v, Miss)]

    def count(self, *targets: Any) -> int:
        return sum(n.target in targets for graph in self.graphs for n in graph.nodes)


def error(result: Tensor, exact: Tensor) -> float:
    relative: float = ((result.double() - exact).norm() / exact.norm()).item()
    return relative
