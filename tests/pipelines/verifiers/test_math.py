"""Equality of answers: a table of golds and answers, and the fast paths against the full path.

`answers.jsonl`: gold, answer, the correct reward; `missed`: an equal answer that is refused.
"""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from latex2sympy2_extended import latex2sympy

from trace_opd.pipelines.verifiers import math as mathematics
from trace_opd.pipelines.verifiers.notation import prepare
from trace_opd.pipelines.verifiers.pool import Job, VerifierPool
from trace_opd.pipelines.verifiers.reading import exact_match
from trace_opd.pipelines.verifiers.worker import judge
from trace_opd.schemas.labels import VerdictStatus

ROWS = [
    json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text().splitlines()
]


def test_a_table_of_answers_is_judged_as_a_reward_should():
    pool = VerifierPool(workers=2, timeout_s=60, memory_mib=2048)
    fast = [exact_match(row["gold"], row["answer"]) for row in ROWS]
    asked = [Job(row["gold"], row["answer"]) for row, known in zip(ROWS, fast, strict=True)]
    outcomes = pool.judge([job for job, known in zip(asked, fast, strict=True) if known is None])
    pool.close()
    judged = iter(outcome.correct for outcome in outcomes)
    verdicts = [next(judged) if known is None else known for known in fast]
    wrongly_right = [r for r, v in zip(ROWS, verdicts, strict=True) if v and not r["expected"]]
    refused = [r for r, v in zip(ROWS, verdicts, strict=True) if r["expected"] and not v]
    assert len(ROWS) >= 300
    assert wrongly_right == []
    assert refused == [row for row in ROWS if row.get("missed")]
    # Each has a verdict for a reason, not because of a timeout.
    ended = {VerdictStatus.OK, VerdictStatus.PRED_UNPARSED}
    assert {outcome.status for outcome in outcomes} <= ended


SIGN = st.sampled_from(["", "-", "+"])
NATURAL = st.one_of(st.integers(0, 30), st.integers(0, 10**12))
DECIMAL = st.builds("{}.{}".format, NATURAL, st.text(alphabet="0123456789", min_size=1, max_size=8))
PLAIN = st.one_of(
    NATURAL.map(str),
    DECIMAL,
    DECIMAL.map(lambda text: text.removeprefix("0")),
    NATURAL.map("{:,}".format),
    st.builds("{}/{}".format, NATURAL, st.integers(1, 10**6)),
    st.builds(r"\frac{{{}}}{{{}}}".format, NATURAL, st.integers(1, 10**6)),
    st.builds(r"\dfrac{{-{}}}{{{}}}".format, NATURAL, st.integers(1, 40)),
)
NUMBER = st.builds(str.__add__, SIGN, PLAIN)


def spellings(number: int, places: int) -> st.SearchStrategy[str]:
    """A decimal with at most six places, and similar ones: near misses and equals matter most."""
    bottom = 10**places
    near = [number, number + 1, number - 1, 10 * number]
    return st.sampled_from(
        [f"{n / bottom:.{places}f}" for n in near]
        + [f"{n}/{bottom}" for n in near]
        + [rf"\frac{{{n}}}{{{bottom}}}" for n in near]
    )


PAIR = st.one_of(
    st.tuples(NUMBER, NUMBER),
    NUMBER.map(lambda number: (number, number)),
    st.tuples(st.integers(0, 10**6), st.integers(0, 8)).flatmap(
        lambda drawn: st.tuples(spellings(*drawn), spellings(*drawn))
    ),
)


@settings(max_examples=100, deadline=None)
@given(pair=PAIR)
def test_the_fast_path_for_plain_numbers_agrees_with_the_worker(pair: tuple[str, str]):
    known = exact_match(*pair)
    status, correct, _ = judge(*pair)
    assert status == VerdictStatus.OK
    assert known in (None, correct)


FORMULA = st.recursive(
    st.one_of(
        st.sampled_from(["x", "y", "n", "e", r"\pi", r"\theta", "x_1", "i"]),
        st.integers(0, 120).map(str),
        st.sampled_from(["0.5", "2.75", "1,234", r"9\%"]),
    ),
    lambda inner: st.one_of(
        st.builds("{}+{}".format, inner, inner),
        st.builds("{}-{}".format, inner, inner),
        st.builds(r"{} \cdot {}".format, inner, inner),
        st.builds("{}x".format, inner),
        st.builds("({})".format, inner),
        st.builds("({})^2".format, inner),
        st.builds("{}^2".format, inner),
        st.builds("{}^{{{}}}".format, inner, inner),
        st.builds(r"\frac{{{}}}{{{}}}".format, inner, inner),
        st.builds(r"\sqrt{{{}}}".format, inner),
        st.builds(r"\sin({})".format, inner),
        st.builds(r"\ln {}".format, inner),
        st.builds("{}!".format, inner),
        st.builds("({},{})".format, inner, inner),
        st.builds("[{},{})".format, inner, inner),
        st.builds(r"\{{{},{}\}}".format, inner, inner),
        st.builds("{},{}".format, inner, inner),
        st.builds("x={}".format, inner),
        st.builds(r"{}<x\le {}".format, inner, inner),
    ),
    max_leaves=5,
)


def parsed(reader: type, latex: str):
    try:
        return reader(is_real=True).parse(latex)
    except Exception as error:
        return type(error)


@settings(max_examples=80, deadline=None)
@given(text=FORMULA)
def test_the_first_stage_of_parsing_reads_what_the_second_reads(text: str):
    prepared = prepare(text)
    assert prepared is not None
    latex = mathematics.normalize_latex(prepared, mathematics._NORMALIZATION)
    first = parsed(mathematics._FirstStage, latex)
    if not isinstance(first, type):
        assert first == parsed(mathematics._Reader, latex)


@settings(max_examples=60, deadline=None)
@given(text=st.one_of(NATURAL.map(str), DECIMAL, PLAIN))
def test_numbers_are_read_as_latex2sympy_reads_them(text: str):
    assert mathematics.read(text) == latex2sympy(
        text, is_real=True, normalization_config=mathematics._NORMALIZATION
    )
