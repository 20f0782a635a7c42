"""Arrow contracts of results, which no later stage trains on.

Stage evaluate writes EVALUATIONS, stage train VALIDATIONS, and `trace-opd compare` COMPARISONS and
VERDICT_COMPARISONS.
"""

import pyarrow as pa

from .contract import described, make_contract
from .labels import AnnotationStatus

_text, _count, _figure = pa.string(), pa.int64(), pa.float64()

_PROBLEM_ID = described("problem_id", _text, "Hash of source, problem text and answer.")

EVALUATIONS = make_contract(
    "evaluations",
    1,
    [
        described("evaluation_id", _text, "Hash of problem, policy and sampling parameters."),
        _PROBLEM_ID,
        described("source", _text, "Where the problem comes from."),
        described("policy", _text, "Role of the policy in this evaluation."),
        described("policy_name", _text, "Name of the policy."),
        described("policy_revision", _text, "Hash of its model files."),
        described("k", pa.int32(), "Scored samples of this problem."),
        described("correct", pa.int32(), "How many of them are right."),
        described(
            "majority_correct",
            pa.float32(),
            "Probability that the majority answer is right; a truncated sample has no vote. Null "
            "without a scored sample.",
            True,
        ),
        described(
            "mean_tokens",
            pa.float32(),
            "Mean response length in tokens; null where the sampler keeps no token ids.",
            True,
        ),
        described("truncated", pa.int32(), "Samples that hit the token limit."),
        described("unscored", pa.int32(), "Samples that the verifier could not score."),
    ],
    "evaluation_id",
)

VALIDATIONS = make_contract(
    "validations",
    1,
    [
        described("validation_id", _text, "Hash of step, split, decoding and problem."),
        described("step", pa.int32(), "Optimiser steps done."),
        described("split", _text, "Name of the split in train.validation.problems."),
        described("decoding", _text, "sampled (online.sampling) or greedy."),
        _PROBLEM_ID,
        described("k", pa.int32(), "Scored answers to this problem."),
        described("correct", pa.int32(), "How many of them are right."),
        described(
            "tokens",
            pa.int32(),
            "Response tokens, all answers together; null where the sampler keeps none (vLLM's "
            "greedy "
            "answers).",
            True,
        ),
        described(
            "entropy",
            pa.float32(),
            "Mean negative log-probability of the sampled tokens, nats: an estimate of the "
            "policy's "
            "entropy under sampling; null for greedy, whose tokens are no samples.",
            True,
        ),
        described("truncated", pa.int32(), "Answers that hit the token limit."),
    ],
    "validation_id",
)

# The columns of COMPARISONS, in order.
_WHAT = (
    ("comparison_id", _text, "Both datasets, the problem and the kind."),
    ("reference", _text, "Name of the annotations taken as the reference."),
    ("other", _text, "Name of the annotations compared with it."),
    ("reference_dataset", _text, "The reference's stage/id."),
    ("other_dataset", _text, "The other's stage/id."),
    ("kind", _text, "Which spans: key, error, or all (rows of both kinds, each by its own)."),
    ("unit", _text, "Unit of agreement: tokens or characters."),
    ("alpha", _figure, "The coverage cap of the capped figures."),
    ("problems", _count, "Problems in this row: 1 in a problem's own row."),
)
_COUNTS = {
    "rollouts": "Rollouts that all named datasets hold, of this kind.",
    "judged": "Of them, those that both annotators answered (ok or empty) for the same kind of "
    "span.",
    "only_reference": "Answered by the reference alone.",
    "only_other": "Answered by the other annotator alone.",
    "neither": "Answered by neither.",
    "asked_differently": "One searched for key spans, the other for error spans; in kind all.",
    "both_empty": "Judged rollouts in which neither marks anything: κ and IoU do not count them.",
    "units": "Units of the judged rollouts.",
    "reference_marked": "Units that the reference marks.",
    "other_marked": "Units that the other annotator marks.",
    "both_marked": "Units that both mark.",
    "reference_kept": "Units that the reference marks and the cap keeps.",
    "other_kept": "Units that the other annotator marks and the cap keeps.",
    "both_kept": "Units that both mark and the cap keeps for both.",
    "same_segments": "Judged rollouts cut into the same segments: segment figures are over these.",
    "reference_segments": "Segments that the reference marks.",
    "other_segments": "Segments that the other annotator marks.",
    "both_segments": "Segments that both mark.",
    "typed": "Judged rollouts with a diagnostic type from both.",
    "same_type": "Of them, those with the same type.",
    "wrong": "Rollouts in which the reference marks an error, in kind all.",
    "wrong_hit": "Of them, those whose first error the other annotator found.",
    "right": "Rollouts without a wrong step according to the reference, in kind all.",
    "right_hit": "Of them, those without a wrong step according to the other annotator.",
    "unlabelled": "Rollouts that the reference counts as neither, in kind all.",
}
_FIGURES = {
    "kappa": "Cohen's κ over units; null where both mark none or all.",
    "iou": "Units that both mark over units that either marks; null where neither marks any.",
    "capped_kappa": "κ over the units that the cap keeps: what training would see.",
    "capped_iou": "IoU over the units that the cap keeps.",
    "segment_precision": "Of the other's marked segments, the share that the reference marks.",
    "segment_recall": "Of the reference's marked segments, the share that the other marks.",
    "segment_f1": "Harmonic mean of the two.",
    "type_agreement": "same_type / typed.",
    "wrong_accuracy": "wrong_hit / wrong: ProcessBench's accuracy on erroneous responses.",
    "right_accuracy": "right_hit / right: ProcessBench's accuracy on correct responses.",
    "first_error_f1": "Harmonic mean of the two: ProcessBench's F1.",
}
_OWN_COUNTS = {
    **{status.value: f"Rollouts with status {status.value}." for status in AnnotationStatus},
    "cap_hits": "Rollouts whose marks the cap cuts.",
}
_OWN_FIGURES = {
    "coverage": "Share of units marked, over all that this annotator answered.",
    "capped_coverage": "Share of units that the cap keeps.",
    "prompt_tokens": "Billed prompt tokens; null if one is unknown.",
    "completion_tokens": "Billed completion tokens; null if one is unknown.",
    "cost_usd": "US dollars; null if one price is unknown.",
}
_CONFUSION = pa.list_(
    pa.struct([("reference_type", _text), ("other_type", _text), ("rollouts", _count)])
)


def _fields() -> list[pa.Field]:
    fields = [described(*column) for column in _WHAT]
    fields.append(described("problem_id", _text, "The problem; null in the overall row.", True))
    fields += [described(name, _count, what) for name, what in _COUNTS.items()]
    for name, what in _FIGURES.items():
        fields.append(described(name, _figure, what, True))
        for end, edge in (("low", "Lower"), ("high", "Upper")):
            bound = f"{edge} end of its 95 % interval, in overall rows."
            fields.append(described(f"{name}_{end}", _figure, bound, True))
    for side, who in (("reference", "Reference: "), ("other", "Other: ")):
        fields += [described(f"{side}_{name}", _count, who + w) for name, w in _OWN_COUNTS.items()]
        fields += [
            described(f"{side}_{name}", _figure, who + w, True) for name, w in _OWN_FIGURES.items()
        ]
    types = "Rollouts by both annotators' types, pairs that occur, in overall rows."
    return [*fields, described("confusion", _CONFUSION, types, True)]


COMPARISONS = make_contract("comparisons", 1, _fields(), "comparison_id")

_AGREEMENTS = {
    "accuracy": "Share of equal verdicts, of the rollouts that both judge.",
    "kappa": "Cohen's κ of right and wrong; null where both call all alike.",
    "right_accuracy": "Of the rollouts right by the reference, the share called right.",
    "wrong_accuracy": "Of the rollouts wrong by the reference, the share called wrong.",
}
VERDICT_COMPARISONS = make_contract(
    "verdict_comparisons",
    1,
    [
        described("comparison_id", _text, "Both datasets, both names, the problem."),
        described("reference", _text, "Dataset or part taken as the reference."),
        described("other", _text, "Dataset or part compared with it."),
        described("reference_dataset", _text, "The reference's stage/id."),
        described("other_dataset", _text, "The other's stage/id."),
        described("problem_id", _text, "The problem; null: all problems.", True),
        described(
            "correct_at", _figure, "Least value of a part that is right; null: datasets.", True
        ),
        described("problems", _count, "Problems in this row: 1 in a problem's own row."),
        described("rollouts", _count, "Rollouts that both hold."),
        described("only_reference", _count, "Scored by the reference alone."),
        described("only_other", _count, "Scored by the other alone."),
        described("neither", _count, "Scored by neither."),
        described("both_right", _count, "Right by both."),
        described("both_wrong", _count, "Wrong by both."),
        described("reference_right", _count, "Right by the reference, wrong by the other."),
        described("other_right", _count, "Right by the other, wrong by the reference."),
        *(described(name, _figure, text, True) for name, text in _AGREEMENTS.items()),
        *(
            described(f"{name}_{end}", _figure, f"{end.title()} end of its 95 % interval.", True)
            for name in _AGREEMENTS
            for end in ("low", "high")
        ),
    ],
    "comparison_id",
)
