"""What Inspect loads by the entry point `trace_opd`: `inspect eval trace_opd/problems`."""

from .inspect_figures import avg_at, estimate, maj_at, pass_at
from .inspect_tasks import answer_verdict, ask, problems, suite

__all__ = ["answer_verdict", "ask", "avg_at", "estimate", "maj_at", "pass_at", "problems", "suite"]
