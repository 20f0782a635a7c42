"""What all tests share: no network, quiet libraries, threads that sleep while they wait."""

import os

import trace_opd  # noqa: F401 - first: it sets how OpenMP's threads wait, before torch is loaded

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
