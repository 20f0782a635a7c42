"""Text to tokens through bytes: byte-level, byte-fallback, character and word vocabularies."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.errors import InputError
from trace_opd.trace.align import ByteTable, byte_table
from trace_opd.trace.policy import load_tokenizer

SAMPLES = [
    "plain ascii, with punctuation.",
    "naïve café: Ångström, e\u0301 combined",
    "漢字とかな交じり文。终于!",
    "emoji 😀👍🏽 and a family 👨‍👩‍👧 and a flag 🇩🇪",
    "line\nbreaks\r\n\ttabs  double  spaces ",
    "$\\int_0^1 x^2\\,dx = \\frac{1}{3}$ → ∞ ≤ ½",
]


@cache
def byte_level() -> PreTrainedTokenizerBase:
    """A byte-level BPE (like GPT-2's and Qwen's) with merges that cut characters apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(SAMPLES, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@cache
def byte_fallback() -> PreTrainedTokenizerBase:
    """A SentencePiece-like BPE with byte fallback (like Llama 2's and Gemma's)."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,:!é漢"]
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁a", "in"]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        [("▁", "a"), ("i", "n")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {"byte level": byte_level, "byte fallback": byte_fallback}


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def table_of(kind: str) -> ByteTable:
    return byte_table(TOKENIZERS[kind]())


# --- the table ---


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", SAMPLES)
def test_the_tokens_bytes_joined_are_the_text(kind, text):
    ids = encode(TOKENIZERS[kind](), text)
    table = table_of(kind)
    assert b"".join(table.pieces[i] for i in ids) == text.encode()
    assert table.text(ids) == text


@pytest.mark.parametrize("text", SAMPLES)
def test_the_texts_equal_the_tokenizers_own_decoding(text):
    tokenizer = byte_level()
    ids = encode(tokenizer, text)
    assert table_of("byte level").text(ids) == tokenizer.decode(ids)


def test_special_tokens_stand_for_no_bytes_and_added_words_for_their_text():
    tokenizer = byte_level()
    end, think = tokenizer.convert_tokens_to_ids(["<|end|>", "<think>"])
    table = table_of("byte level")
    assert (table.pieces[end], table.pieces[think]) == (b"", b"<think>")
    assert table.text([think, *encode(tokenizer, "hé"), end]) == "<think>hé"


def test_fallback_bytes_and_spaces_of_a_sentencepiece_vocabulary():
    tokenizer = byte_fallback()
    ids = encode(tokenizer, "a in é😀")
    pieces = [table_of("byte fallback").pieces[i] for i in ids]
    assert pieces == [b"a", b" ", b"in", b" ", "é".encode(), *(bytes([b]) for b in "😀".encode())]


def test_a_metaspace_vocabulary_without_fallback_has_spaces_too():
    tokenizer = Tokenizer(models.WordLevel({"▁two": 0, "▁words": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    table = byte_table(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert table.text([0, 1]) == " two words"


def test_the_micro_policys_characters_stand_for_themselves():
    tokenizer = load_tokenizer(resolve_policy("micro"))
    table = byte_table(tokenizer)
    text = "1+7+0=8 c0\n\\boxed{8}"
    ids = encode(tokenizer, text)
    assert table.text([*ids, tokenizer.eos_token_id]) == text
    assert table.lengths[ids].tolist() == [1] * len(text)


def test_a_tokenizer_without_a_backend_is_an_input_error():
    class Slow:
        name_or_path = "slow"

    with pytest.raises(InputError, match=r"tokenizer slow: has no tokenizer.json"):
        byte_table(Slow())


# --- ranges ---

# "é" cut in two, "漢" in three, with complete and empty tokens between.
CUT = ByteTable(
    (b"", b"a", b"\xc3", b"\xa9", b"\xe6", b"\xbc", b"\xa2", b"b c", b"\xff", b"\xe6\xbc")
)


def test_tokens_that_share_a_character_overlap_in_it():
    first, last = CUT.char_ranges([1, 2, 3, 4, 5, 6, 7])
    assert CUT.text([1, 2, 3, 4, 5, 6, 7]) == "aé漢b c"
    assert first.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert last.tolist() == [1, 2, 2, 3, 3, 3, 6]


def test_a_token_without_bytes_has_an_empty_range_where_it_stands():
    first, last = CUT.char_ranges([0, 1, 0, 2, 0, 3, 0])
    assert first.tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert last.tolist() == [0, 1, 1, 2, 1, 2, 2]


def test_each_invalid_byte_is_one_replacement_character():
    # An unfinished 漢 (two bytes), a lone 0xFF, a lone continuation byte.
    ids = [1, 9, 8, 3, 1]
    assert CUT.text(ids) == "a\ufffd\ufffd\ufffd\ufffda"
    first, last = CUT.char_ranges(ids)
    assert first.tolist() == [0, 1, 3, 4, 5]
    assert last.tolist() == [1, 3, 4, 5, 6]


def test_encoded_surrogates_and_overlong_forms_are_invalid_bytes():
    table = ByteTable((b"\xed\xa0\x80", b"\xc0\xaf", b"x"))
    assert table.text([0, 1, 2]) == "\ufffd" * 5 + "x"
    assert table.char_ranges([0, 1, 2])[1].tolist() == [3, 5, 6]


def test_a_replacement_character_that_was_sampled_has_its_three_bytes():
    table = ByteTable(("\ufffd".encode(), b"x"))
    assert table.text([0, 1]) == "\ufffdx"
    assert table.char_ranges([0, 1])[0].tolist() == [0, 1]


def test_no_tokens_have_no_ranges_and_no_segments():
    first, last = CUT.char_ranges([])
    assert (len(first), len(last), CUT.text([])) == (0, 0, "")
    assert CUT.token_segments([], []).tolist() == []


# --- segments ---


def test_a_token_belongs_to_the_segment_with_most_of_its_bytes():
    table = ByteTable((b"abcde",))
    assert table.token_segments([0], [(0, 2), (2, 5)]).tolist() == [1]
    assert table.token_segments([0], [(0, 3), (3, 5)]).tolist() == [0]


def test_a_tie_goes_to_the_earlier_segment():
    assert ByteTable((b"abcd",)).token_segments([0], [(0, 2), (2, 4)]).tolist() == [0]
    assert ByteTable((b"ab",)).token_segments([0], [(0, 1), (1, 2)]).tolist() == [0]


def test_bytes_count_not_characters():
    # "ab" has two bytes, "漢" three.
    table = ByteTable(("ab漢".encode(),))
    assert table.token_segments([0], [(0, 2), (2, 3)]).tolist() == [1]


def test_the_parts_of_a_cut_character_belong_to_its_segment():
    # a | é | 漢 | b c
    segments = [(0, 1), (1, 2), (2, 3), (3, 6)]
    assert CUT.token_segments([1, 2, 3, 4, 5, 6, 7], segments).tolist() == [0, 1, 1, 2, 2, 2, 3]


def test_invalid_bytes_belong_to_the_segments_of_their_characters():
    # The text is "a", four U+FFFD, "a"; the cut is in the middle of them.
    assert CUT.token_segments([1, 9, 8, 3, 1], [(0, 3), (3, 6)]).tolist() == [0, 0, 1, 1, 1]


def test_tokens_without_bytes_belong_to_no_segment():
    assert CUT.token_segments([0, 1, 0, 7, 0], [(0, 1), (1, 4)]).tolist() == [-1, 0, -1, 1, -1]


def test_a_leading_space_goes_with_its_word():
    tokenizer, table = byte_fallback(), table_of("byte fallback")
    ids = encode(tokenizer, "in. a")
    # The cut after "in. " is inside the token "▁a": one byte on each side, so the earlier segment.
    assert [table.pieces[i] for i in ids] == [b"in", b".", b" a"]
    assert table.token_segments(ids, [(0, 4), (4, 5)]).tolist() == [0, 0, 0]
    assert table.token_segments(ids, [(0, 3), (3, 5)]).tolist() == [0, 0, 1]


TEXTS = st.text(
    st.one_of(st.sampled_from("ab .é漢😀\u200d\u0301\n"), st.characters(codec="utf-8")), max_size=30
)


def cuts_of(text: str, draw: st.DataObject) -> list[tuple[int, int]]:
    inner = draw.draw(st.lists(st.integers(1, max(len(text) - 1, 1)), max_size=5, unique=True))
    edges = sorted({0, len(text), *(cut for cut in inner if cut < len(text))})
    return list(pairwise(edges))


def assert_aligned(table: ByteTable, ids: list[int], segments: list[tuple[int, int]]) -> None:
    """Ranges cover the text without a gap. Every token with bytes has exactly one segment: one that
    it overlaps, and of two that it overlaps the one with most of its bytes.
    """
    text = table.text(ids)
    first, last = table.char_ranges(ids)
    has_bytes = np.array([len(table.pieces[i]) > 0 for i in ids], dtype=bool)
    covered = {char for a, b in zip(first, last, strict=True) for char in range(a, b)}
    assert covered == set(range(len(text)))
    assert (first[1:] >= first[:-1]).all()
    assert (last[has_bytes] > first[has_bytes]).all()
    index = table.token_segments(ids, segments)
    assert ((index >= 0) == has_bytes).all()
    assert (np.diff(index[has_bytes]) >= 0).all()
    for token, (a, b) in enumerate(zip(first, last, strict=True)):
        if has_bytes[token]:
            start, end = segments[index[token]]
            assert max(a, start) < min(b, end)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=TEXTS, draw=st.data())
@settings(deadline=None)
def test_encoded_text_is_tiled_by_its_tokens(kind, text, draw):
    # Without SentencePiece's own sign for a space: encoding does not distinguish it from a space.
    text = text.replace("▁", "_")
    table = table_of(kind)
    ids = encode(TOKENIZERS[kind](), text)
    assert table.text(ids) == text
    assert_aligned(table, ids, cuts_of(text, draw))


@given(pieces=st.lists(st.binary(max_size=5), max_size=12), draw=st.data())
@settings(deadline=None)
def test_any_bytes_at_all_are_tiled_by_their_tokens(pieces, draw):
    table = ByteTable(tuple(pieces))
    ids = list(range(len(pieces)))
    assert_aligned(table, ids, cuts_of(table.text(ids), draw))


@given(pieces=st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=8), draw=st.data())
@settings(deadline=None)
def test_the_vectorised_segments_equal_a_count_of_bytes(pieces, draw):
    """The slow twin: label every byte with its segment, then take each token's middle byte."""
    table = ByteTable(tuple(pieces))
    ids = list(range(len(pieces)))
    segments = cuts_of(table.text(ids), draw)
    escaped = b"".join(pieces).decode("utf-8", "surrogateescape")
    owner = [
        index
        for index, (start, end) in enumerate(segments)
        for char in escaped[start:end]
        for _ in char.encode("utf-8", "surrogateescape")
    ]
    at, expected = 0, []
    for piece in pieces:
        own = owner[at : at + len(piece)]
        at += len(piece)
        expected.append(own[(len(own) - 1) // 2])
        if len(set(own)) == 2:
            assert expected[-1] == max(sorted(set(own)), key=own.count)
    assert table.token_segments(ids, segments).tolist() == expected
