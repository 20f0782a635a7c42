"""The text of token ids is the tokenizer's own decoding, for every id and every kind of token.

The families have the decoders and added tokens of public vocabularies, with few ordinary tokens.
"""

import json
import re
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trace_opd.schemas.errors import InputError
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.loading import load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
# A letter, a word with a space, a half and a third of a character, all single bytes.
BYTE_LEVEL = [*ALPHABET, "Ġand", "Ã©", "æ¼", "<0x41>", "ĊĊ"]
SENTENCEPIECE = [
    "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁and", "a", "é",
    "漢", "▁▁▁", "<0xZZ>", "<0x1>", "\n", "Ġ",
]  # fmt: skip


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def plain(*names: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(name, special=False, **flags) for name in names]


REPLACE, FALLBACK, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
GEMMA = decoders.Sequence([REPLACE, FALLBACK, FUSE])
LLAMA_2 = decoders.Sequence([REPLACE, FALLBACK, FUSE, decoders.Strip(" ", 1, 0)])
FAMILIES = {
    "Gemma": (SENTENCEPIECE, GEMMA, [
        *special("<bos>", "<start_of_turn>", "<end_of_turn>"),
        *plain(*("▁" * n for n in range(2, 32)), normalized=False),
        *plain("\n\n", "\n\n\n", "\t", "\t\t", normalized=False),
        *plain("<mask>", "[multimodal]", "<unused0>", "<table>", "</h1>", "[@BOS@]"),
    ]),
    "Llama 2": (SENTENCEPIECE, LLAMA_2, special("<s>", "</s>", "<unk>")),
    "Mistral, control tokens": (SENTENCEPIECE, LLAMA_2, [
        *special("[INST]", "[control_8]"), *plain("[TOOL_CALLS]", "[/THINK]"),
    ]),
    "Phi-3": (SENTENCEPIECE, LLAMA_2, [
        *plain("</s>", rstrip=True, normalized=False), *special("<|placeholder1|>"),
        AddedToken("<|assistant|>", special=True, rstrip=True),
    ]),
    "T5": (SENTENCEPIECE, decoders.Metaspace(prepend_scheme="always"), plain("<extra_id_0>", "▁▁")),
    "another sign for a space": (["·two", "a", "▁"], decoders.Metaspace("·"), []),
    "GPT-4o": (BYTE_LEVEL, decoders.ByteLevel(), special("<|endoftext|>", "<|endofprompt|>")),
    "Llama 3": (BYTE_LEVEL, decoders.ByteLevel(), special(
        "<|eot_id|>", *(f"<|reserved_special_token_{n}|>" for n in range(9))
    )),
    "Qwen": (BYTE_LEVEL, decoders.ByteLevel(), [
        *special("<|im_start|>", "<|im_end|>"),
        *plain("<think>", "</think>", "<tool_call>", "<|fim_prefix|>", normalized=False),
    ]),
    "DeepSeek": (BYTE_LEVEL, decoders.ByteLevel(), [
        *special("<｜begin▁of▁sentence｜>", "<|EOT|>"),
        *plain("<｜User｜>", "<｜tool▁sep｜>", normalized=True),
    ]),
    "byte level, words of one's own": (BYTE_LEVEL, decoders.ByteLevel(), [
        *plain("  ", "    ", "\n\n", "\t", " two words", "漢é", "Über", "Ġx", "é"),
        *plain("strips", lstrip=True, rstrip=True, single_word=True),
    ]),
    "SmolLM2": (BYTE_LEVEL, decoders.Sequence([decoders.ByteLevel()]), special("<reponame>")),
    "words": (["a", "b ", "▁", "<0x41>"], FUSE, plain("▁▁", "  ")),
}  # fmt: skip


@cache
def family(name: str) -> tuple[PreTrainedTokenizerFast, ByteTable]:
    tokens, decoder, added = FAMILIES[name]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=tokens is SENTENCEPIECE))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    return fast, byte_table(fast)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], skip: bool) -> str:
    """The text that ids add behind a prompt, where no decoder strips a first space."""
    (before,) = tokenizer.convert_tokens_to_ids(["a"])

    def decode(ids: Sequence[int]) -> str:
        text = tokenizer.decode(
            list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        return str(text)

    return decode([before, *ids])[len(decode([before])) :]


def same(ours: str, theirs: str) -> bool:
    """Equal texts; decoders write one U+FFFD for some invalid bytes, the table one for each."""
    return re.sub("\ufffd+", "\ufffd", ours) == re.sub("\ufffd+", "\ufffd", theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_id_is_spelled_as_its_tokenizer_decodes_it(name):
    tokenizer, table = family(name)
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert len(table.pieces) == len(tokenizer)
    for index in range(len(tokenizer)):
        assert same(table.text([index]), decoded(tokenizer, [index], skip=True)), index
        if index in marked:
            assert table.text([index]) == ""
        else:
            assert same(table.text([index]), decoded(tokenizer, [index], skip=False)), index


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_sequences_of_ids_are_spelled_as_their_tokenizer_decodes_them(name, data):
    tokenizer, table = family(name)
    added = st.sampled_from(sorted(tokenizer.added_tokens_decoder) or [0])
    ids = data.draw(st.lists(st.one_of(st.integers(0, len(tokenizer) - 1), added), max_size=12))
    ours = table.text(ids)
    # A SentencePiece decoder spoils the valid bytes next to an invalid one too.
    if "\ufffd" not in ours or "ByteFallback" not in repr(tokenizer.backend_tokenizer.decoder):
        assert same(ours, decoded(tokenizer, ids, skip=True))


def test_gemmas_runs_of_spaces_are_spaces():
    tokenizer, table = family("Gemma")
    runs = ["▁" * length for length in range(2, 32)]
    ids = tokenizer.convert_tokens_to_ids(["a", *runs, "\n\n", "<start_of_turn>"])
    assert table.text(ids) == "a" + " " * sum(range(2, 32)) + "\n\n"
    assert table.lengths[ids].tolist() == [1, *range(2, 32), 2, 0]


@pytest.mark.parametrize(
    "decoder",
    [decoders.WordPiece(), decoders.BPEDecoder(), decoders.Sequence([FUSE, decoders.CTC()])],
    ids=["WordPiece", "BPEDecoder", "CTC"],
)
def test_a_decoder_that_joins_tokens_by_their_neighbours_is_an_input_error(decoder):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "##b": 1}, unk_token="a"))
    tokenizer.decoder = decoder
    with pytest.raises(InputError, match=r"its decoder .* spells no token by itself"):
        byte_table(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "deepseek_v3"])
def test_a_byte_level_vocabulary_of_llamas_class_keeps_its_spaces(tmp_path, model_type):
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(BYTE_LEVEL)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special("<｜end▁of▁sentence｜>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<｜end▁of▁sentence｜>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = load_tokenizer(str(tmp_path))
    text = "Add 1 and 2,\n  then é 漢."
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert byte_table(loaded).text(ids) == loaded.decode(ids) == text
    assert loaded.eos_token == "<｜end▁of▁sentence｜>"
