"""Multi-head latent attention decode for existing PyTorch models, through torch.compile.

Importing the package registers `torch.ops.mla_compile.*` and does nothing else: no Triton, no
Inductor, no GPU. The compiler surface is imported when one of its names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mla_compile.contents import debug_checks
from mla_compile.ops import mla_decode, mla_decode_fwd

if TYPE_CHECKING:
    from mla_compile.backend import counters, disable, enable, options
    from mla_compile.report import explain

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "counters",
    "debug_checks",
    "disable",
    "enable",
    "explain",
    "mla_decode",
    "mla_decode_fwd",
    "options",
]

_LAZY = {
    "counters": "mla_compile.backend",
    "disable": "mla_compile.backend",
    "enable": "mla_compile.backend",
    "explain": "mla_compile.report",
    "options": "mla_compile.backend",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mla_compile' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
