"""Extraction of final answers and letters from responses, and comparisons of strings."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_opd.pipelines.verifiers.reading import (
    choice_letter,
    exact_match,
    final_answer,
    gold_parses,
)
from trace_opd.schemas.labels import AnswerKind


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{42.}", "42"),
        (r"\boxed{1} and then \boxed{2", "1"),
        (r"\text{all of it: \boxed{5}", "5"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{\{1,2\}} } }", r"\{1,2\}"),
        (r"put it in \boxed{}: \boxed{3}", "3"),
        (r"\boxed{3}, which fills \boxed{ }", "3"),
        ("\\\\\\boxed{4}", "4"),
    ],
)
def test_the_last_balanced_box_is_the_answer(response: str, answer: str):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 42.", "42"),
        ("The final answer is: $\\frac{1}{2}$ metres.", r"\frac{1}{2}"),
        ("**Answer:** 3.5", "3.5"),
        ("Answer: (1, 2)\nDone.", "(1, 2)"),
        ("The answer is 3. No, the answer is 4.", "4"),
        ("17 + 4 = 21\n#### 21", "21"),
        ("Answer:\n\\[ x + 1 \\]", "x + 1"),
        (r"The answer is 4, so \boxed{5}", "5"),
    ],
)
def test_without_a_box_the_last_statement_counts(response: str, answer: str):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"$\boxed{-2}$ and $\boxed{3}$", "-2, 3"),
        (r"$x=\boxed{-2}$, $y = \boxed{3}$", "-2, 3"),
        (r"\[\boxed{(1,2)} \quad \text{and} \quad \boxed{(3,4)}\]", "(1,2), (3,4)"),
        (r"\boxed{1} cats, \boxed{2} dogs and \boxed{3} birds", "1, 2, 3"),
        ("(a) $\\boxed{1}$\n(b) $\\boxed{2}$", "1, 2"),
        (r"\boxed{5} or \boxed{6}", r"5 \text{ or } 6"),
        (r"\boxed{5} (or perhaps $\boxed{6}$)", r"5 \text{ or } 6"),
        (r"\boxed{5}, or it could be \boxed{6}", r"5 \text{ or } 6"),
        (r"\boxed{5} and again \boxed{5}", "5"),
        (r"The area is \boxed{5} and so the volume is \boxed{6}", "6"),
        (r"Not \boxed{5}. And \boxed{6}", "6"),
        ("\\boxed{5}\n\n\\boxed{6}", "6"),
        ("The answer is $5$ or $6$.", r"5 \text{ or } 6"),
        ("The answer is $5$ (or 6).", r"5 \text{ or } 6"),
        ("The answer is $x=5$ and $y=6$, as $5<6$.", "x=5, y=6"),
        ("The answer is $5$, since $x=6$.", "5"),
        ("The answer is $5$, not $6$.", "5"),
        ("The answer is therefore $5$.", "5"),
    ],
)
def test_parts_of_an_answer_are_joined_and_steps_are_not(response: str, answer: str):
    assert final_answer(response) == answer


@pytest.mark.parametrize("end", ["</think>", "</thinking>", "<|end_of_thought|>", "[/THINK]"])
@pytest.mark.parametrize(
    ("behind", "answer"),
    [
        ("The answer is 8.", "8"),
        (r"\boxed{8}", "8"),
        ("<answer>8</answer>", "8"),
        ("I get 8.", None),
        ("\n", "7"),
    ],
)
def test_what_stands_behind_the_thinking_counts_alone(end: str, behind: str, answer: str | None):
    assert final_answer(rf"<think>It is \boxed{{7}}.{end}{behind}") == answer


def test_a_final_answer_behind_the_box_counts_more():
    response = r"The fee is \boxed{255}. Final Answer: The final answer is $10,455$. I hope so."
    assert final_answer(response) == "10,455"
    assert final_answer(r"The answer is \boxed{5}. The final answer is positive.") == "5"


@pytest.mark.parametrize(
    "response",
    ["", "3 + 4 = 7", "So we get 7.", "The answer is", r"The answer is \boxed{7", r"\boxed{}"],
)
def test_a_response_that_commits_to_nothing_has_no_answer(response: str):
    assert final_answer(response) is None


@given(before=st.text(), content=st.text(alphabet="ab1 +^\n", min_size=1), depth=st.integers(0, 5))
def test_a_box_is_found_whatever_stands_before_it(before: str, content: str, depth: int):
    inside = "{" * depth + "x" + content + "y" + "}" * depth
    # A trailing backslash would escape the box's brace.
    assert final_answer(f"{before} \\boxed{{{inside}}}") == inside.strip()


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{" * 300_000,
        "\\boxed{" * 150_000 + "}" * 150_000,
        "\\boxed" + " " * 1_000_000,
        "answer is " * 100_000,
        "answer: " + "\\(" * 500_000,
        "answer: " + "\\text{" * 150_000,
        "answer:" + " " * 1_000_000,
    ],
)
@pytest.mark.parametrize("read", [final_answer, choice_letter])
def test_a_hostile_response_of_a_million_characters_is_read_in_linear_time(response: str, read):
    start = time.process_time()
    read(response)
    # Linear time is 0.2 s here; quadratic time would be many minutes.
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(c)}}", "C"),
        (r"\boxed{\textbf{B. } 5 m}", "B"),
        (r"\boxed{(D) 12 and more}", "D"),
        ("Answer: C", "C"),
        ("**Answer:** (B)", "B"),
        ("**Answer: A**", "A"),
        ("The correct answer is D because it is.", "D"),
        ("The answer is option (A).", "A"),
        ("The answer is A. No: the answer is B.", "B"),
        ("It must be the last.\n(D)", "D"),
        ("C", "C"),
        (r"The final answer is $\text{B}$.", "B"),
        (r"Answer: \(B\)", "B"),
        (r"Answer: $\textbf{(B)}\ 12$", "B"),
        (r"The answer is \(\mathbf{(B)}\).", "B"),
        ("The correct option is **(B)**.", "B"),
        (r"<think>\boxed{A}</think>Answer: B", "B"),
        (r"\boxed{B}, so \boxed{B}", "B"),
    ],
)
def test_the_chosen_letter_is_read(response: str, letter: str):
    assert choice_letter(response) == letter


@pytest.mark.parametrize(
    "response",
    [
        "",
        r"\boxed{5}",
        r"\boxed{A, B}",
        r"\boxed{(A) and (B)}",
        r"Answer: C, but \boxed{Carbon}",
        "The answer is A or B.",
        "The answer is $A$ or $B$.",
        r"\boxed{A} or \boxed{B}",
        "The answer is a long story",
        "The answer is I think unclear",
        "(A) and (B) are both plausible",
    ],
)
def test_an_unclear_choice_is_no_choice(response: str):
    assert choice_letter(response) is None


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("42", " 042 ", True),
        ("42", "43", False),
        ("-7", "-7", True),
        ("3.50", "3.50", True),
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        ("Tuesday", r"\text{tuesday}", True),
        ("listen", "silent", False),
        ("Tuesday", "7", False),
        ("No", "on", False),
        (r"\text{CAT}", "CAT", True),
        (r"\text{CAT}", "ACT", False),
        ("Alice, Bob", "bob and alice", True),
        ("Alice, Bob", "Celia, Obb", False),
        ("0.5", r"\frac{1}{2}", True),
        ("0.5", r"\dfrac{2}{4}", True),
        ("1,234", "1234.0", True),
        ("-3/4", r"-\frac{3}{4}", True),
        ("1/3", "0.33", False),
        ("1/3", "0.333333", None),  # math-verify decides how many places count
        ("5", "٥", None),
        ("12", "1,2", None),
        ("0.09", r"9\%", None),
        ("xyz", "zyx", None),
        (r"\sqrt{2}", r"\sqrt{2}", None),
    ],
)
def test_strings_decide_only_where_they_can(gold: str, answer: str, expected: bool | None):
    assert exact_match(gold, answer) is expected


@pytest.mark.parametrize(
    ("answer", "kind", "parses"),
    [
        ("12", AnswerKind.MATH, True),
        (r"\sqrt{2}", AnswerKind.MATH, None),
        ("9^{9^{9}}", AnswerKind.MATH, None),
        ("Tuesday", AnswerKind.MATH, True),
        ("}{", AnswerKind.MATH, None),
        ("C", AnswerKind.CHOICE, True),
        ("(b)", AnswerKind.CHOICE, True),
        ("12", AnswerKind.CHOICE, False),
        ("Z", AnswerKind.CHOICE, False),
    ],
)
def test_gold_answers_are_checked_by_kind(answer: str, kind: AnswerKind, parses: bool | None):
    assert gold_parses(answer, kind) is parses
