"""The compiler surface: `backend="mla"`, `options()`, `enable()` and `disable()`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch.fx import GraphModule

from mla_compile.passes.inductor import MLAPass, counters

__all__ = ["counters", "disable", "enable", "mla", "options"]

log = logging.getLogger(__name__)

_HOOK = "joint_custom_pre_pass"


def mla(
    gm: GraphModule,
    example_inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend: `torch.compile(model, backend="mla")` is Inductor with the pass in it.

    Takes Inductor's `mode` or `options`; a `joint_custom_pre_pass` among these runs after ours.
    Warns where they switch all such passes off.  Raises RuntimeError, as torch.compile does, for
    an option that Inductor does not have.
    """
    inductor = torch._TorchCompileInductorWrapper(mode, _with_pass(options or {}), None)
    if not inductor.config.get("use_joint_graph_passes", config.use_joint_graph_passes):
        log.warning("nothing is rewritten: use_joint_graph_passes is off (mode %s)", mode)
    result: Callable[..., Any] = inductor(gm, example_inputs)
    return result


def _reset() -> None:
    """Called by torch._dynamo.reset(): CUDA graphs are forgotten, as with backend="inductor"."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


mla.reset = _reset  # type: ignore[attr-defined]


def options(**inductor_options: Any) -> dict[str, Any]:
    """Inductor options with the pass among them: `torch.compile(model, options=options(...))`."""
    return _with_pass(inductor_options)


def enable() -> Enabled:
    """Put the pass into every compilation from here on, for code that compiles by itself.

    Also a context manager: `with mla_compile.enable(): model.generate(...)`.  What was compiled
    before stays as it is (torch._dynamo.reset() forgets it), and a compilation with an option
    `joint_custom_pre_pass` of its own goes without.  From torch 2.13 on each thread has its own
    configuration: call it in the thread that compiles.
    """
    previous = getattr(config, _HOOK)
    setattr(config, _HOOK, composed(previous))
    return Enabled(previous)


def disable() -> None:
    """Undo enable(), however often it was called, if the hook is still what that set."""
    current = getattr(config, _HOOK)
    if type(current) is MLAPass:  # a report goes on
        setattr(config, _HOOK, _unwrapped(current))


class Enabled:
    """What enable() returns: leaving it as a context restores the hook that was there before."""

    def __init__(self, previous: Any):
        self._previous = previous

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        setattr(config, _HOOK, self._previous)


def _with_pass(inductor_options: dict[str, Any]) -> dict[str, Any]:
    current = getattr(config, _HOOK)
    ours = composed(inductor_options.get(_HOOK, current))
    if isinstance(current, MLAPass) and _HOOK in inductor_options:
        ours = current.before(ours.previous)  # enabled or reporting, it goes on as it is
    return {**inductor_options, _HOOK: ours}


def composed(previous: Any) -> MLAPass:
    """Our pass, then what was set before: nothing, one pass, or (torch >= 2.13) a sequence."""
    if isinstance(previous, MLAPass):
        return previous
    if previous is None:
        return MLAPass()
    return MLAPass(previous if isinstance(previous, (list, tuple)) else [previous])


def _unwrapped(current: MLAPass) -> Any:
    return current.previous if len(current.previous) > 1 else next(iter(current.previous), None)
