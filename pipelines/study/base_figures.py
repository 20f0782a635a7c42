"""What a world did to its base, before any training: study.py writes it as worlds.parquet.

Means over problems of the study, eight samples each at temperature 1. A teacher is the base with a
hint in its prompt; "right" is the type label of the rollout's own annotation, "wrong" another one.
probe/measure.py measures; what only micro's responses have, such as answers at once, is here.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...schemas.configs import RoutingConfig, SamplingConfig
from ...schemas.labels import Route, TypeLabel, type_label
from ...trace.policy import Policy
from ..bundled.demonstrations import AT_ONCE, NOISE
from ..bundled.micro import exact_verdicts
from ..probe.measure import (
    Samples,
    asked_of,
    divergences,
    has_signal,
    other_kind,
    per_row,
    places,
    samples_of,
    teachers_samples,
)
from ..samplers.rollouts import rollouts_table
from ..samplers.transformers import TransformersPolicySampler
from .mechanism import PROMPT, routed_of

SAMPLES = 8
KINDS: list[TypeLabel] = list(NOISE)
_BATCH_TOKENS = 65_536
_PLACES = {"key": Route.FKL, "error": Route.RKL, "elsewhere": Route.GRPO}


def base_figures(
    policy: Policy, problems: pa.Table, max_new_tokens: int, seed: int
) -> dict[str, float | None]:
    """Figures of a base by name; null where no rollout has what it is about.

    pass_rate; signal: share of the groups with right and wrong responses; tokens: mean length of a
    response; at_once: share of the responses that answer at once; right_by_columns, right_at_once:
    pass rate of each form.
    right_label_pass_rate, right_label_tokens, right_label_at_once, and the same of wrong_label: of
    the teacher's own samples.
    right_label_key, right_label_error, right_label_elsewhere, and the same of wrong_label: mean
    KL(teacher ‖ base) over the tokens of key spans, of error spans, of all other tokens, in nats.
    """
    sampler = TransformersPolicySampler(policy, _BATCH_TOKENS)
    sampling = SamplingConfig(max_new_tokens=max_new_tokens)
    rollouts = rollouts_table(problems, sampler, policy.tokenizer, PROMPT, sampling, SAMPLES, seed)
    verdicts = exact_verdicts(problems, rollouts)
    plain = samples_of(rollouts, verdicts)
    ids = [str(problem_id) for problem_id in problems["problem_id"].to_pylist()]
    figures = {
        "signal": _mean(has_signal(ids, plain)),
        "pass_rate": _mean(plain.right),
        "tokens": _mean(plain.tokens),
        "at_once": _mean(_at_once(plain)),
    }
    for form, chosen in (("at_once", _at_once(plain) == 1), ("by_columns", _at_once(plain) == 0)):
        figures[f"right_{form}"] = _mean(plain.right[chosen])
    routing = RoutingConfig(alpha=1.0, key=Route.FKL, error=Route.RKL)
    routed = routed_of(policy, problems, rollouts, verdicts, routing)
    routed = routed.filter(pc.is_valid(routed["diagnostic_type"]))
    if not len(routed):
        return figures
    types = [type_label(label) for label in routed["diagnostic_type"].to_pylist()]
    labellings = {"right_label": types, "wrong_label": [other_kind(KINDS, kind) for kind in types]}
    of_rows = [str(problem_id) for problem_id in routed["problem_id"].to_pylist()]
    rows = {name: list(zip(of_rows, labels, strict=True)) for name, labels in labellings.items()}
    hinted = teachers_samples(
        sampler, policy.tokenizer, problems, asked_of([*rows["right_label"], *rows["wrong_label"]]),
        PROMPT, sampling, SAMPLES, seed + 1, exact_verdicts,
    )  # fmt: skip
    found = divergences(policy, routed, list(labellings.values()), PROMPT)
    place = places(routed)
    for (name, own), divergence in zip(rows.items(), found, strict=True):
        for figure, values in _OF_SAMPLES.items():
            figures[f"{name}_{figure}"] = _mean(per_row(own, hinted, values))
        for where, route in _PLACES.items():
            figures[f"{name}_{where}"] = _mean(divergence[place == int(route)])
    return figures


def _at_once(samples: Samples) -> np.ndarray:
    return np.array([text.startswith(AT_ONCE) for text in samples.responses], dtype=float)


_OF_SAMPLES: dict[str, Callable[[Samples], np.ndarray]] = {
    "pass_rate": lambda samples: samples.right,
    "tokens": lambda samples: samples.tokens,
    "at_once": _at_once,
}


def _mean(values: np.ndarray) -> float | None:
    defined = values[~np.isnan(values)]
    return float(np.mean(defined)) if len(defined) else None
