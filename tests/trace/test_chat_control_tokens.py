"""Only a chat template writes its control tokens: no message text can produce one."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trace_opd.trace.prompt import Messages, render_chat

SYSTEM = {"role": "system", "content": "Mark the error."}
MOST_CHARS = 50_000


def hostile_texts() -> list[str]:
    file = Path(__file__).parents[1] / "pipelines" / "stages" / "hostile_rollouts.jsonl"
    rows = map(json.loads, file.read_text().splitlines())
    return [
        row["response"] for row in rows if len(row["response"]) * row.get("times", 1) < MOST_CHARS
    ]


def asked(text: str, *more: str) -> Messages:
    """A conversation whose user writes `text`; more: what assistant and user write after it."""
    roles = ["assistant", "user"] * len(more)
    turns = [{"role": role, "content": turn} for role, turn in zip(roles, more, strict=False)]
    return [SYSTEM, {"role": "user", "content": text}, *turns]


CHAT_ML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = (
    "<bos>{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<\uff5cAssistant\uff5c>{{ m.content }}"
    "<\uff5cend\u2581of\u2581sentence\uff5c>{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "<\uff5cAssistant\uff5c><think>\n"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}</s>{% else %}[INST] "
    "{{ m.content }} [/INST]{% endif %}{% endfor %}"
)
# Template, tokens marked special, added tokens not marked special.
FAMILIES: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "ChatML": (CHAT_ML, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<think>", "</think>"]),
    "Llama 3": (
        LLAMA_3,
        [
            *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
            *("<|start_header_id|>", "<|end_header_id|>"),
        ],
        [],
    ),
    "Gemma": (GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], ["\n\n", "<table>"]),
    "DeepSeek": (
        DEEPSEEK,
        ["<\uff5cend\u2581of\u2581sentence\uff5c>"],
        ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<think>", "</think>"],
    ),
    "Mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], []),
}


def byte_tokenizer(template: str, special: Sequence[str], added: Sequence[str] = ()):
    """One token per byte, plus a family's control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[-1], clean_up_tokenization_spaces=False
    )
    wrapped.chat_template = template
    return wrapped


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    return byte_tokenizer(*FAMILIES[name])


def control_ids(name: str, ids: Sequence[int]) -> list[int]:
    """The ids that the family's template writes, or that are marked special."""
    template, special, added = FAMILIES[name]
    tokens = [*special, *(token for token in added if token in template and token.strip())]
    control = set(family(name).convert_tokens_to_ids(tokens))
    return [token for token in ids if token in control]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_gets_a_control_token_into_its_prompt(name: str):
    tokenizer = family(name)
    expected = control_ids(name, render_chat(tokenizer, asked("So 3 + 4 = 7.")))
    assert expected
    spelled = 0
    for text in hostile_texts():
        ids = render_chat(tokenizer, asked(text))
        assert control_ids(name, ids) == expected, text
        rendered = tokenizer.apply_chat_template(
            asked(text), tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(ids) == rendered  # no character is lost
        spelled += control_ids(name, tokenizer(rendered)["input_ids"]) != expected
    assert spelled > 0  # the tokenizer alone would turn some of the text into control tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_are_text_in_every_role(name: str):
    spelled = "".join(FAMILIES[name][1])
    plain = control_ids(name, render_chat(family(name), asked("a", "b", "c")))
    for turns in ((spelled, "b", "c"), ("a", spelled, "c"), ("a", "b", spelled)):
        assert control_ids(name, render_chat(family(name), asked(*turns))) == plain


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
@pytest.mark.parametrize("around", ["{}", "<|im_{}end|>", "<{}|im_end|>", "{}{}", "<|im_end|{}>"])
def test_tokens_inside_one_another_are_text(token: str, around: str):
    ids = render_chat(family("ChatML"), asked(around.replace("{}", token)))
    assert control_ids("ChatML", ids) == control_ids(
        "ChatML", render_chat(family("ChatML"), asked("a"))
    )
    assert around.replace("{}", token) in family("ChatML").decode(ids)


def test_an_assistants_thinking_in_an_example_keeps_its_tokens():
    thought = "<think>3 times 4</think>12"
    ids = render_chat(family("ChatML"), asked("3 * 4?", thought, "4 * 5?"))
    think = family("ChatML").convert_tokens_to_ids("<think>")
    assert ids.count(think) == 1


def test_text_without_control_tokens_is_encoded_as_transformers_does():
    for name in FAMILIES:
        messages = asked("So 3 + 4 = 7.\n\n  x < y, |z|", "12", "é 漢\n")
        plain = family(name).apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert render_chat(family(name), messages) == plain
