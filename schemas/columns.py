"""Columns that several tables share, and the ranges of their numbers. tables.py uses them."""

import numpy as np
import pyarrow as pa

from .contract import described, list_of
from .labels import Route

# A log-probability computed as a difference of floats may round to slightly above 0.
MOST_LOGPROB = 1e-3
MOST_TOKEN_ID = 2**31 - 1

STRING, INT32, FLOAT32, BOOL = pa.string(), pa.int32(), pa.float32(), pa.bool_()
PROBLEM_ID = described(
    "problem_id", STRING, "Hash of source, problem text and answer, and of the turns before."
)
ROLLOUT_ID = described(
    "rollout_id", STRING, "Hash of problem, policy, sampling parameters and sample index."
)
GROUP_ID = described("group_id", STRING, "Rollouts of one problem by one policy share it.")
CORRECT = described(
    "correct", BOOL, "Whether the final answer equals the gold answer; null if unscored.", True
)
TYPE = described(
    "diagnostic_type",
    STRING,
    "One label of DiagnosticType, or of ErrorType for a wrong response; null without spans.",
    True,
)
POLICY = [
    described("policy_name", STRING, "Name of the policy that sampled the response."),
    described(
        "policy_revision",
        STRING,
        "Hash of its model files; in training, of the base that the run started from.",
    ),
    described("policy_step", INT32, "Optimiser steps that the weights had seen in this run."),
    described("vocab_fingerprint", STRING, "Hash of the vocabulary; empty if no ids are known."),
]
TOKENS = [
    described(
        "prompt_token_ids", list_of(INT32), "The prompt's token ids as the sampler saw them."
    ),
    described("token_ids", list_of(INT32), "The sampler's own response ids, never re-encoded."),
    described(
        "logprobs",
        list_of(FLOAT32),
        "Natural-log probability of each response token under the sampling policy at the sampling "
        "temperature, before top-p and top-k.",
    ),
]

POLICY_MASK = described(
    "policy_mask",
    list_of(BOOL),
    "Whether the policy wrote a response token; others (a tool's output, a turn of the user) have "
    "route 0 and no loss. Tables without the column: it wrote all of them.",
)

ROUTES = ", ".join(f"{route.label} {int(route)}" for route in Route)
MOST = float(np.finfo(np.float32).max)
TOKEN_RANGES = {
    "prompt_token_ids": (0, MOST_TOKEN_ID),
    "token_ids": (0, MOST_TOKEN_ID),
    "logprobs": (-MOST, MOST_LOGPROB),
    "temperature": (0, MOST),
}
