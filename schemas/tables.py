"""Arrow contracts of the tables that stages exchange: problems to routed.

Each stage writes one; `contract.validate` checks a table against it. See results.py for results.
"""

import pyarrow as pa
import pyarrow.compute as pc

from .columns import (
    BOOL,
    CORRECT,
    FLOAT32,
    GROUP_ID,
    INT32,
    MOST,
    POLICY,
    POLICY_MASK,
    PROBLEM_ID,
    ROLLOUT_ID,
    STRING,
    TOKEN_RANGES,
    TOKENS,
    TYPE,
)
from .contract import described, make_contract
from .conversation import HISTORY, ODD_TURNS, odd_turns
from .labels import (
    TYPE_LABELS,
    AnnotationStatus,
    AnswerKind,
    FinishReason,
    LeftOut,
    Selection,
    SpanKind,
    TurnRole,
    VerdictStatus,
)
from .results import EVALUATIONS
from .reward_columns import no_json_objects, odd_parts
from .spans import misplaced_spans, torn_segments
from .table_faults import (
    NO_MISTAKE,
    UNWRITTEN,
    mistake_in_key,
    mistake_in_right,
    unwritten,
)
from .training_tables import ROUTED, SCORES

PROBLEMS = make_contract(
    "problems",
    1,
    [
        PROBLEM_ID,
        described(
            "problem", STRING, "The problem as the student sees it, without prompt template."
        ),
        described("answer", STRING, "Gold final answer; the letter for multiple choice."),
        described("answer_kind", STRING, "How answers are compared: math, choice or text."),
        described(
            "solution",
            STRING,
            "Reference solution: the annotator sees it, TRACE's teacher never, a baseline's under "
            "routing.teacher_context=solution.",
            True,
        ),
        described(
            "steps",
            pa.list_(
                pa.struct(
                    [
                        described("text", STRING, "The step as a correct response writes it."),
                        described("value", STRING, "The value that the step establishes."),
                        described("type", STRING, "The step's label of DiagnosticType."),
                        described("key", BOOL, "Whether the step is critical to the solution."),
                    ]
                )
            ),
            "Known intermediate steps in order, for the rule annotator.",
            True,
        ),
        described("source", STRING, "Where the problem comes from."),
        described("split", STRING, "Split of the source: train, validation or test."),
        described("source_id", STRING, "The row's own id in its source.", True),
        described("subject", STRING, "The subject, as the source names it.", True),
        described("level", STRING, "The difficulty, as the source gives it.", True),
        described(
            "metadata",
            STRING,
            "What rewards need besides the answer, a JSON object: tests of a program, the settings "
            "of a task. No prompt shows it.",
            True,
        ),
        HISTORY,
    ],
    "problem_id",
    labels={"answer_kind": AnswerKind},
    nested_labels={("history", "role"): TurnRole},
    optional=("source_id", "subject", "level", "metadata", "history"),
    faults=(
        (*ODD_TURNS, odd_turns),
        (
            "metadata",
            "is no JSON object; write a mapping as JSON text, or null",
            no_json_objects,
        ),
    ),
)

ROLLOUTS = make_contract(
    "rollouts",
    1,
    [
        ROLLOUT_ID,
        PROBLEM_ID,
        GROUP_ID,
        described("sample_index", INT32, "Index of the response in its group, from 0."),
        *TOKENS,
        described(
            "response", STRING, "The response's text: the bytes of token_ids without specials."
        ),
        described("finish_reason", STRING, "stop or length."),
        *POLICY,
        described("temperature", FLOAT32, "Sampling temperature."),
        described("top_p", FLOAT32, "Nucleus threshold; 1 is off."),
        described("top_k", INT32, "Top-k; 0 is off."),
        described("max_new_tokens", INT32, "Limit on response tokens."),
        described("seed", pa.int64(), "The sample's own seed."),
        described(
            "on_policy",
            BOOL,
            "Whether ids and log-probabilities are the sampler's own; rows without them can be "
            "annotated and evaluated but not trained on.",
        ),
        POLICY_MASK,
    ],
    "rollout_id",
    optional=("policy_mask",),
    labels={"finish_reason": FinishReason},
    same_length=(("token_ids", "logprobs", "policy_mask"),),
    ranges=TOKEN_RANGES,
    faults=((*UNWRITTEN, unwritten),),
)

VERDICTS = make_contract(
    "verdicts",
    1,
    [
        ROLLOUT_ID,
        PROBLEM_ID,
        GROUP_ID,
        described("reward", FLOAT32, "1 correct, 0 wrong; null: the response is not scored.", True),
        CORRECT,
        described("parsed_answer", STRING, "Final answer read from the response.", True),
        described("status", STRING, "How the verification ended (VerdictStatus)."),
        described("verifier", STRING, "Verifier and version."),
        described("seconds", FLOAT32, "Time that the verification took."),
        described("feedback", STRING, "What a reward says: a judge's reason, say.", True),
        described(
            "parts",
            pa.list_(
                pa.struct(
                    [
                        described("name", STRING, "The part's name in verify.rewards."),
                        described("value", FLOAT32, "Its value, 0 … 1; null: it has none.", True),
                        described("status", STRING, "How it ended (VerdictStatus)."),
                        described("seconds", FLOAT32, "Time that it took."),
                    ]
                )
            ),
            "The parts of verify.rewards in order, whose weighted mean is the reward; empty for a "
            "truncated response.",
            True,
        ),
        described(
            "grades",
            pa.list_(
                pa.struct(
                    [
                        described("name", STRING, "The judge's name in verify.rewards."),
                        described("repeat", INT32, "Which of its repeats, from 0."),
                        described("order", STRING, "Which text came first (Order)."),
                        described("grade", INT32, "The grade; null: there is none.", True),
                        described("status", STRING, "How it ended (VerdictStatus)."),
                        described("reason", STRING, "The judge's reason, or the error.", True),
                    ]
                )
            ),
            "Every grade that judges of verify.rewards gave; empty for a truncated response.",
            True,
        ),
        described(
            "selection",
            STRING,
            "What stage select decides (Selection); tables without the column: annotate.",
        ),
        described(
            "left_out", STRING, "Why stage select does not select it (LeftOut); else null.", True
        ),
    ],
    "rollout_id",
    optional=("feedback", "parts", "grades", "selection", "left_out"),
    labels={"status": VerdictStatus, "selection": Selection, "left_out": LeftOut},
    ranges={"reward": (-MOST, MOST)},
    faults=(
        (
            "correct",
            "is null in a row with a reward; say whether the response is right",
            lambda table: pc.and_(pc.is_valid(table["reward"]), pc.is_null(table["correct"])),
        ),
        ("parts", "has a value that is not in 0 … 1, or an unknown status", odd_parts),
    ),
)

ANNOTATIONS = make_contract(
    "annotations",
    1,
    [
        ROLLOUT_ID,
        PROBLEM_ID,
        GROUP_ID,
        CORRECT,
        described(
            "segments",
            pa.list_(
                pa.struct(
                    [
                        described("start", INT32, "First character, in Unicode code points."),
                        described("end", INT32, "One past the last character."),
                    ]
                )
            ),
            "The response cut into segments; their texts concatenated are the response.",
        ),
        described(
            "spans",
            pa.list_(
                pa.struct(
                    [
                        described(
                            "segments", pa.list_(INT32), "Consecutive segment indices, from 0."
                        ),
                        described("kind", STRING, "key or error."),
                        described("rank", INT32, "The annotator's order of importance, from 0."),
                        described("start", INT32, "First character in the response."),
                        described("end", INT32, "One past the last character."),
                        described("text", STRING, "The span's text."),
                    ]
                )
            ),
            "Marked spans in order of rank.",
        ),
        TYPE,
        described("status", STRING, "How the annotation ended (AnnotationStatus)."),
        described("annotator_name", STRING, "The annotator's name in its config."),
        described("annotator_model", STRING, "The model behind it."),
        described("prompt_version", STRING, "Version of the annotation prompt; empty for rules."),
        described("raw_answer", STRING, "The annotator's answer as received.", True),
        described("error", STRING, "Why the answer is invalid or the call failed.", True),
        described(
            "prompt_tokens",
            INT32,
            "Billed prompt tokens, corrective turns included. Rows with the same question share "
            "one answer: the first of them has its tokens, cost and time, the others have 0.",
            True,
        ),
        described("completion_tokens", INT32, "Billed completion tokens, as prompt_tokens.", True),
        described(
            "cost_usd",
            pa.float64(),
            "US dollars of the answers that this row is the first to have, so that the column sums "
            "to the dataset's cost; null if the price is unknown.",
            True,
        ),
        described("latency_s", FLOAT32, "Seconds from request to answer, as prompt_tokens."),
        described(
            "reflection",
            STRING,
            "The annotator's corrective idea, for the teacher context reflection; TRACE's teacher "
            "never sees it.",
            True,
        ),
    ],
    "rollout_id",
    optional=("reflection",),
    labels={"status": AnnotationStatus, "diagnostic_type": TYPE_LABELS},
    nested_labels={("spans", "kind"): SpanKind},
    faults=(
        (
            "segments",
            "does not follow the segment before from character 0, or has a null; cut the response "
            "so that the segments cover it",
            torn_segments,
        ),
        (
            "spans",
            "has a span that names no segment of this row, or whose start and end are not those of "
            "its segments, or a null",
            misplaced_spans,
        ),
        (*NO_MISTAKE, mistake_in_right),
        (*NO_MISTAKE, mistake_in_key),
    ),
)

CONTRACTS = {
    c.name: c for c in (PROBLEMS, ROLLOUTS, VERDICTS, ANNOTATIONS, ROUTED, SCORES, EVALUATIONS)
}
