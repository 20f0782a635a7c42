"""trace-opd: annotation and training toolkit for token-routed self on-policy distillation."""

import os

__version__ = "0.1.0"

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
