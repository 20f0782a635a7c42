"""trace-opd: annotation and training toolkit for token-routed self on-policy distillation.

`import trace_opd as to` gives the names of `__all__`, each imported when it is first used, so that
the import itself takes milliseconds and loads no torch.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.store import Dataset, Store
    from .pipelines.api import load, run, show
    from .schemas.configs import LossConfig
    from .schemas.errors import InputError
    from .trace.fused import routed_loss
    from .trace.losses import Head, LossInputs
    from .trace.trainer import Trainer

__version__ = "0.1.0"
__all__ = [
    "Dataset",
    "Head",
    "InputError",
    "LossConfig",
    "LossInputs",
    "Store",
    "Trainer",
    "load",
    "routed_loss",
    "run",
    "show",
]

# Read by OpenMP when torch is first loaded. By default its threads spin while they wait for one
# another; beside any other busy process (Prefect's server, verifier workers) a small model's step
# then takes many times longer. See docs/decisions/openmp-threads-sleep.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Read by torch's CPU allocator when it is first asked: tensors of megabytes come in pages of 2 MiB
# where the system offers them (transparent_hugepage = madvise), instead of a page fault every 4
# KiB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Read by pyarrow's allocator when pyarrow is first loaded: by default it gives freed memory back to
# the system after 10 ms, and the next part pays a page fault for every 4 KiB of it. Milliseconds.
# See docs/decisions/arrow-memory.md.
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "2000")


_MODULES = {
    "Dataset": "data.store",
    "Head": "trace.losses",
    "InputError": "schemas.errors",
    "LossConfig": "schemas.configs",
    "LossInputs": "trace.losses",
    "Store": "data.store",
    "Trainer": "trace.trainer",
    "load": "pipelines.api",
    "routed_loss": "trace.fused",
    "run": "pipelines.api",
    "show": "pipelines.api",
}


if not TYPE_CHECKING:  # a type checker would take every name for one of Any

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
