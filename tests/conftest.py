"""What all tests share: no network, quiet libraries, threads that sleep while they wait."""

import os

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Workers share the cores: with all threads each they would wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // int(workers), 1)))

import trace_opd  # noqa: F401 - first: it sets how OpenMP's threads wait, before torch is loaded

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
