"""Named presets: TRACE and the baselines of METHOD.md as values of the same few fields.

`--preset` and a study's arms apply them. A preset sets fields of `routing` (which tokens, which
loss, what the teacher sees), `schedule` (λ), `teacher` (whose weights) and `loss`. It overrides the
config file, and key=value overrides it. It leaves α, the clip and the optimiser to the file.
"""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from .config_faults import unknown_name
from .configs import ConvertConfig, PipelineConfig, TrainConfig
from .errors import InputError

Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Preset:
    """summary: one line; source: paper; sets: section → field → value."""

    summary: str
    source: str
    sets: Overrides

    @property
    def overrides(self) -> list[str]:
        """Its settings as `section.field=value`."""
        return [
            f"{section}.{field}={value if isinstance(value, str) else json.dumps(value)}"
            for section, values in self.sets.items()
            for field, value in values.items()
        ]


_TRACE = "TRACE, arXiv 2605.10194"
_CONSTANT = {"w0": 1.0, "decay_steps": None}


def _self_distillation(rule: str, **routing: str) -> Overrides:
    """TRACE's teacher and objective on the tokens chosen by a rule."""
    return {
        "routing": {"rule": rule, "teacher_context": "type", **routing},
        "teacher": {"sync": "periodic"},
        "loss": {"grpo": True, "entropy_beta": 0.0},
    }


PRESETS: dict[str, Preset] = {
    "trace-fkl": Preset(
        "Forward KL on key spans of correct responses, for a strong base.",
        _TRACE,
        _self_distillation("spans", key="fkl", error="none"),
    ),
    "trace-rkl": Preset(
        "Reverse KL on error spans of wrong responses, for a weak base.",
        _TRACE,
        _self_distillation("spans", key="none", error="rkl"),
    ),
    "trace-both": Preset(
        "Forward KL on key spans and reverse KL on error spans.",
        _TRACE,
        _self_distillation("spans", key="fkl", error="rkl"),
    ),
    "grpo": Preset(
        "GRPO alone: no teacher, no annotation.",
        "arXiv 2402.03300",
        {
            "routing": {"rule": "spans", "key": "none", "error": "none", "teacher_context": "type"},
            "schedule": {"w0": 0.0},
            "loss": {"grpo": True},
        },
    ),
    "all-token-fkl": Preset(
        "Forward KL to the type-label teacher on every token.",
        _TRACE + ", localisation ablation",
        _self_distillation("all", key="fkl", error="fkl"),
    ),
    "all-token-rkl": Preset(
        "Reverse KL to the type-label teacher on every token.",
        _TRACE + ", localisation ablation",
        _self_distillation("all", key="rkl", error="rkl"),
    ),
    "random-alpha": Preset(
        "The config's corner on a random share α of the tokens.",
        _TRACE + ", localisation ablation",
        _self_distillation("random"),
    ),
    "inverted-alpha": Preset(
        "The config's corner on a share α of the tokens outside the annotated spans.",
        _TRACE + ", localisation ablation",
        _self_distillation("inverted"),
    ),
    "sdpo": Preset(
        "Divergence to an averaged teacher that reads a correct peer response; no GRPO.",
        "SDPO, arXiv 2601.20802",
        {
            "routing": {"rule": "all", "key": "jsd", "error": "jsd", "teacher_context": "peer"},
            "schedule": _CONSTANT,
            "teacher": {"sync": "ema", "ema_rate": 0.05},
            "loss": {"grpo": False, "jsd_beta": 0.5, "entropy_beta": 0.0},
        },
    ),
    "srpo": Preset(
        "GRPO on correct responses; on wrong ones with a correct peer SDPO, weighted exp(−βH).",
        "SRPO, arXiv 2604.02288",
        {
            "routing": {"rule": "all", "key": "none", "error": "jsd", "teacher_context": "peer"},
            "schedule": _CONSTANT,
            "teacher": {"sync": "ema", "ema_rate": 0.05},
            "loss": {"grpo": True, "jsd_beta": 0.5, "entropy_beta": 1.0},
        },
    ),
    "rlsd": Preset(
        "GRPO whose tokens weigh by the likelihood ratio of a teacher that reads the solution.",
        "RLSD, arXiv 2604.03128",
        {
            "routing": {
                "rule": "all",
                "key": "reweight",
                "error": "reweight",
                "teacher_context": "solution",
            },
            "schedule": {"w0": 0.5, "hold_steps": 0, "decay_steps": 50},
            "teacher": {"sync": "periodic"},
            "loss": {"grpo": True, "reweight_clip": 0.2, "entropy_beta": 0.0},
        },
    ),
    "opsd": Preset(
        "Forward KL to the frozen base that reads the reference solution; no GRPO.",
        "OPSD, arXiv 2601.18734",
        {
            "routing": {"rule": "all", "key": "fkl", "error": "fkl", "teacher_context": "solution"},
            "schedule": _CONSTANT,
            "teacher": {"sync": "frozen"},
            "loss": {"grpo": False, "entropy_beta": 0.0},
        },
    ),
}


def preset_data(name: str, model: type[BaseModel]) -> dict[str, Any]:
    """A preset's settings of a config, nested as in its file.

    Raises:
        InputError: an unknown preset.
    """
    if name not in PRESETS:
        raise InputError(f"preset {unknown_name(name, PRESETS)}")
    sets = PRESETS[name].sets
    convert = {"routing": sets["routing"]}
    train = {"online": convert} | {key: sets[key] for key in sets if key != "routing"}
    places: dict[type[BaseModel], dict[str, Any]] = {
        ConvertConfig: convert,
        TrainConfig: train,
        PipelineConfig: {"convert": convert, "train": train},
    }
    return places[model]
