"""Presets of the paper: TRACE, which its second version calls STEPS, and its ablations."""

from dataclasses import replace

from .preset import Overrides, Preset

_TRACE = "TRACE, arXiv 2605.10194 (v2: STEPS)"
_CORNER = "Corners, teacher and schedule are the paper's (METHOD.md)."
_SILENT = "The annotator's prompt, the learning rate and the group size are not in the paper."


def _self_distillation(rule: str, **routing: str) -> Overrides:
    """TRACE's teacher and objective on the tokens chosen by a rule."""
    return {
        "routing": {"rule": rule, "teacher_context": "type", **routing},
        "teacher": {"sync": "periodic"},
        "loss": {"grpo": True, "entropy_beta": 0.0},
    }


def _ablation(summary: str, rule: str, **routing: str) -> Preset:
    return Preset(
        summary,
        _TRACE + ", localisation ablation",
        _self_distillation(rule, **routing),
        certain="The mask is the paper's ablation; teacher and schedule are TRACE's.",
        choice=_SILENT,
    )


def _steps(preset: Preset) -> Preset:
    """The same under the name of the paper's second version."""
    return replace(
        preset,
        source="STEPS, arXiv 2605.10194v2 (v1: TRACE)",
        choice="v2's text was not at hand: the settings are v1's. " + preset.choice,
    )


_FKL = Preset(
    "Forward KL on key spans of correct responses, for a strong base.",
    _TRACE,
    _self_distillation("spans", key="fkl", error="none"),
    certain=_CORNER,
    choice=_SILENT,
)
_RKL = Preset(
    "Reverse KL on error spans of wrong responses, for a weak base.",
    _TRACE,
    _self_distillation("spans", key="none", error="rkl"),
    certain=_CORNER,
    choice=_SILENT,
)
PRESETS: dict[str, Preset] = {
    "trace-fkl": _FKL,
    "trace-rkl": _RKL,
    "trace-both": Preset(
        "Forward KL on key spans and reverse KL on error spans.",
        _TRACE,
        _self_distillation("spans", key="fkl", error="rkl"),
        certain=_CORNER,
        choice=_SILENT,
    ),
    "steps-fkl": _steps(_FKL),
    "steps-rkl": _steps(_RKL),
    "grpo": Preset(
        "GRPO alone: no teacher, no annotation.",
        "arXiv 2402.03300",
        {
            "routing": {"rule": "spans", "key": "none", "error": "none", "teacher_context": "type"},
            "schedule": {"w0": 0.0},
            "loss": {"grpo": True},
        },
        certain="The clipped surrogate with group-normalised advantages.",
        choice="DAPO's higher upper clip, 0.28; no KL to the base policy.",
    ),
    "all-token-fkl": _ablation(
        "Forward KL to the type-label teacher on every token.", "all", key="fkl", error="fkl"
    ),
    "all-token-rkl": _ablation(
        "Reverse KL to the type-label teacher on every token.", "all", key="rkl", error="rkl"
    ),
    "random-alpha": _ablation("The config's corner on a random share α of the tokens.", "random"),
    "inverted-alpha": _ablation(
        "The config's corner on a share α of the tokens outside the annotated spans.", "inverted"
    ),
}
