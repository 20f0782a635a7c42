"""Chat prompts of the student and of the teacher: the privilege boundary.

TRACE's teacher prompt, `teacher_messages`, is a function of the problem, of the conversation's
turns before it, and of one member of two closed enumerations. It takes no other text, no position
and no answer, so nothing else can reach the teacher. The baselines whose teacher reads a text (an
answer, a solution, a peer's response, an annotator's reflection: contexts.py) use
`privileged_messages`. The stages that sample call `student_prompt`, sequences.py `teacher_chat` and
`teacher_turn`.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from uuid import uuid4

from ..schemas.configs import PromptConfig
from ..schemas.conversation import History, history_key
from ..schemas.errors import InputError
from ..schemas.labels import WORDS, TurnRole, TypeLabel, type_label
from .chat_template import render_template
from .contexts import NO_CONTEXT
from .protocols import Prompt

if TYPE_CHECKING:  # stage convert starts without it
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
_THINKING = ("<think>", "</think>")


def student_messages(config: PromptConfig, problem: str, history: History = None) -> Messages:
    """The conversation that asks the student for a response.

    history: the turns before the problem; a system turn takes the place of the config's.
    """
    return _messages(config, config.student.format(problem=problem), history)


def teacher_messages(
    config: PromptConfig, problem: str, diagnostic_type: TypeLabel, history: History = None
) -> Messages:
    """The same conversation with the label, which is all that the teacher sees besides the
    problem: its name, or the words that belong to it.

    Raises:
        ValueError: no member of DiagnosticType or ErrorType.
    """
    label = type_label(diagnostic_type)
    user = config.teacher.format(
        problem=problem, diagnostic_type=label.value, diagnosis=WORDS[label]
    )
    return _messages(config, user, history)


def privileged_messages(
    config: PromptConfig, problem: str, context: str, history: History = None
) -> Messages:
    """A baseline's teacher: the same conversation with an answer, a solution or a response."""
    return _messages(config, config.privileged.format(problem=problem, context=context), history)


def teacher_chat(
    config: PromptConfig,
    problem: str,
    diagnostic_type: str | None,
    teacher_context: str | None,
    history: History = None,
) -> Messages:
    """The teacher's conversation for a row of a routed table.

    It is a baseline's if the row has a teacher_context, else TRACE's. An empty context is the
    student's own conversation.

    Raises:
        ValueError: neither a context nor a label of DiagnosticType or ErrorType.
    """
    if teacher_context == NO_CONTEXT:
        return student_messages(config, problem, history)
    if teacher_context is not None:
        return privileged_messages(config, problem, teacher_context, history)
    return teacher_messages(config, problem, type_label(diagnostic_type), history)


def student_prompt(
    tokenizer: "PreTrainedTokenizerBase | None",
    config: PromptConfig,
    problem: str,
    history: History = None,
) -> Prompt:
    """The student's prompt, with token ids if there is a tokenizer."""
    messages = student_messages(config, problem, history)
    if tokenizer is None:
        return Prompt(messages, thinking=config.thinking)
    ids = render_chat(tokenizer, messages, config.thinking)
    return Prompt(messages, ids, config.thinking)


def render_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, thinking: bool | None = None
) -> list[int]:
    """Token ids of a conversation up to where the assistant's turn begins.

    A message cannot leave its turn: text that spells a control token (`<|im_end|>`) gets the tokens
    of its letters, never the control token's id. An assistant's earlier turn may hold the block of
    thinking that its template knows.

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
    of_role = {"user": written, "assistant": [t for t in written if t not in _THINKING]}
    safe = [
        message | {"content": _cut_spelled(message["content"], tokens, cut)}
        for message in messages
        for tokens in [of_role.get(message["role"], special)]
    ]
    ids: list[int] = []
    for piece in render_template(tokenizer, safe, _options(thinking)).split(cut):
        ids += cast(list[int], tokenizer(piece, add_special_tokens=False)["input_ids"])
    return ids


class TeacherTurn(NamedTuple):
    """How the assistant's turn begins in the teacher's prompt.

    thinking: enable_thinking of its chat template. first_token: whether the teacher can teach a
    response's first token.
    """

    thinking: bool | None
    first_token: bool


def teacher_turn(tokenizer: "PreTrainedTokenizerBase", config: PromptConfig) -> TeacherTurn:
    """The beginning of the teacher's turn under `prompt.teacher_thinking`.

    A response goes on from the student's prompt, so the teacher's prompt has to end where it
    begins. A template that opens the think block in a prompt with thinking, where the student's
    prompt leaves no block open, gets the student's ending: the block closed in the template's own
    form. Where the two endings differ otherwise (Qwen3's teacher with thinking opens the block with
    its own first token, the student's response has none), the teacher's first token is that of
    another turn, so it teaches none (siyan-zhao/OPSD, issue 10).
    """
    own, theirs = config.thinking, config.teacher_thinking
    if theirs == "same" or theirs == own:
        return TeacherTurn(own, True)
    messages = student_messages(config, "")
    student, teacher = (
        render_template(tokenizer, messages, _options(thinking)) for thinking in (own, theirs)
    )
    if _opens(teacher) and not _opens(student):
        return TeacherTurn(own, True)
    return TeacherTurn(theirs, student == teacher)


def _opens(prompt: str) -> bool:
    """Whether a prompt ends in a think block that has just been opened."""
    return prompt.rstrip().endswith("<think>")


def _options(thinking: bool | None) -> dict[str, Any]:
    return {} if thinking is None else {"enable_thinking": thinking}


def _cut_spelled(text: str, tokens: Sequence[str], cut: str) -> str:
    """The text with `cut` after the first character of every token that it spells."""
    spelled = "|".join(re.escape(token) for token in tokens if token in text)
    return re.sub(rf"(?s)(?={spelled})(.)", rf"\g<1>{cut}", text) if spelled else text


@lru_cache(maxsize=4)
def _control_tokens(
    tokenizer: "PreTrainedTokenizerBase", template: str
) -> tuple[list[str], list[str]]:
    """The tokens that no message may write, and those that no user's message may write.

    The former are marked special. The latter also include the template's own tokens without that
    mark (DeepSeek's `<｜User｜>`, Qwen's `<think>`).
    """
    added = [t for t in tokenizer.added_tokens_decoder.values() if len(t.content.strip()) > 1]
    special = [token.content for token in added if token.special]
    return special, special + [t.content for t in added if not t.special and t.content in template]


def _messages(config: PromptConfig, user: str, history: History) -> Messages:
    turns = [{"role": role, "content": content} for role, content in history_key(history)]
    messages: Messages = []
    if turns and turns[0]["role"] == TurnRole.SYSTEM:
        messages.append(turns.pop(0))
    elif config.system is not None:
        messages.append({"role": "system", "content": config.system})
    for example in config.examples:
        asked = config.student.format(problem=example.problem)
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": example.response})
    messages += turns
    messages.append({"role": "user", "content": user})
    return messages
