"""Format ms-swift: GKD with a teacher's prompt and a loss on routed tokens, and GRPO, as JSONL."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from ...schemas.labels import Route
from ...trace.align import ByteTable
from ...trace.contexts import NO_CONTEXT
from .format import File, Format, Options, json_lines
from .source import Part, RoutedSource, asked_problems

_DIVERGENCES = (Route.FKL, Route.RKL, Route.JSD)


def _files(source: RoutedSource, options: Options) -> Iterator[File]:
    pieces = source.vocabulary(options.policy).pieces
    for part in source.parts():
        name = f"part-{part.index:05d}.jsonl"
        for route in _DIVERGENCES:
            rows = _gkd(source, part, route, pieces)
            if rows:
                yield File(f"gkd-{route.label}/{name}", json_lines(rows), len(rows))
        prompts = [
            {"messages": source.student(row), "solution": row["answer"]}
            for row in asked_problems(part)
        ]
        yield File(f"grpo/{name}", json_lines(prompts), len(prompts))


def _gkd(source: RoutedSource, part: Part, route: Route, pieces: ByteTable) -> list[dict[str, Any]]:
    rows = []
    for row in part.table.to_pylist():
        routed = np.asarray(row["route"]) == int(route)
        turns = assistant_turns(row["token_ids"], routed, pieces)
        if not any(turn["loss"] for turn in turns):
            continue
        made: dict[str, Any] = {"messages": [*source.student(row), *turns]}
        if row["teacher_context"] != NO_CONTEXT:
            made["teacher_prompt"] = source.teacher_turn(row)
        rows.append(made)
    return rows


def assistant_turns(
    token_ids: list[int], routed: np.ndarray, pieces: ByteTable
) -> list[dict[str, Any]]:
    """A response as consecutive turns of the assistant, cut where `routed` changes; their texts
    joined are the response. A character has a loss if one of its tokens is routed.

    routed: (tokens,) bool.
    """
    text = pieces.text(token_ids)
    firsts, lasts = pieces.char_ranges(token_ids)
    marked = np.zeros(len(text), dtype=bool)
    for first, last in zip(firsts[routed], lasts[routed], strict=True):
        marked[first:last] = True
    turns, at = [], 0
    for loss, run in groupby(marked.tolist()):
        end = at + len(list(run))
        turns.append({"role": "assistant", "content": text[at:end], "loss": loss})
        at = end
    return turns


FORMAT = Format(
    summary="gkd-<route>/: responses with tokens of that route, for `--rlhf_type gkd --lmbda 0`: "
    "`loss` is true on those tokens' text, `teacher_prompt` is the teacher's user turn. Train fkl "
    "with `--beta 0`, rkl with `--beta 1`. grpo/: prompts and gold answers for `--rlhf_type grpo`.",
    version="ms-swift 4.6",
    keeps="responses, which characters are routed to which divergence, the teacher's prompt with "
    "the type label (of a baseline: its context), gold answers.",
    loses="the sampler's token ids and log-probabilities (ms-swift tokenises the text again, so a "
    "token at a span's edge may be cut otherwise), rewards and advantages, λ's schedule, GRPO and "
    "a divergence in one run, the action reweight; the end token has the loss too.",
    files=_files,
    reads=("policy",),
)
