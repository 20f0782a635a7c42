"""metrics.jsonl of a training run: one JSON object per step.

training/tracking.py writes it; stage train, the study and the viewer's training curves read it.
"""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The steps of a metrics file, [] if there is none; see `parse_metrics`."""
    return parse_metrics(file.read_bytes()) if file.exists() else []


def parse_metrics(content: bytes) -> list[dict[str, Any]]:
    """The steps before the first damaged line: a kill or a full disk may tear the last one."""
    steps: list[dict[str, Any]] = []
    for line in content.decode(errors="replace").splitlines():
        try:
            step = json.loads(line)
        except json.JSONDecodeError:
            break
        steps.append(step)
    return steps
