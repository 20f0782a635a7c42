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


NEVER_ENDS = [
    "e.g.", "i.e.", "cf.", "vs.", "viz.", "approx.", "Eq.", "Eqs.", "Fig.", "Thm.", "Lem.", "Prop.",
    "Cor.", "Def.", "Mr.", "Mrs.", "Dr.", "Prof.",
]  # fmt: skip
SOMETIMES_ENDS = [
    "No.", "Nos.", "p.", "pp.", "Sec.", "Ch.", "Vol.", "Ex.", "Ref.", "Alg.", "resp.", "etc.",
    "al.", "U.S.", "a.m.", "in.", "ft.", "sec.", "min.", "Q.E.D.",
]  # fmt: skip


@pytest.mark.parametrize("abbreviation", NEVER_ENDS)
@pytest.mark.parametrize("behind", ["this", "A", "3", "(4)", "$x$"])
def test_an_abbreviation_is_no_sentence_end(abbreviation, behind):
    sentence = f"see {abbreviation} {behind} (by {abbreviation.lower()} {behind}) there. "
    assert pieces(f"{sentence}Next") == [sentence, "Next"]


@pytest.mark.parametrize("abbreviation", SOMETIMES_ENDS)
def test_an_abbreviation_that_also_ends_sentences_ends_them_before_a_capital_only(abbreviation):
    for behind in ("12", "(4)", "and", "$x$", "\\(x\\)"):
        assert pieces(f"a {abbreviation} {behind} b. C") == [f"a {abbreviation} {behind} b. ", "C"]
    assert pieces(f"a {abbreviation} Then b. C") == [f"a {abbreviation} ", "Then b. ", "C"]


@pytest.mark.parametrize(
    "name", ["G. H. Hardy", "Prof. J. Smith", "Dr. A. B. Cole", "J. L. S. Hope"]
)
def test_initials_belong_to_their_name(name):
    assert pieces(f"Shown by {name} in 1990. Next") == [f"Shown by {name} in 1990. ", "Next"]


@pytest.mark.parametrize("variable", ["x", "B", "P"])
def test_a_variable_ends_a_sentence(variable):
    assert pieces(f"It is {variable}. Then stop.") == [f"It is {variable}. ", "Then stop."]


@pytest.mark.parametrize(
    "text",
    ["5! ways", "n! = 120", "(n+1)! + 2", "k! ≥ 3", "1 + 2 + ... + n", "1, 2, ... , 9", "? + 3"],
)
def test_a_sign_within_a_calculation_is_no_sentence_end(text):
    assert pieces(f"So. Here {text} is it. So... Well! Why? Go") == [
        "So. ", f"Here {text} is it. ", "So... ", "Well! ", "Why? ", "Go",
    ]  # fmt: skip


LABELS = [
    "1.", "12.", "1.2.", "(1).", "(a).", "A.", "iv.", "Step 1.", "Case B.", "Proof.", "Solution.",
    "Theorem 2 (Fermat).", "**Step 1.**", "**Case 2. Odd numbers.**", "*Proof.*", "__Claim.__",
    "**Why?**", "## 3.", "### Step 4.", "> 2.", "- 5.", "**1.**",
]  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
def test_a_label_stays_with_its_text(label):
    # At the beginning, on a line, behind a sentence, and indented.
    assert pieces(f"{label} One. Then\n{label} Add it. {label} Stop.\n  {label} Go. End") == [
        f"{label} One. ", "Then\n", f"{label} Add it. ", f"{label} Stop.\n  ", f"{label} Go. ",
        "End",
    ]  # fmt: skip


def test_a_number_at_a_sentences_end_is_no_list_marker():
    assert pieces("We get 12. Then 7.\nEnd") == ["We get 12. ", "Then 7.\n", "End"]


def test_a_closing_quote_or_bracket_belongs_to_its_sentence():
    assert pieces('He said "stop." (Really.) Fine.') == ['He said "stop." ', "(Really.) ", "Fine."]
    assert pieces("He said “stop.” *So.* Fine.") == ["He said “stop.” ", "*So.* Fine."]
    assert pieces("他说“停。”然后！！走") == ["他说“停。”", "然后！！", "走"]


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
        "$ n! = 120 $",
        "$ f(x) = 2x. y $",
        "$x = 1.\ny = 2$",
        "$\nx = 1.\n$",
        "$x \\text{ for all. Those } y.\n = 3 $",
        "$2. 5\n$",
        "\\begin{cases}a. b\n\\begin{cases}c. d\\end{cases}\ne. f\\end{cases}",
        "\\begin{a}\\begin{b}x. y\\begin{a}c. d\\end{a}\\end{b}. e\\end{a}",
    ],
)
def test_segments_never_cut_inside_a_formula(formula):
    assert pieces(f"Before. {formula}. After") == ["Before. ", f"{formula}. ", "After"]


@pytest.mark.parametrize(
    "fence",
    [
        "~~~python\na = 1. \n\nb\n~~~",
        "~~~~\na. b\n~~~\nc. d\n~~~~",
        "```\na. b\n~~~\nc. d\n```",
        "````\n```a. b\n```\nc. d\n````",
    ],
)
def test_segments_never_cut_inside_a_code_block(fence):
    assert pieces(f"So.\n  {fence}\nAfter. End") == ["So.\n  ", f"{fence}\n", "After. ", "End"]


FORMULAS_WITH_STOP = ["$ x = 2. $", "$x = 2.$", "$$x = 2.$$", "\\[ x = 2. \\]", "\\(x.\\)"]


@pytest.mark.parametrize("formula", FORMULAS_WITH_STOP)
def test_a_full_stop_inside_a_formula_at_its_end_ends_the_sentence_behind_it(formula):
    assert pieces(f"We get {formula} Then {formula} so. Done") == [
        f"We get {formula} ", f"Then {formula} so. ", "Done",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "sentences",
    [
        ["It costs $5. ", "Then $6. ", "Done"],
        ["It costs $5 and $6. ", "Then $x$ is 11. ", "Done"],
        ["It costs 5 $. ", "Then 6 $ more. ", "Done"],
        ["It costs $ 5. ", "Then $ 6 more. ", "Done"],
        ["It costs $5.\n", "Then it costs $6.\n", "$x. y$. ", "Done"],
        ["It costs $1,250.50. ", "Now the $ sign. ", "Done"],
        ["It costs US$ 5. ", "Here US$ 6. ", "Done"],
        ["It costs \\$5. ", "Then \\$6. ", "Done"],
        ["It costs $5 a day. ", "The formula $ a. b $ is it. ", "Done"],
        ["So $x is missing. ", "Then $y$ and $z. w$ too. ", "Done"],
        ["A sum $x\n\n", "and one $y. ", "Done"],
    ],
)
def test_a_dollar_amount_opens_no_formula(sentences):
    assert pieces("".join(sentences)) == sentences


@pytest.mark.parametrize(
    "opener", ["$", "$ ", "$$", "\\(", "\\[", "\\begin{align}", "```", "~~~", "{"]
)
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
        ["$", "$$", "\\[", "\\]", "\\(", "\\)", "\\begin{a}", "\\end{a}", "```", "~~~", "{", "}",
         "\\", ". ", "\n", " ", "1", "x", "é", "。", "!", '"', "**", "Step ", "Dr", "G", "So "]
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
    "tildes": "~~~\n",
    "spaced dollars": "$ a ",
    "dollars on lines": "$\n",
    "labels": "1. ",
    "initials": "A. ",
    "bold": "**a. ",
    "factorials": "n! ",
    "abbreviations": "e.g. ",
    "ends of environments": "\\begin{a}\\begin{b}\\end{a}",
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
