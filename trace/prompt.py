"""Chat prompts of the student and of the teacher: the privilege boundary.

TRACE's teacher prompt, `teacher_messages`, is a function of the problem and of one member of two
closed enumerations. It takes no text, no position and no answer, so nothing else can reach the
teacher. The baselines whose teacher reads an answer, a solution or a peer's response use
`privileged_messages`. The stages that sample call `student_prompt`, routed.py `teacher_contexts`,
sequences.py `teacher_chat`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from ..schemas.configs import PromptConfig, RoutingConfig
from ..schemas.errors import InputError
from ..schemas.labels import WORDS, TypeLabel, type_label
from .chat_template import render_template
from .protocols import Prompt

Messages = list[dict[str, str]]


def student_messages(config: PromptConfig, problem: str) -> Messages:
    """The conversation that asks the student for a response."""
    return _messages(config, config.student.format(problem=problem))


def teacher_messages(config: PromptConfig, problem: str, diagnostic_type: TypeLabel) -> Messages:
    """The same conversation with the label, which is all that the teacher sees besides the
    problem: its name, or the words that belong to it.

    Raises:
        ValueError: no member of DiagnosticType or ErrorType.
    """
    label = type_label(diagnostic_type)
    user = config.teacher.format(
        problem=problem, diagnostic_type=label.value, diagnosis=WORDS[label]
    )
    return _messages(config, user)


def privileged_messages(config: PromptConfig, problem: str, context: str) -> Messages:
    """A baseline's teacher: the same conversation with an answer, a solution or a response."""
    return _messages(config, config.privileged.format(problem=problem, context=context))


def teacher_chat(
    config: PromptConfig, problem: str, diagnostic_type: str | None, teacher_context: str | None
) -> Messages:
    """The teacher's conversation for a row of a routed table.

    It is a baseline's if the row has a teacher_context, else TRACE's.

    Raises:
        ValueError: neither a context nor a label of DiagnosticType or ErrorType.
    """
    if teacher_context is not None:
        return privileged_messages(config, problem, teacher_context)
    return teacher_messages(config, problem, type_label(diagnostic_type))


def student_prompt(
    tokenizer: PreTrainedTokenizerBase | None, config: PromptConfig, problem: str
) -> Prompt:
    """The student's prompt, with token ids if there is a tokenizer."""
    messages = student_messages(config, problem)
    if tokenizer is None:
        return Prompt(messages, thinking=config.thinking)
    ids = render_chat(tokenizer, messages, config.thinking)
    return Prompt(messages, ids, config.thinking)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: bool | None = None
) -> list[int]:
    """Token ids of a conversation up to where the assistant's turn begins.

    A message cannot leave its turn: text that spells a control token (`<|im_end|>`) gets the tokens
    of its letters, never the control token's id.

    Raises:
        InputError: the tokenizer has no chat template, or one that fails or exceeds a limit.
    """
    template = tokenizer.chat_template
    if not template:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path}: has no chat template; add chat_template.jinja to "
            "the model folder or use a chat model"
        )
    special, written = _control_tokens(tokenizer, str(template))
    cut = uuid4().hex  # occurs in no text, and is removed before encoding
    safe = [
        message | {"content": _cut_spelled(message["content"], tokens, cut)}
        for message in messages
        for tokens in [written if message["role"] == "user" else special]
    ]
    options: dict[str, Any] = {} if thinking is None else {"enable_thinking": thinking}
    ids: list[int] = []
    for piece in render_template(tokenizer, safe, options).split(cut):
        ids += cast(list[int], tokenizer(piece, add_special_tokens=False)["input_ids"])
    return ids


def _cut_spelled(text: str, tokens: Sequence[str], cut: str) -> str:
    """The text with `cut` after the first character of every token that it spells."""
    spelled = "|".join(re.escape(token) for token in tokens if token in text)
    return re.sub(rf"(?s)(?={spelled})(.)", rf"\g<1>{cut}", text) if spelled else text


@lru_cache(maxsize=4)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[str], list[str]]:
    """The tokens that no message may write, and those that no user's message may write.

    The former are marked special. The latter also include the template's own tokens without that
    mark (DeepSeek's `<｜User｜>`, Qwen's `<think>`).
    """
    added = [t for t in tokenizer.added_tokens_decoder.values() if len(t.content.strip()) > 1]
    special = [token.content for token in added if token.special]
    return special, special + [t.content for t in added if not t.special and t.content in template]


def _messages(config: PromptConfig, user: str) -> Messages:
    messages: Messages = []
    if config.system is not None:
        messages.append({"role": "system", "content": config.system})
    for example in config.examples:
        asked = config.student.format(problem=example.problem)
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": example.response})
    messages.append({"role": "user", "content": user})
    return messages


@dataclass(frozen=True)
class TeacherContexts:
    """What each response's teacher sees besides the problem.

    exists: (responses,) bool; a response without context has no teacher. labels: of DiagnosticType
    or ErrorType, or null; texts: null under the type label.
    """

    exists: np.ndarray
    labels: Any
    texts: Any


def teacher_contexts(
    rollouts: pa.Table,
    problems: pa.Table,
    correct: np.ndarray,
    labels: Any,
    config: RoutingConfig,
) -> TeacherContexts:
    """The context of each response under `routing.teacher_context`.

    rollouts, problems: a response and its problem per row; correct: (responses,) bool;
    labels: diagnostic types of the responses.
    """
    if config.teacher_context == "type":
        return TeacherContexts(_filled(labels), labels, pa.nulls(len(labels), pa.string()))
    if config.teacher_context == "peer":
        peer = peers(rollouts, correct)
        rows: Any = pa.array(peer, mask=peer < 0)
        texts = rollouts["response"].take(rows)
    else:
        texts = problems[config.teacher_context]
    return TeacherContexts(_filled(texts), labels, texts)


def peers(rollouts: pa.Table, correct: np.ndarray) -> np.ndarray:
    """The row of each response's peer, (responses,) int64; −1 without one.

    The peer is the first other correct response of the group, by sample index (SDPO, arXiv
    2601.20802).
    """
    group_ids: Any = rollouts["group_id"].combine_chunks()
    groups = group_ids.dictionary_encode()
    group = groups.indices.to_numpy()
    rows = np.arange(len(group))
    by_index = np.lexsort((rollouts["sample_index"].to_numpy(), group))
    in_order = by_index[correct[by_index]]
    starts = np.flatnonzero(np.diff(group[in_order], prepend=-1))
    first, second = (np.full(len(groups.dictionary), -1) for _ in range(2))
    first[group[in_order[starts]]] = in_order[starts]
    after = starts[np.diff(starts, append=len(in_order)) > 1] + 1
    second[group[in_order[after]]] = in_order[after]
    return np.where(first[group] == rows, second[group], first[group])


def _filled(texts: Any) -> np.ndarray:
    """(texts,) bool: neither null nor empty."""
    return np.asarray(pc.binary_length(texts)) > 0  # null is NaN
