"""The pass as Inductor sees it: one CustomGraphPass for `joint_custom_pre_pass`."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

import mla_compile.ops
from mla_compile.passes.recognise import recognise
from mla_compile.passes.rewrite import Rewriter
from mla_compile.passes.site import Miss, MLASite, Reason

log = logging.getLogger(__name__)

# Attentions rewritten, missed and failed, and other softmaxes, since the process started or since
# counters.clear().
counters: Counter[str] = Counter()

Verdict = MLASite | Miss


class MLAPass(CustomGraphPass):
    """Rewrites the MLA attentions of an inference graph into the op, then runs `previous` passes.

    Fails open: an exception leaves what is not rewritten yet as it was, is logged with its trace
    and counted; `strict` raises it.  `record` is called with the verdict on each attention.  A
    graph that comes from Inductor's cache does not pass here.
    """

    def __init__(
        self,
        previous: Sequence[Callable[[Graph], None]] = (),
        strict: bool = False,
        record: Callable[[Verdict], None] | None = None,
    ):
        self.previous, self.strict, self.record = tuple(previous), strict, record

    def __eq__(self, other: object) -> bool:
        """Dynamo compiles a function again for options that are not equal to the last ones."""
        return self is other or (type(self) is type(other) is MLAPass and vars(self) == vars(other))

    def __hash__(self) -> int:
        return hash(type(self))

    def before(self, others: Sequence[Callable[[Graph], None]]) -> MLAPass:
        """The same pass, with other ones to run after it."""
        same = copy.copy(self)
        same.previous = tuple(others)
        return same

    def __call__(self, graph: Graph) -> None:
        try:
            self.rewrite(graph)
        except Exception:
            if self.strict:
                raise
            counters["failed"] += 1
            log.exception(
                "the pass failed and left the rest of the graph as it was; please report this trace"
            )
        for other in self.previous:
            other(graph)

    def rewrite(self, graph: Graph) -> None:
        rewriter = Rewriter(graph)
        try:
            for verdict in recognise(graph):
                if isinstance(verdict, MLASite):
                    verdict = rewriter.rewrite(verdict)
                self.note(verdict)
        finally:
            rewriter.remove_dead_code()

    def uuid(self) -> bytes | None:
        """Inductor's key holds versions and device; this adds sources, settings, previous passes.

        None, no caching, if one of these has none.
        """
        previous = [getattr(p, "uuid", lambda: None)() for p in self.previous]
        if None in previous:
            return None
        folders = Path(mla_compile.ops.__file__).parent, Path(__file__).parent
        sources = sorted({str(path) for folder in folders for path in folder.rglob("*.py")})
        return get_hash_for_files(tuple(sources), extra=repr((self.strict, previous)))

    def note(self, verdict: Verdict) -> None:
        if isinstance(verdict, MLASite):
            counters["rewritten"] += 1
        else:
            counters["others" if verdict.reason is Reason.NO_QUERY else "missed"] += 1
        log.info("%s", verdict)
        if self.record:
            self.record(verdict)
