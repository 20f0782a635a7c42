"""trace-opd: annotation and training toolkit for token-routed self on-policy distillation."""

import os

__version__ = "0.1.0"

# Read by OpenMP when torch is first loaded. By default its threads spin while they wait for one
# another; beside any other busy process (Prefect's server, verifier workers) a small model's step
# then takes many times longer. See docs/decisions/openmp-threads-sleep.md.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
