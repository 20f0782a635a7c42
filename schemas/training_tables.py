"""Arrow contracts of what training reads: routed sequences, and a teacher's scores of them."""

import pyarrow as pa

from .columns import (
    BOOL,
    FLOAT32,
    GROUP_ID,
    INT32,
    MOST,
    MOST_LOGPROB,
    MOST_TOKEN_ID,
    POLICY,
    POLICY_MASK,
    PROBLEM_ID,
    ROLLOUT_ID,
    ROUTES,
    STRING,
    TOKEN_RANGES,
    TOKENS,
    TYPE,
)
from .contract import described, list_of, make_contract
from .conversation import HISTORY, ODD_TURNS, odd_turns
from .labels import TYPE_LABELS, Route, TurnRole
from .table_faults import (
    FOREIGN_ROUTE,
    NO_MISTAKE,
    UNWRITTEN,
    misfit,
    mistake_in_right,
    routed_foreign,
    uncompared,
    uneven_scores,
    unordered_positions,
    untaught,
    unwritten,
)

ROUTED = make_contract(
    "routed",
    2,
    [
        ROLLOUT_ID,
        PROBLEM_ID,
        GROUP_ID,
        described(
            "problem",
            STRING,
            "The problem; TRACE's teacher sees it, its history and the type label only.",
        ),
        *TOKENS,
        described("temperature", FLOAT32, "Sampling temperature that logprobs refer to."),
        described("reward", FLOAT32, "The verifier's reward, shaped by routing.overlong."),
        described(
            "advantage",
            FLOAT32,
            "(reward − group mean) / (group std + ε); under routing.advantage mean not divided.",
        ),
        described("correct", BOOL, "Whether the response is right."),
        described("truncated", BOOL, "Whether the response hit the token limit."),
        described(
            "route",
            list_of(pa.uint8()),
            f"Route of each response token: {ROUTES}. A token belongs "
            "to the segment that holds most of its bytes, ties to the earlier one.",
        ),
        described(
            "span_id",
            list_of(pa.int16()),
            "Rank of the span that a token is routed for, −1 for none; rules that follow no span "
            "have a single span 0, which is not the annotator's.",
        ),
        TYPE,
        described(
            "teacher_context",
            STRING,
            "What the teacher of a baseline sees besides the problem; null under the type label.",
            True,
        ),
        described(
            "coverage",
            FLOAT32,
            "Share of response tokens with a span; at most α except for rules all and "
            "from_first_span and your own.",
        ),
        described(
            "dropped_tokens",
            INT32,
            "Marked tokens that the rule left out; under rule spans those beyond the α cap.",
        ),
        *POLICY,
        described(
            "contrast_contexts",
            list_of(STRING),
            "What the teacher sees instead of teacher_context, for comparison: one text, or "
            "several whose probabilities are averaged; null without routing.contrast_context.",
            True,
        ),
        POLICY_MASK,
        HISTORY,
    ],
    "rollout_id",
    optional=("contrast_contexts", "policy_mask", "history"),
    labels={"diagnostic_type": TYPE_LABELS},
    nested_labels={("history", "role"): TurnRole},
    codes={"route": Route},
    same_length=(("token_ids", "logprobs", "route", "span_id", "policy_mask"),),
    ranges=TOKEN_RANGES | {"reward": (-MOST, MOST), "advantage": (-MOST, MOST)},
    filled=("prompt_token_ids", "token_ids"),
    faults=(
        (
            "diagnostic_type",
            "is null, and so is teacher_context, in a row with routed tokens; give the row its "
            "type, "
            "or route 0 to all its tokens",
            untaught,
        ),
        (
            "contrast_contexts",
            "is null or empty in a row with reweighted tokens; give the row its contrast, or drop "
            "the column",
            uncompared,
        ),
        (*NO_MISTAKE, mistake_in_right),
        (*UNWRITTEN, unwritten),
        (*FOREIGN_ROUTE, routed_foreign),
        (*ODD_TURNS, odd_turns),
    ),
)

SCORES = make_contract(
    "scores",
    1,
    [
        ROLLOUT_ID,
        described(
            "positions", list_of(INT32), "The routed tokens' places in the response, ascending."
        ),
        described(
            "top_token_ids",
            list_of(INT32),
            "The teacher's k likeliest tokens at each of them, likeliest first, k a position.",
        ),
        described(
            "top_logprobs",
            list_of(FLOAT32),
            "Their log-probabilities, nats; −9999 for a token without probability.",
        ),
        described(
            "tail_logprobs",
            list_of(FLOAT32),
            "Log-probability of all other tokens together, one a position, nats; −9999 for none.",
        ),
        described(
            "logprobs", list_of(FLOAT32), "Log-probability of the response's token, a position."
        ),
        described("temperature", FLOAT32, "Divides the teacher's logits."),
        described("teacher_name", STRING, "Name of the teacher's model."),
        described("teacher_revision", STRING, "Hash of its files; of a server's, its name."),
        described("teacher_entropy", list_of(FLOAT32), "Of the teacher, a position, nats.", True),
        described("student_entropy", list_of(FLOAT32), "Of score.student, a position, nats.", True),
        described("divergence", list_of(FLOAT32), "KL(student‖teacher), a position, nats.", True),
    ],
    "rollout_id",
    optional=("teacher_entropy", "student_entropy", "divergence"),
    same_length=(
        ("positions", "tail_logprobs", "logprobs"),
        ("top_token_ids", "top_logprobs"),
    ),
    ranges={
        "positions": (0, MOST_TOKEN_ID),
        "top_token_ids": (0, MOST_TOKEN_ID),
        "top_logprobs": (-MOST, MOST_LOGPROB),
        "tail_logprobs": (-MOST, MOST_LOGPROB),
        "logprobs": (-MOST, MOST_LOGPROB),
        "temperature": (0, MOST),
        "teacher_entropy": (-MOST_LOGPROB, MOST),
        "student_entropy": (-MOST_LOGPROB, MOST),
        "divergence": (-MOST_LOGPROB, MOST),
    },
    faults=(
        (
            "top_token_ids",
            "has not equally many tokens at each position; make the table again",
            uneven_scores,
        ),
        ("positions", "does not ascend; make the table again", unordered_positions),
        *(
            (name, "has another length than positions", misfit(name))
            for name in ("teacher_entropy", "student_entropy", "divergence")
        ),
    ),
)
