"""Chat prompts of the student and of the teacher: the privilege boundary.

TRACE's teacher prompt, `teacher_messages`, is a function of the problem and one member of a closed
enumeration. It takes no text, no position and no answer, so nothing else can reach the teacher.
The baselines whose teacher reads an answer or a solution have a function of their own,
`privileged_messages`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

from ..schemas.configs import PromptConfig
from ..schemas.errors import InputError
from ..schemas.labels import DiagnosticType
from .chat_template import render_template
from .protocols import Prompt

Messages = list[dict[str, str]]


def student_messages(config: PromptConfig, problem: str) -> Messages:
    """The conversation that asks the student for a response."""
    return _messages(config, config.student.format(problem=problem))


def teacher_messages(
    config: PromptConfig, problem: str, diagnostic_type: DiagnosticType
) -> Messages:
    """The same conversation with the label: all that the teacher sees besides the prefix."""
    label = DiagnosticType(diagnostic_type).value
    return _messages(config, config.teacher.format(problem=problem, diagnostic_type=label))


def privileged_messages(config: PromptConfig, problem: str, context: str) -> Messages:
    """A baseline's teacher: the same conversation with an answer, a solution or a response."""
    return _messages(config, config.privileged.format(problem=problem, context=context))


def teacher_chat(
    config: PromptConfig, problem: str, diagnostic_type: str | None, teacher_context: str | None
) -> Messages:
    """The teacher's conversation for a row of a routed table: a baseline's where there is a
    teacher_context, else TRACE's.

    Raises:
        ValueError: neither a context nor a label of DiagnosticType.
    """
    if teacher_context is not None:
        return privileged_messages(config, problem, teacher_context)
    return teacher_messages(config, problem, DiagnosticType(diagnostic_type))


def student_prompt(
    tokenizer: PreTrainedTokenizerBase | None, config: PromptConfig, problem: str
) -> Prompt:
    """The student's prompt, with token ids where a tokenizer is known."""
    messages = student_messages(config, problem)
    if tokenizer is None:
        return Prompt(messages, thinking=config.thinking)
    ids = render_chat(tokenizer, messages, config.thinking)
    return Prompt(messages, ids, config.thinking)


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, thinking: bool | None = None
) -> list[int]:
    """Token ids of a conversation up to where the assistant's turn begins.

    A message can't leave its turn: where its text spells a control token (`<|im_end|>`), it gets
    the tokens of the letters, never the control token's id.

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
    cut = uuid4().hex  # no text can hold it, and it is gone before anything is encoded
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
    """The text with `cut` behind the first character of every token that it spells."""
    spelled = "|".join(re.escape(token) for token in tokens if token in text)
    return re.sub(rf"(?s)(?={spelled})(.)", rf"\g<1>{cut}", text) if spelled else text


@lru_cache(maxsize=4)
def _control_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[str], list[str]]:
    """What no message may write: tokens marked special; and what no user's message may write: these
    and those of the template that are not marked (DeepSeek's `<｜User｜>`, Qwen's `<think>`)."""
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
