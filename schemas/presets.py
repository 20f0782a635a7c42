"""Named presets: TRACE, its baselines and the methods since, as values of the same few fields.

`--preset` and a study's arms apply them. A preset sets fields of `routing` (which tokens, which
loss, what the teacher sees), `schedule` (λ), `teacher` (whose weights), `loss`, and where a method
needs it of `prompt`, `sampling` and `annotator`. It overrides the config file, and key=value
overrides it. It leaves α, the optimiser, and the clip where a method does not name one, to the
file.
"""

from collections.abc import Collection
from typing import Any

from pydantic import BaseModel

from . import presets_kl, presets_reweight, presets_trace
from .config_faults import unknown_name
from .configs import ConvertConfig, PipelineConfig, TrainConfig
from .errors import InputError
from .preset import Preset

PRESETS: dict[str, Preset] = presets_trace.PRESETS | presets_kl.PRESETS | presets_reweight.PRESETS

# Sections of a preset that belong to the online phase of a training config.
ONLINE = ("routing", "sampling", "annotator")


def preset_named(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: an unknown preset.
    """
    if name not in PRESETS:
        raise InputError(f"preset {unknown_name(name, PRESETS)}")
    return PRESETS[name]


def preset_data(
    name: str, model: type[BaseModel], sections: Collection[str] | None = None
) -> dict[str, Any]:
    """A preset's settings of a config, nested as in its file.

    sections: those that a pipeline's file has, None for all; a stage annotate that it lacks is not
    added.

    Raises:
        InputError: an unknown preset.
    """
    sets = preset_named(name).sets
    convert = {"routing": sets["routing"]}
    online = {key: sets[key] for key in ONLINE if key in sets}
    train = {"online": online} | {key: sets[key] for key in sets if key not in ONLINE}
    rollout = {key: sets[key] for key in ("prompt", "sampling") if key in sets}
    annotate = {key: sets[key] for key in ("annotator",) if key in sets}
    pipeline = {"convert": convert, "train": train} | ({"rollout": rollout} if rollout else {})
    if annotate and (sections is None or "annotate" in sections):
        pipeline["annotate"] = annotate
    places: dict[type[BaseModel], dict[str, Any]] = {
        ConvertConfig: convert,
        TrainConfig: train,
        PipelineConfig: pipeline,
    }
    return places[model]
