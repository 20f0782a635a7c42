"""`trace-opd presets`: a table of the presets, and one preset with what it sets.

The columns are read from what a preset sets, so that a new preset has its row.
"""

from typing import Any

from rich.console import Console
from rich.table import Table

from ...schemas.configs import LossConfig, RoutingConfig, ScheduleConfig, TeacherConfig
from ...schemas.labels import KlClip, Route, TeacherContext
from ...schemas.preset import Preset
from ...schemas.presets import PRESETS, preset_named
from ..terminal import Terminal, print_data

COLUMNS = ("tokens", "teacher", "action", "gate", "schedule", "source")
# A pipe has no width: its lines are for grep.
_UNBOUNDED = 400
_FILES = "the file's"
_RULES = {
    "all": "all",
    "spans": "annotated spans",
    "from_first_span": "from the first span on",
    "prefix": "the first α",
    "random": "random α",
    "inverted": "α outside the spans",
}


def print_presets(console: Console, as_json: bool) -> None:
    """All presets as a table, or as JSON with what each sets and its notes."""
    if as_json:
        print_data([_data(name, preset) for name, preset in PRESETS.items()])
        return
    table = Table("preset", *COLUMNS, box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for name, preset in PRESETS.items():
        table.add_row(name, *columns(preset).values())
    out = console if console.is_terminal else Terminal(width=_UNBOUNDED)
    out.print(table)


def print_preset(name: str, console: Console, as_json: bool) -> None:
    """One preset: summary, row of the table, notes and settings.

    Raises:
        InputError: an unknown preset.
    """
    preset = preset_named(name)
    if as_json:
        print_data(_data(name, preset))
        return
    lines = [f"{name}: {preset.summary} ({preset.source})"]
    row = {heading: text for heading, text in columns(preset).items() if heading != "source"}
    row |= {"certain": preset.certain, "our choice": preset.choice}
    lines += [f"  {heading + ':':12}{text}" for heading, text in row.items() if text]
    lines += ["  sets:", *(f"    {text}" for text in preset.overrides)]
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def columns(preset: Preset) -> dict[str, str]:
    """The row of a preset by COLUMNS."""
    return {
        "tokens": _tokens(preset),
        "teacher": _teacher(preset),
        "action": _action(preset),
        "gate": _gate(preset),
        "schedule": _schedule(preset),
        "source": preset.source,
    }


def _data(name: str, preset: Preset) -> dict[str, Any]:
    return {
        "name": name,
        "summary": preset.summary,
        **columns(preset),
        "certain": preset.certain,
        "choice": preset.choice,
        "sets": preset.sets,
    }


def _routed(preset: Preset) -> dict[str, str]:
    """By the kind of responses the action on them, without those that stay GRPO's."""
    routing = preset.sets["routing"]
    kinds = {"correct": routing.get("key", _FILES), "wrong": routing.get("error", _FILES)}
    return {kind: action for kind, action in kinds.items() if action != Route.GRPO.action}


def _tokens(preset: Preset) -> str:
    routed = _routed(preset)
    if not routed:
        return "none"
    rule = preset.sets["routing"]["rule"]
    which = f" of {next(iter(routed))} responses" if len(routed) == 1 else ""
    return f"{_RULES.get(rule, rule)}{which}"


def _teacher(preset: Preset) -> str:
    if not _routed(preset):
        return "none"
    routing = RoutingConfig.model_validate(preset.sets["routing"])
    teacher = TeacherConfig.model_validate(preset.sets.get("teacher", {}))
    every = {None: "periodic copy", 1: "copy each step"}
    steps = preset.sets.get("teacher", {}).get("sync_steps")
    weights = {
        "frozen": "frozen",
        "ema": f"average, {teacher.ema_rate:g} a step",
        "periodic": every.get(steps, f"copy every {steps} steps"),
    }[teacher.sync]
    alone = routing.teacher_context is TeacherContext.NONE
    context = f"{weights}; {'problem alone' if alone else routing.teacher_context.value}"
    if routing.contrast_context is None:
        return context
    several = f" (at most {routing.contrasts})" if routing.contrasts > 1 else ""
    return f"{context} against {routing.contrast_context.value}{several}"


def _action(preset: Preset) -> str:
    loss = LossConfig.model_validate(preset.sets["loss"])
    weights = {"correct": loss.key_weight, "wrong": loss.error_weight}
    routed = {
        kind: _signed(action, weights[kind], loss) for kind, action in _routed(preset).items()
    }
    if not routed:
        return "GRPO"
    if len(set(routed.values())) == 1:
        what = next(iter(routed.values()))
    else:
        what = ", ".join(f"{action} on {kind}" for kind, action in routed.items())
    if not loss.grpo:
        return f"{what}, no GRPO"
    return f"GRPO + {what}" if preset.sets.get("schedule", {}).get("grpo") == "keep" else what


def _signed(action: str, weight: float, loss: LossConfig) -> str:
    """An action with its weight, and the form of a reweighting or of a divergence."""
    form = f" {loss.reweight}" if action == Route.REWEIGHT.action else ""
    top = f" (top {loss.top_k})" if loss.top_k is not None else ""
    clip = f" clipped at {loss.kl_clip_value:g}" if loss.kl_clip is not KlClip.NONE else ""
    factor = {1.0: "", -1.0: "−"}.get(weight, f"{weight:g} ")
    return f"{factor}{action}{form}{top}{clip}"


def _gate(preset: Preset) -> str:
    loss = LossConfig.model_validate(preset.sets["loss"])
    parts = [f"exp(−{loss.entropy_beta:g} H)"] if loss.entropy_beta else []
    for gate in loss.gates:
        place = f"{gate.at:g}" if gate.at is not None else f"its {gate.quantile:g} quantile"
        between = "around" if gate.shape in ("rising", "falling", "signed") else ""
        parts.append(" ".join(filter(None, (gate.of.value, gate.shape, between, place))))
    if loss.importance_clip is not None:
        parts.append(f"ratio ≤ {loss.importance_clip:g}")
    return ", ".join(parts)


def _schedule(preset: Preset) -> str:
    if "schedule" not in preset.sets:
        return f"{_FILES} λ"
    schedule = ScheduleConfig.model_validate(preset.sets["schedule"])
    begins = f" from step {schedule.start_step} on" if schedule.start_step else ""
    if schedule.decay_steps is None or schedule.w0 == 0:
        return f"λ {schedule.w0:g}{begins}"
    return f"λ {schedule.w0:g}{begins} to 0 in {schedule.hold_steps + schedule.decay_steps} steps"
