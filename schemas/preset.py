"""What a preset is. The lists are in presets_trace.py, presets_kl.py and presets_reweight.py.

A new one is an entry of a list: about ten lines.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

Overrides = dict[str, dict[str, Any]]

# Values of an override that YAML reads as the same text without quotes.
_PLAIN = re.compile(r"[a-z][a-z0-9_]*")

# λ = 1 at every step: the divergence alone, never GRPO on the same tokens.
CONSTANT: dict[str, Any] = {"w0": 1.0, "decay_steps": None}


@dataclass(frozen=True)
class Preset:
    """A method as values of config fields.

    summary: one line. source: the paper. sets: section → field → value, of the sections routing,
    schedule, teacher, loss, prompt, sampling and annotator. certain: what of it stands in the
    paper or in its authors' code. choice: what is ours, and what the method has and this has not.
    """

    summary: str
    source: str
    sets: Overrides
    certain: str
    choice: str

    @property
    def overrides(self) -> list[str]:
        """Its settings as `section.field=value`."""
        return [
            f"{section}.{field}={_written(value)}"
            for section, values in self.sets.items()
            for field, value in values.items()
        ]


def every_token(key: str, error: str, context: str, **routing: Any) -> dict[str, Any]:
    """Routing of all tokens of correct responses to `key`, and of wrong ones to `error`."""
    return {"rule": "all", "key": key, "error": error, "teacher_context": context} | routing


def gate(of: str, shape: str, **place: float) -> dict[str, Any]:
    """A value of `loss.gates`."""
    return {"of": of, "shape": shape} | place


def _written(value: Any) -> str:
    plain = isinstance(value, str) and _PLAIN.fullmatch(value)
    return value if plain else json.dumps(value)
