"""What a policy does with a hint, and without: samples, and the divergence per token.

probe.py measures an annotated dataset with it, study/base_figures.py the bases of worlds. A teacher
is the same policy with a type label in its prompt.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ...schemas.configs import PromptConfig, SamplingConfig
from ...schemas.conversation import COLUMN, with_history
from ...schemas.labels import DiagnosticType, ErrorType, Route, TypeLabel
from ...trace.losses import FLOOR, Head
from ...trace.packing import PackedModel, pack
from ...trace.policy import Policy
from ...trace.policy_mask import flat_mask
from ...trace.prompt import render_chat, teacher_messages, teacher_turn
from ...trace.protocols import Prompt, Sampler
from ...trace.routed import lists_of
from ...trace.sequences import TrainingSequence, training_sequences
from ..samplers.rollouts import prompted_rollouts

_PASS_TOKENS = 8192  # prompts and responses in a forward pass, or one longer response
_LOGITS = 1 << 24  # per model at once: their float32 are 64 MiB
_WITHOUT_CONTENT: set[TypeLabel] = {DiagnosticType.OTHER, ErrorType.OTHER_MISTAKE}
_LABEL, _ROUTE = "diagnostic_type", "route"

# Verdicts of rollouts: (problems, rollouts) to a verdicts table, row by row.
Judge = Callable[[pa.Table, pa.Table], pa.Table]


@dataclass(frozen=True)
class Samples:
    """Arrays with an entry per sample: its problem's id; right, 1 or 0, NaN without a verdict;
    tokens, NaN where the sampler kept none. responses: their texts.
    """

    problem: np.ndarray
    right: np.ndarray
    tokens: np.ndarray
    responses: list[str]


def samples_of(rollouts: pa.Table, verdicts: pa.Table) -> Samples:
    """The samples of two tables that hold the same rollouts row by row."""
    tokens = np.asarray(pc.list_value_length(rollouts["token_ids"]), dtype=float)
    tokens[~np.asarray(rollouts["on_policy"], dtype=bool)] = np.nan
    return Samples(
        np.array(rollouts["problem_id"].to_pylist(), dtype=object),
        np.array(verdicts["correct"].to_pylist(), dtype=float),
        tokens,
        [str(text) for text in rollouts["response"].to_pylist()],
    )


def teachers_samples(
    sampler: Sampler,
    tokenizer: Any,
    problems: pa.Table,
    asked: Mapping[TypeLabel, Collection[str]],
    prompt: PromptConfig,
    sampling: SamplingConfig,
    count: int,
    seed: int,
    judge: Judge,
) -> dict[TypeLabel, Samples]:
    """`count` responses of the teacher under each label to the problems asked under it, by id.

    A problem's samples draw from the same random streams under each label.
    """
    thinking = teacher_turn(tokenizer, prompt).thinking
    found = {}
    for label, ids in asked.items():
        own = problems.filter(pc.is_in(problems["problem_id"], pa.array(sorted(ids), pa.string())))
        prompts = []
        for row in own.select(with_history(["problem"], own)).to_pylist():
            messages = teacher_messages(prompt, row["problem"], label, row.get(COLUMN))
            prompts.append(Prompt(messages, render_chat(tokenizer, messages, thinking), thinking))
        own_ids = [str(problem_id) for problem_id in own["problem_id"].to_pylist()]
        rollouts = prompted_rollouts(own_ids, prompts, sampler, sampling, count, seed)
        found[label] = samples_of(rollouts, judge(problems, rollouts))
    return found


def asked_of(
    rows: Sequence[tuple[str, TypeLabel]],
) -> dict[TypeLabel, set[str]]:
    """The problems to ask a teacher about under each label; rows: problem ids with labels."""
    asked: dict[TypeLabel, set[str]] = {}
    for problem_id, label in rows:
        asked.setdefault(label, set()).add(problem_id)
    return asked


def per_row(
    rows: Sequence[tuple[str, TypeLabel]],
    samples: Mapping[TypeLabel, Samples],
    values: Callable[[Samples], np.ndarray],
) -> np.ndarray:
    """(rows,): the mean value of the teacher's samples on a row's problem under the row's label.

    values: of samples, (samples,); NaN does not count. NaN for a row without values.
    """
    means: dict[tuple[str, TypeLabel], float] = {}
    for label, own in samples.items():
        ids = list(dict.fromkeys(own.problem.tolist()))
        total, number = sums(ids, own.problem, values(own)).T
        found = np.divide(total, number, out=np.full(len(ids), np.nan), where=number > 0)
        means |= {(one, label): value for one, value in zip(ids, found.tolist(), strict=True)}
    return np.array([means.get(row, np.nan) for row in rows], dtype=float)


def sums(ids: Sequence[str], problem: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(ids, 2) float: per problem the sum of the values that are not NaN, and their number.

    problem: (values,) the id of each value's problem; those of other problems do not count.
    """
    place = {one: index for index, one in enumerate(ids)}
    at = np.array([place.get(one, -1) for one in problem.tolist()], dtype=np.int64)
    kept = ~np.isnan(values) & (at >= 0)
    number = np.bincount(at[kept], minlength=len(ids))
    total = np.bincount(at[kept], values[kept], minlength=len(ids))
    return np.stack([total, number], axis=1).astype(float)


def has_signal(ids: Sequence[str], samples: Samples) -> np.ndarray:
    """(ids,): 1 where a problem has right and wrong samples, else 0; NaN without a verdict."""
    right, number = sums(ids, samples.problem, samples.right).T
    return np.where(number > 0, ((right > 0) & (right < number)).astype(float), np.nan)


def other_kind(kinds: Sequence[TypeLabel], kind: TypeLabel) -> TypeLabel:
    """The kind before it, cyclically; the first if it is none of them."""
    return kinds[kinds.index(kind) - 1 if kind in kinds else 0]


def wrong_labels(labels: Sequence[TypeLabel]) -> list[TypeLabel]:
    """For each label another of its enumeration that is in use and has content; of all members if
    fewer than two are in use.
    """
    kinds: dict[type, list[TypeLabel]] = {}
    for members in (DiagnosticType, ErrorType):
        used = sorted({one for one in labels if isinstance(one, members)} - _WITHOUT_CONTENT)
        kinds[members] = used if len(used) > 1 else sorted(set(members) - _WITHOUT_CONTENT)
    return [other_kind(kinds[type(label)], label) for label in labels]


def places(routed: pa.Table) -> np.ndarray:
    """(tokens,) uint8: the routes of all response tokens, one row after another."""
    return np.concatenate([np.empty(0, np.uint8), *map(np.asarray, routed[_ROUTE].to_pylist())])


@torch.no_grad()
def divergences(
    policy: Policy,
    routed: pa.Table,
    labellings: Sequence[Sequence[TypeLabel]],
    prompt: PromptConfig,
) -> np.ndarray:
    """KL(teacher ‖ student) at every response token, in nats: (labellings, tokens) float64.

    routed: rows of type labels' routing; a labelling has a label per row. The student's logits and
    the teacher's are divided by the row's temperature, as in training. NaN at tokens that the
    policy did not write or that the teacher cannot teach. No more than _LOGITS of each model are in
    memory at once.
    """
    everywhere = _with_all_tokens(routed)
    taught = [
        training_sequences(_with_labels(everywhere, labels), policy.tokenizer, prompt)
        for labels in labellings
    ]
    lengths = [len(row.token_ids) for row in taught[0]]
    offsets = np.append(0, np.cumsum(lengths))
    found = np.full((len(labellings), offsets[-1]), np.nan)
    model = PackedModel(policy.model)
    for rows in _passes(taught):
        own = [taught[0][row] for row in rows]
        keep = [row.routed_positions for row in own]
        at = np.concatenate([offsets[row] + kept for row, kept in zip(rows, keep, strict=True)])
        responses = [row.token_ids for row in own]
        heat = np.repeat([row.temperature or 1.0 for row in own], list(map(len, keep)))
        student, head = model(pack([row.prompt_ids for row in own], responses, keep), _states)
        for number, sequences in enumerate(taught):
            prompts = [sequences[row].teacher_prompt_ids or [] for row in rows]
            teacher, _ = model(pack(prompts, responses, keep), _states)
            found[number, at] = _kl(teacher, student, head, heat)
    return found


def _states(states: torch.Tensor, head: Head) -> tuple[torch.Tensor, Head]:
    return states, head


def _kl(teacher: torch.Tensor, student: torch.Tensor, head: Head, heat: np.ndarray) -> np.ndarray:
    """(tokens,) float32 of states (tokens, hidden), chunk by chunk; heat: (tokens,)."""
    rows = max(1, _LOGITS // len(head.weight))
    temperature = torch.from_numpy(heat.astype(np.float32)).to(student.device)[:, None]
    chunks = zip(teacher.split(rows), student.split(rows), temperature.split(rows), strict=True)
    found = [np.empty(0, np.float32)]
    for states, own, warm in chunks:
        log_q, log_p = (
            torch.log_softmax(
                head.shape_(torch.nn.functional.linear(one, head.weight, head.bias).float(), warm),
                dim=-1,
            ).clamp_(min=FLOOR)
            for one in (states, own)
        )
        found.append((log_q.exp() * (log_q - log_p)).sum(-1).cpu().numpy())
    return np.concatenate(found)


def _passes(taught: Sequence[Sequence[TrainingSequence]]) -> Iterator[range]:
    """Consecutive rows whose longest prompts and responses fit a pass."""
    first, total = 0, 0
    for row, sequences in enumerate(zip(*taught, strict=True)):
        prompts = [len(one.teacher_prompt_ids or []) for one in sequences]
        size = max(*prompts, len(sequences[0].prompt_ids)) + len(sequences[0].token_ids)
        if row > first and total + size > _PASS_TOKENS:
            yield range(first, row)
            first, total = row, 0
        total += size
    if taught[0]:
        yield range(first, len(taught[0]))


def _with_all_tokens(routed: pa.Table) -> pa.Table:
    """Rows in which every token that the policy wrote is the teacher's."""
    lengths = np.asarray(pc.list_value_length(routed[_ROUTE]), dtype=np.int64)
    offsets = np.append(0, np.cumsum(lengths))
    route = np.full(offsets[-1], int(Route.FKL), dtype=np.uint8)
    mask = flat_mask(routed)
    if mask is not None:
        route[~mask] = int(Route.GRPO)
    return _with(routed, _ROUTE, lists_of(route, offsets))


def _with_labels(routed: pa.Table, labels: Sequence[TypeLabel]) -> pa.Table:
    return _with(routed, _LABEL, pa.array([label.value for label in labels], pa.string()))


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    place = table.column_names.index(name)
    return table.set_column(place, table.schema.field(name), column)
