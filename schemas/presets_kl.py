"""Presets whose routed tokens have a divergence to the teacher: self-distillation and its kin."""

from typing import Any

from .preset import CONSTANT, Overrides, Preset, every_token, gate

_SOLVED = "{problem}\n\nFor reference, the correct answer is {context}. Use it to check your work, "
_WORKED = (
    "{problem}\n\nBelow is a worked example of another problem. It only shows careful reasoning: "
    "it is no hint, and its answer does not apply here.\n{context}\n\nNow solve the problem above."
)
_ADVICE = "{problem}\n\nAdvice on an earlier attempt:\n{context}\n\nNow solve it yourself."
# SDPO as published: the student's 100 likeliest tokens with a tail, a bounded ratio, a token mean.
_TOP_100 = {"top_k": 100, "importance_clip": 2.0, "aggregation": "token"}
_EMA = {"sync": "ema", "ema_rate": 0.05}


def _sdpo(**loss: Any) -> Overrides:
    return {
        "routing": every_token("jsd", "jsd", "peer"),
        "schedule": CONSTANT,
        "teacher": _EMA,
        "loss": {"grpo": False, "jsd_beta": 0.5, "entropy_beta": 0.0} | loss,
    }


def _srpo(**loss: Any) -> Overrides:
    return {
        "routing": every_token("none", "jsd", "peer"),
        "schedule": CONSTANT,
        "teacher": _EMA,
        "loss": {"grpo": True, "jsd_beta": 0.5, "entropy_beta": 1.0} | loss,
    }


def _opsd(context: str = "solution", **loss: Any) -> Overrides:
    """OPSD as its code has been since March 2026."""
    kl = {"grpo": False, "kl_clip": "entry_above", "kl_clip_value": 0.05, "entropy_beta": 0.0}
    return {
        "routing": every_token("fkl", "fkl", context),
        "schedule": CONSTANT,
        "teacher": {"sync": "frozen"},
        "loss": kl | {"aggregation": "token"} | loss,
        "prompt": {"thinking": False, "teacher_thinking": True},
        "sampling": {"temperature": 1.1},
    }


def _selected(*gates: dict[str, Any]) -> Overrides:
    """Reverse KL to another model on the tokens that gates select."""
    loss = {"grpo": False, "kl_clip": "none", "entropy_beta": 0.0, "gates": list(gates)}
    return {
        "routing": every_token("rkl", "rkl", "none"),
        "schedule": CONSTANT,
        "teacher": {"sync": "frozen"},
        "loss": loss,
    }


PRESETS: dict[str, Preset] = {
    "sdpo": Preset(
        "Divergence to an averaged teacher that reads a correct peer response; no GRPO.",
        "SDPO, arXiv 2601.20802",
        _sdpo(),
        certain="Context, teacher's average and divergence by its code.",
        choice="The whole vocabulary and no importance weight: sdpo-top100 has them as published.",
    ),
    "sdpo-top100": Preset(
        "sdpo over the student's 100 likeliest tokens and a tail, its ratio bounded by 2.",
        "SDPO, arXiv 2601.20802",
        _sdpo(**_TOP_100),
        certain="Context, average, divergence, support and bound by its code.",
        choice="No feedback from an environment: only responses with a correct peer are taught. "
        "Thoughts are not cut from the peer's response. Wording of the prompt ours.",
    ),
    "srpo": Preset(
        "GRPO on correct responses; on wrong ones with a correct peer SDPO, weighted exp(−βH).",
        "SRPO, arXiv 2604.02288",
        _srpo(),
        certain="The routing of responses, β = 1 and one sum of both losses by the paper's text.",
        choice="The weights exp(−βH) are not scaled to a mean of 1. SDPO's part as in preset sdpo.",
    ),
    "srpo-top100": Preset(
        "srpo over the student's 100 likeliest tokens and a tail, its ratio bounded by 2.",
        "SRPO, arXiv 2604.02288",
        _srpo(**_TOP_100),
        certain="As srpo; one mean over the tokens of both losses.",
        choice="SDPO's constants, as the paper's table of them was not at hand; else as srpo.",
    ),
    "opsd": Preset(
        "Clipped forward KL to the frozen base that reads the solution and thinks; no GRPO.",
        "OPSD, arXiv 2601.18734, as its code has been since March 2026",
        _opsd(),
        certain="Clip, temperature, thinking and the token mean by its code (8B: clip 0.06, from "
        "forks).",
        choice="Forward KL by forks of its scripts. Sampling by temperature alone: its top-p 0.95 "
        "and top-k 20 are left out. LoRA, learning rate and the limit of 1,024 tokens are the "
        "file's. The clip reverses the gradient of clipped entries (docs/decisions/kl-clip.md).",
    ),
    "opsd-v1": Preset(
        "Forward KL to the frozen base that reads the reference solution; no GRPO.",
        "OPSD, arXiv 2601.18734, first form",
        {
            "routing": every_token("fkl", "fkl", "solution"),
            "schedule": CONSTANT,
            "teacher": {"sync": "frozen"},
            "loss": {"grpo": False, "entropy_beta": 0.0},
        },
        certain="A teacher with the solution on every token.",
        choice="Forward KL without a clip to the first weights: by a reader's history of the "
        "paper. The first code release took a Jensen-Shannon divergence.",
    ),
    "foreign-solution": Preset(
        "opsd whose teacher reads the solution of another problem: a control.",
        "OP²SD, arXiv 2608.09228",
        _opsd("other_solution")
        | {"prompt": {"thinking": False, "teacher_thinking": True, "privileged": _WORKED}},
        certain="Only the teacher's context differs from OPSD's.",
        choice="Clip and thinking are those of its 1.7B runs (for 4B and 8B its code has 1e-6 and "
        "1e-7, and no thinking). The other problem is the next by id, not drawn, and its own text "
        "is not shown. Wording of the prompt ours.",
    ),
    "pw-opsd": Preset(
        "opsd whose later tokens weigh more.",
        "PW-OPSD, arXiv 2605.21606",
        _opsd(
            aggregation="sequence",
            gates=[gate("position", "rising", at=0.3, scale=0.1, floor=0.25)],
        ),
        certain="The weight, the clip and the mean within each response by its code.",
        choice="As opsd.",
    ),
    "tip": Preset(
        "Reverse KL to another model on the half of the tokens that matter most.",
        "TIP, arXiv 2604.14084",
        _selected(gate("importance", "above", quantile=0.5)),
        certain="Score, reverse KL and the share of one half; its teacher is a larger frozen model "
        "without a hint: give teacher.model.",
        choice="The threshold is the quantile of the step before over all responses, not the top "
        "half of each response; the divergence is cut at its 98th percentile as the entropy is; "
        "the first step takes every token; dropped tokens count in the mean.",
    ),
    "ta-opd": Preset(
        "Reverse KL to another model where it differs and the student is undecided.",
        "TA-OPD, arXiv 2605.26844",
        _selected(
            gate("divergence", "above", quantile=0.9),
            gate("student_entropy", "above", quantile=0.5),
        ),
        certain="An external frozen teacher without a hint (give teacher.model), few tokens (5 % "
        "in the abstract), reverse KL, a threshold over the batch.",
        choice="At most a tenth of the tokens. Its score is disagreement times the teacher's mass "
        "on the student's top 16, which no gate reads: high student entropy stands for it. Its "
        "disagreement is a forward KL on both sides' top 16. IER-OPD's signal-to-noise score has "
        "no gate either.",
    ),
    "sdpg": Preset(
        "GRPO, a reverse KL to the policy that reads the answer, and a KL to the base.",
        "SDPG, arXiv 2606.04036",
        {
            "routing": every_token("rkl", "none", "answer"),
            "schedule": {"w0": 1e-3, "decay_steps": None, "grpo": "keep"},
            "teacher": {"sync": "periodic", "sync_steps": 1, "temperature": 1.0},
            "loss": {
                "grpo": True,
                "clip_low": 0.2,
                "clip_high": 0.28,
                "aggregation": "token",
                "kl_clip": "token",
                "kl_clip_value": 20.0,
                "reference_kl": 1e-3,
                "entropy_beta": 0.0,
            },
            "prompt": {"privileged": _SOLVED + "but write out the full solution."},
        },
        certain="Weights, clips, teacher and context by its code's scripts; correct responses "
        "alone by the paper's page (in its code an option that is off).",
        choice="Groups of correct responses alone are taught too, unless "
        "drop_groups_without_signal. The KL to the base is r − log r − 1, its own "
        "½ (log r)²: equal to second order. Wording of the prompt ours.",
    ),
    "ssopd": Preset(
        "GRPO, and on the first tokens of wrong responses a forward KL to the shortest right peer.",
        "SSOPD, arXiv 2605.17497",
        {
            "routing": every_token("none", "fkl", "shortest_peer") | {"rule": "prefix"},
            "schedule": {"w0": 0.5, "decay_steps": None, "grpo": "keep"},
            "teacher": {"sync": "frozen"},
            "loss": {
                "grpo": True,
                "kl_clip": "entry_above",
                "kl_clip_value": 0.05,
                "entropy_beta": 0.0,
            },
        },
        certain="The shortest correct peer teaches prefixes of wrong responses in mixed groups.",
        choice="All wrong responses, where the method takes the longest; without its weight "
        "4 p (1 − p) of a group with share p right. λ 0.5, the frozen teacher and the clipped "
        "forward KL by one reader; the prefix is α of the response, and the clip's value ours.",
    ),
    "rosd": Preset(
        "Divergence from the first error on to a frozen teacher that reads a corrective idea.",
        "ROSD, arXiv 2605.28014",
        {
            "routing": {
                "rule": "from_first_span",
                "key": "none",
                "error": "jsd",
                "teacher_context": "reflection",
            },
            "schedule": CONSTANT,
            "teacher": {"sync": "frozen"},
            "loss": _TOP_100
            | {"grpo": False, "jsd_beta": 0.5, "kl_clip": "none", "entropy_beta": 0.0},
            "prompt": {"privileged": _ADVICE},
            "annotator": {"reflection": True},
        },
        certain="Tokens, divergence, top 100 with tail, importance bound and frozen teacher by its "
        "code.",
        choice="Correct responses, which it distils on all tokens with a reflection of their own, "
        "have none here. Its code adds a peer's full response to the idea, and takes the whole "
        "response where it finds no error. Wording of the prompt ours.",
    ),
    "antisd": Preset(
        "GRPO, and away from the policy that reads a correct peer where that is undecided.",
        "AntiSD, arXiv 2605.11609",
        {
            "routing": every_token("jsd", "jsd", "peer"),
            "schedule": {"w0": 0.5, "start_step": 5, "decay_steps": None, "grpo": "keep"},
            "teacher": {"sync": "periodic", "sync_steps": 1},
            "loss": {
                "grpo": True,
                "clip_low": 0.2,
                "clip_high": 0.2,
                "jsd_beta": 0.5,
                "key_weight": -1.0,
                "error_weight": -1.0,
                "kl_clip": "none",
                "entropy_beta": 0.0,
                "gates": [gate("teacher_entropy", "above", at=0.1)],
            },
        },
        certain="λ 0.5 after five steps without it, ascent of the Jensen-Shannon divergence on "
        "all tokens, live weights, clip 0.2 by the paper.",
        choice="Its gate is one switch for the batch, off when the median of the teacher's entropy "
        "falls below 0.93 of its value in the first five steps; here each token has its own, at "
        "0.1 nats: set it to your model's. The exact divergence takes the place of its "
        "estimate at the sampled token. Without a correct peer it reads the solution; here GRPO. "
        "The verdict on the response is not shown.",
    ),
}
