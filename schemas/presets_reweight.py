"""Presets whose teacher scales or shifts GRPO's advantage, token by token."""

from typing import Any

from .preset import Overrides, Preset, every_token, gate

_ADVICE = "{problem}\n\nAdvice on an earlier attempt:\n{context}\n\nNow solve it yourself."
_LIVE = {"sync": "periodic", "sync_steps": 1}
_STEADY = {"w0": 0.5, "decay_steps": None}


def _reweight(
    form: str,
    routing: dict[str, Any],
    schedule: dict[str, Any],
    teacher: dict[str, Any],
    **loss: Any,
) -> Overrides:
    return {
        "routing": routing,
        "schedule": schedule,
        "teacher": teacher,
        "loss": {"grpo": True, "reweight": form, "entropy_beta": 0.0} | loss,
    }


def _both(context: str, **routing: Any) -> dict[str, Any]:
    return every_token("reweight", "reweight", context, **routing)


PRESETS: dict[str, Preset] = {
    "rlsd": Preset(
        "GRPO whose tokens weigh by the likelihood ratio of a teacher that reads the solution.",
        "RLSD, arXiv 2604.03128",
        _reweight(
            "ratio",
            _both("solution"),
            {"w0": 0.5, "hold_steps": 0, "decay_steps": 50},
            {"sync": "periodic"},
            reweight_clip=0.2,
        ),
        certain="Form, ε and λ by its code, whose script decays λ over 60 steps.",
        choice="50 steps are the paper's by two readers. The teacher is copied every "
        "teacher.sync_steps, 10 by default; the script has 20. Its context is the answer field of "
        "its data: here the reference solution.",
    ),
    "rlrt": Preset(
        "RLSD's ratio inverted on correct responses: what the teacher did not expect counts more.",
        "RLRT, arXiv 2605.10781",
        _reweight(
            "inverse",
            every_token("reweight", "none", "peer"),
            _STEADY,
            _LIVE,
            reweight_clip=1.0,
        ),
        certain="Correct responses alone gain where the student left the teacher's path.",
        choice="By readers and ports, not the paper's text: form, λ 0.5, ε 1.0 for base models "
        "(instruct 0.5, thinking 0.2), a correct peer as context. The only correct response of a "
        "group is GRPO.",
    ),
    "rlcsd": Preset(
        "GRPO plus the teacher's gap between a correct and wrong peers as hints, sign kept.",
        "RLCSD, arXiv 2606.11709",
        _reweight(
            "bounded",
            _both("peer", contrast_context="wrong_peer", contrasts=4),
            _STEADY,
            {"sync": "periodic", "sync_steps": 10},
            reweight_scale=0.02,
            reweight_threshold=0.02,
            clip_low=0.2,
            clip_high=0.2,
        ),
        certain="Hints, K = 4, scale, threshold, λ, clip and the copy every 10 steps by its code's "
        "configs (8B); the form by the README and by two readers of the paper.",
        choice="One mean over all tokens, where it takes one of the changed and one of the others; "
        "responses without both hints are GRPO, where it drops them; peers are the first, where it "
        "draws them; their whole response, without the boxed answer again.",
    ),
    "dasd": Preset(
        "GRPO plus the teacher's gap: towards it on low-entropy tokens, away on high-entropy ones.",
        "DASD, arXiv 2605.22263",
        _reweight(
            "bounded",
            _both("solution"),
            _STEADY,
            _LIVE,
            reweight_scale=1.0,
            gates=[gate("student_entropy", "signed", quantile=0.8, scale=0.5)],
        ),
        certain="Directions by the student's entropy, from a teacher with privileged context.",
        choice="The formula is one reader's, with gaps: λ, the gap's scale, the quantile's side "
        "(here a fifth of the tokens is pushed away), the width 0.5 nats and the context are ours. "
        "The quantile is the step before's over all responses, not each response's; small gaps are "
        "not damped; the advantage keeps its sign.",
    ),
    "egrsd": Preset(
        "rlsd where the teacher is sure, less of it where it is not.",
        "EGRSD, arXiv 2605.13255",
        _reweight(
            "ratio",
            _both("solution"),
            _STEADY,
            _LIVE,
            reweight_clip=0.2,
            gates=[gate("teacher_entropy", "falling", at=0.5, scale=0.25, floor=0.1)],
        ),
        certain="The reward's direction, a likelihood ratio's size, and a gate that falls with the "
        "teacher's entropy to a floor above 0.",
        choice="No formula was to be found: gate, numbers, λ, ε and context are ours.",
    ),
    "amr-sd": Preset(
        "GRPO stronger on wrong tokens that a teacher with a corrective idea finds unlikely.",
        "AMR-SD, arXiv 2605.18529",
        _reweight(
            "one_sided",
            every_token("none", "reweight", "reflection"),
            {"w0": 0.1, "hold_steps": 0, "decay_steps": 50},
            _LIVE,
            reweight_clip=5.0,
            reweight_threshold=0.5,
        )
        | {"prompt": {"privileged": _ADVICE}, "annotator": {"reflection": True}},
        certain="The policy's own reflection is the teacher's context. What it raises in correct "
        "responses and lowers in wrong ones counts more, the rest is unchanged.",
        choice="By one reader: form, λ 0.1 (0.2 on correct responses), bound 5, decay over 50 "
        "steps. The threshold of 0.5 nats is ours. The annotator reflects on wrong responses "
        "alone, so correct ones are GRPO. Wording of the prompt ours.",
    ),
    "credit": Preset(
        "GRPO plus what the problem's own solution adds over another problem's, sign kept.",
        "CREDIT, arXiv 2605.11613",
        _reweight(
            "bounded",
            _both("solution", contrast_context="other_solution"),
            _STEADY,
            {"sync": "ema", "ema_rate": 0.05},
            reweight_scale=1.0,
        ),
        certain="The teacher's credit less what unrelated inputs give as well.",
        choice="Its formula was not to be found, so this is a form of ours under its idea: it "
        "contrasts inputs, here the contexts differ; it has a reverse KL's gradient, here the "
        "advantage moves; all numbers are ours.",
    ),
}
