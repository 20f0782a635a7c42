"""Segments: where the text is cut, and where it never is."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.schemas.configs import SegmentConfig
from trace_opd.trace.segment import segment


def pieces(text, **config):
    return [text[start:end] for start, end in segment(text, SegmentConfig(**config))]


def test_sentences_and_lines_are_segments_with_their_white_space():
    assert pieces("First, add. Then stop!  Why?\n\nDone") == [
        "First, add. ", "Then stop!  ", "Why?\n\n", "Done",
    ]  # fmt: skip


def test_arithmetic_lines_are_segments():
    assert pieces("1+7+0=8 c0\n2+7+0=9 c0\n\\boxed{98}") == [
        "1+7+0=8 c0\n", "2+7+0=9 c0\n", "\\boxed{98}",
    ]  # fmt: skip


def test_an_empty_text_has_no_segments():
    assert segment("") == []


def test_a_decimal_point_is_no_sentence_end():
    assert pieces("x is 3.14 here. Next") == ["x is 3.14 here. ", "Next"]


@pytest.mark.parametrize("abbreviation", ["e.g.", "i.e.", "cf.", "vs.", "Eq.", "Fig.", "No."])
def test_an_abbreviation_is_no_sentence_end(abbreviation):
    assert pieces(f"see {abbreviation} this. Next") == [f"see {abbreviation} this. ", "Next"]


def test_a_list_marker_stays_with_its_sentence():
    assert pieces("1. First one.\n2. Second one. More.\n10. Tenth.") == [
        "1. First one.\n", "2. Second one. ", "More.\n", "10. Tenth.",
    ]  # fmt: skip


def test_a_number_at_a_sentences_end_is_no_list_marker():
    assert pieces("We get 12. Then 7.\nEnd") == ["We get 12. ", "Then 7.\n", "End"]


def test_a_closing_quote_or_bracket_belongs_to_its_sentence():
    assert pieces('He said "stop." (Really.) Fine.') == ['He said "stop." ', "(Really.) ", "Fine."]


def test_chinese_sentences_end_without_a_space():
    assert pieces("先算。再加！好") == ["先算。", "再加！", "好"]


@pytest.mark.parametrize(
    "formula",
    [
        "$a. b! c$",
        "$$a. b\n\nc$$",
        "\\(a. b\\)",
        "\\[a. b\nc? d\\]",
        "\\begin{align*}a. b\\\\\nc\\end{align*}",
        "\\begin{cases}a. b\n\\begin{x}c. d\\end{x}\n\\end{cases}",
        "```python\na = 1. \n\nb\n```",
        "\\boxed{1. 2\n3}",
        "\\frac{a. {b. c} d}{e}",
        "$a \\$ b. c$",
    ],
)
def test_segments_never_cut_inside_a_formula(formula):
    assert pieces(f"Before. {formula}. After") == ["Before. ", f"{formula}. ", "After"]


def test_a_dollar_amount_opens_no_formula():
    assert pieces("It costs $5. Then $6. Done") == ["It costs $5. ", "Then $6. ", "Done"]


@pytest.mark.parametrize("opener", ["$", "$$", "\\(", "\\[", "\\begin{align}", "```", "{"])
def test_an_opener_that_never_closes_protects_nothing(opener):
    assert pieces(f"A {opener}b. C\nd") == [f"A {opener}b. ", "C\n", "d"]


def test_an_unclosed_brace_does_not_unprotect_later_groups():
    assert pieces("a { b. c\n\\boxed{1. 2}. d") == ["a { b. ", "c\n", "\\boxed{1. 2}. ", "d"]


def test_an_environment_closes_with_its_own_name_only():
    assert pieces("\\begin{a}x. y\\end{b} z") == ["\\begin{a}x. ", "y\\end{b} z"]


def test_an_empty_formula_ends_at_once():
    assert pieces("a \\[\\] b. c \\[d. e\\]") == ["a \\[\\] b. ", "c \\[d. e\\]"]


def test_short_segments_join_the_next_and_the_last_joins_back():
    assert pieces("A. B. Long enough. C.", min_chars=6) == ["A. B. Long enough. C."]
    assert pieces("Long enough. B. Also long. C.", min_chars=6) == [
        "Long enough. ", "B. Also long. C.",
    ]  # fmt: skip


def test_blank_lines_make_no_segment_of_their_own():
    assert pieces("\n \n \na. b") == ["\n \n \na. ", "b"]


def test_a_blank_text_is_one_segment():
    assert pieces(" \n \n") == [" \n \n"]


def test_above_the_limit_adjacent_segments_merge_evenly():
    text = "".join(f"s{i}.\n" for i in range(10))
    assert pieces(text, max_segments=5) == [f"s{i}.\ns{i + 1}.\n" for i in range(0, 10, 2)]
    assert pieces(text, max_segments=1) == [text]


TEXTS = st.lists(
    st.sampled_from(
        ["$", "$$", "\\[", "\\]", "\\(", "\\)", "\\begin{a}", "\\end{a}", "```", "{", "}", "\\",
         ". ", "\n", " ", "1", "x", "é", "。", "!", '"']
    ),
    max_size=40,
).map("".join)  # fmt: skip


@given(st.one_of(st.text(max_size=60), TEXTS), st.integers(1, 9), st.integers(1, 9))
def test_segments_tile_the_text(text, min_chars, max_segments):
    found = segment(text, SegmentConfig(min_chars=min_chars, max_segments=max_segments))
    assert "".join(text[start:end] for start, end in found) == text
    assert all(start < end for start, end in found)
    assert len(found) <= max_segments
    if len(found) > 1 and len(found) < max_segments:
        assert all(len(text[start:end].strip()) >= min_chars for start, end in found)


HOSTILE = {
    "dollars": "$",
    "double dollars": "$$ ",
    "escaped dollars": "\\$",
    "amounts": "$x ",
    "braces": "{",
    "closing braces": "}",
    "display openers": "\\[",
    "inline openers": "\\(",
    "environments": "\\begin{a}",
    "mismatched environments": "\\begin{a}\\end{b}",
    "fences": "```a",
    "blank lines": "\n ",
    "full stops": ". ",
    "quotes": '."',
    "spaces": " ",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_texts_take_linear_time(unit):
    text = (unit * 200_000)[:200_000]
    began = time.perf_counter()
    found = segment(text)
    assert time.perf_counter() - began < 2
    assert (found[0][0], found[-1][1]) == (0, len(text))


def test_environments_that_each_have_another_name_take_linear_time():
    text = "".join(f"\\begin{{{'a' * (i % 300 + 1)}}}" for i in range(1300))
    began = time.perf_counter()
    segment(text)
    assert time.perf_counter() - began < 2
