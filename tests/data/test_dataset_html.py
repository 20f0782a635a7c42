"""A dataset in a notebook: figures and lineage as HTML, and its rows as a polars frame."""

import re
from html import unescape
from typing import Any

import pytest

from trace_opd.data.dataset_html import dataset_html
from trace_opd.data.store import Dataset, Store
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import PROBLEMS

ROWS = [
    {
        "problem_id": f"{row:04x}", "problem": f"{row} + 1", "answer": str(row + 1),
        "answer_kind": "math", "solution": None, "steps": None, "source": "made", "split": "train",
    }
    for row in range(5)
]  # fmt: skip


@pytest.fixture
def problems(tmp_path) -> Dataset:
    draft: Any = Store(tmp_path / "store").begin("problems", {}, {}, PROBLEMS)
    draft.write_part(0, PROBLEMS.table(ROWS[:3]))
    draft.write_part(1, PROBLEMS.table(ROWS[3:]))
    return draft.finish(2, {"problems": 5, "<b>key</b>": "<script>x</script>\x1b"})


def text_of(page: str) -> str:
    return " ".join(unescape(re.sub("<.*?>", " ", page)).split())


def test_figures_rows_and_files_are_there(problems):
    text = text_of(problems._repr_html_())
    assert text.startswith(f"{problems.ref} 2 parts, 5 rows, table problems, finished 20")
    assert "problems 5" in text
    assert text.endswith(problems.glob)


def test_the_lineage_names_what_it_was_made_from(problems):
    store = Store(problems.files.root)
    middle: Any = store.begin("verify", {}, {"problems": problems}, None)
    last: Any = store.begin("train", {}, {"verdicts": middle.finish(0)}, None)
    text = text_of(last.finish(0)._repr_html_())
    assert re.search(rf"made from verdicts: verify/\w+ , 0 rows problems: {problems.ref}", text)


def test_texts_of_a_foreign_store_are_escaped(problems):
    page = problems._repr_html_()
    assert not re.search(r"<script|<b>key|\x1b", page)
    assert "&lt;script&gt;x&lt;/script&gt;\\x1b" in page


def test_figures_of_an_evaluation_are_named_by_policy(problems):
    estimate = {"value": 0.454, "ci95": [0.422, 0.487]}
    unknown = {"value": None, "ci95": None}
    summary = {
        "policies": {"base": {"avg@8": estimate, "maj@8": unknown}},
        "k": 8,
        "per_part": [{}],
    }
    text = text_of(dataset_html(problems.manifest | {"summary": summary}, 5, [], "there"))
    assert "policies.base.avg@8 0.454 (0.422 – 0.487)" in text
    assert "policies.base.maj@8 –" in text
    assert "per_part" not in text


def test_long_summaries_are_cut(problems):
    summary = {f"figure {n}": "x" * 1000 for n in range(100)}
    page = dataset_html(problems.manifest | {"summary": summary}, 5, [], "there")
    assert "60 more in .summary" in text_of(page)
    assert len(page) < 20_000


def test_rows_become_a_polars_frame(problems):
    frame = problems.to_polars()
    assert frame["problem"].to_list() == [row["problem"] for row in ROWS]
    assert problems.to_polars(["answer"]).columns == ["answer"]


def test_a_dataset_without_a_table_is_one_sentence(tmp_path):
    draft: Any = Store(tmp_path / "store").begin("train", {}, {}, None)
    with pytest.raises(InputError, match=r"has no table; its figures are in \.summary"):
        draft.finish(0).to_polars()
