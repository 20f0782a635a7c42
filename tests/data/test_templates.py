"""Problems and answers of several columns by a template; rows with images are refused."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from trace_opd.data import sources
from trace_opd.data.row_files import BadRow
from trace_opd.schemas.configs import Columns, FilesSource, HubSource
from trace_opd.schemas.errors import InputError

ROW = {"question": "How many?", "context": "3 boxes of 4 pens.", "number": 12, "unit": "pens"}
TEMPLATE = "{context}\n\n{question}"
BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE = {"bytes": b"\x89PNG", "path": None}


def source(path, **columns: str) -> FilesSource:
    return FilesSource(kind="files", path=str(path), columns=Columns(**columns))  # pyright: ignore[reportArgumentType]


def read(path, **columns: str) -> list[dict]:
    return list(sources.rows(source(path, **columns), 0))


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "p.jsonl", ROW)


def test_a_template_joins_columns_and_strips_the_ends(file):
    (row,) = read(file, template=f"\n{TEMPLATE} ", answer="number")
    assert row["problem"] == "3 boxes of 4 pens.\n\nHow many?"
    assert row["answer"] == "12"


def test_an_answer_may_be_a_template_and_braces_are_doubled(file):
    (row,) = read(file, problem="question", answer_template="\\text{{{number} {unit}}}")
    assert row["answer"] == "\\text{12 pens}"


def test_every_format_gives_the_same_rows(tmp_path, file):
    csv = '\ufeffquestion,context,number,unit\n"How many?",3 boxes of 4 pens.,12,pens\n'
    (tmp_path / "p.csv").write_text(csv)
    (tmp_path / "p.tsv").write_text(csv.replace(",", "\t"))
    pq.write_table(pa.Table.from_pylist([ROW]), tmp_path / "p.parquet")
    found = [
        read(tmp_path / f"p.{suffix}", template=TEMPLATE, answer_template="{number} {unit}")
        for suffix in ("jsonl", "csv", "tsv", "parquet")
    ]
    assert [rows[0]["problem"] for rows in found] == ["3 boxes of 4 pens.\n\nHow many?"] * 4
    assert [rows[0]["answer"] for rows in found] == ["12 pens"] * 4


def test_columns_with_dots_spaces_and_chats_are_named_as_they_are(tmp_path):
    row = {
        "Question Text": "1+1?", "extra": {"hint": "Add."}, "answer": "2",
        "chat": [{"role": "user", "content": "Please:"}],
    }  # fmt: skip
    (made,) = read(write(tmp_path / "p.jsonl", row), template="{chat} {Question Text} {extra.hint}")
    assert made["problem"] == "Please: 1+1? Add."


def test_an_empty_cell_is_empty_and_a_row_of_empty_cells_is_bad(tmp_path):
    file = write(
        tmp_path / "p.jsonl", ROW | {"context": None}, ROW | {"question": "", "context": ""}
    )
    given = source(file, template=TEMPLATE, answer="number")
    bad: list[BadRow] = []
    (row,) = sources.rows(given, 0, bad.append)
    assert row["problem"] == "How many?"
    assert [str(one) for one in bad] == [
        "p.jsonl, row 1: columns 'context', 'question' of a template are all empty; fill it in, or "
        "skip such rows by on_bad_rows=skip"
    ]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"template": "{nothing}", "answer": "number"}, "column 'nothing' is missing"),
        ({"template": "{question[0]}", "answer": "number"}, r"column 'question\[0\]' is missing"),
        ({"template": "{} {question}", "answer": "number"}, "column '' is missing"),
        (
            {"template": "{question} {number}", "answer": "number"},
            "template shows the answer's column 'number' to the student",
        ),
        (
            {"template": "{question} {unit}", "answer_template": "{number} {unit}"},
            "template shows the answer's column 'unit' to the student",
        ),
    ],
)
def test_a_template_that_does_not_fit_the_table_is_one_sentence(file, columns, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        read(file, **columns)
    assert str(error.value).startswith("p.jsonl: ")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"template": "{question"}, "expected '}' before end of string; write {{ for a brace"),
        ({"template": "{question:>9}"}, "field question has a format; write {question} alone"),
        ({"template": "{question!r}"}, "field question has a format"),
        ({"template": "no column"}, "template names no column; write one in braces: {problem}"),
        ({"answer_template": ""}, "answer_template names no column"),
        ({"template": "{a}", "problem": "a"}, "problem and template are both set"),
        ({"answer_template": "{a}", "answer": "a"}, "answer and answer_template are both set"),
    ],
)
def test_a_template_that_is_none_is_refused_by_the_config(columns, sentence):
    with pytest.raises(ValidationError) as error:
        Columns(**columns)
    assert sentence in str(error.value)


def test_choices_in_a_list_need_the_column_that_names_one(tmp_path):
    row = {"question": "1+1?", "choices": ["2", "3"], "answer": "A"}
    file = write(tmp_path / "p.jsonl", row)
    with pytest.raises(InputError, match="column 'choices' holds all choices"):
        read(file, answer_template="{answer}.")
    (made,) = read(file, template="Q: {question}")
    assert made["problem"] == "Q: 1+1?\n\n(A) 2\n(B) 3"
    assert made["answer"] == "A"


def test_an_explanation_in_the_template_is_no_solution(tmp_path):
    row = {"question": "1+1?", "explanation": "A sum.", "answer": "2"}
    (made,) = read(write(tmp_path / "p.jsonl", row), template="{explanation} {question}")
    assert (made["problem"], made["solution"]) == ("A sum. 1+1?", None)


def test_an_identity_changes_with_a_template_and_not_without_one(file):
    plain = sources.identity(source(file, problem="question", answer="number"))
    assert plain["columns"] == {
        "problem": "question", "answer": "number", "solution": None, "choices": None,
    }  # fmt: skip
    ids = [
        sources.identity(source(file, template=template, answer="number"))["columns"]
        for template in ("{question}", "{context}")
    ]
    assert [one["template"] for one in ids] == ["{question}", "{context}"]


def hub(folder, table: pa.Table) -> HubSource:
    folder.mkdir()
    pq.write_table(table, folder / "train.parquet")
    return HubSource(kind="hub", dataset=str(folder))


def with_image(image, kind=BYTES) -> pa.Table:
    columns = {"problem": ["1+1?", "See the picture."], "answer": ["2", "3"]}
    return pa.table(columns).append_column("image", pa.array([None, image], kind))


@pytest.mark.parametrize(
    ("image", "kind"),
    [(IMAGE, BYTES), ([IMAGE], pa.list_(BYTES)), ({"bytes": None, "path": "a.png"}, BYTES)],
)
def test_rows_with_an_image_are_refused_and_those_without_are_read(tmp_path, image, kind):
    table = with_image(image, kind)
    content = io.BytesIO()
    pq.write_table(table, content)
    (tmp_path / "p.parquet").write_bytes(content.getvalue())
    for given in (source(tmp_path / "p.parquet"), hub(tmp_path / "set", table)):
        bad: list[BadRow] = []
        (row,) = sources.rows(given, 0, bad.append)
        assert row["problem"] == "1+1?"
        assert "row 1: column 'image' holds an image or another file; " in str(bad[0])
        assert "on_bad_rows=skip" in str(bad[0])
        with pytest.raises(BadRow):
            list(sources.rows(given, 0))


def test_a_dataset_with_the_image_feature_is_refused_without_decoding_it(tmp_path):
    import datasets

    features = datasets.Features(
        problem=datasets.Value("string"), answer=datasets.Value("string"), picture=datasets.Image()
    )
    schema = features.arrow_schema
    rows = {"problem": ["See."], "answer": ["1"], "picture": [{"bytes": b"no image", "path": None}]}
    with pytest.raises(BadRow, match="column 'picture' holds an image"):
        list(sources.rows(hub(tmp_path / "set", pa.table(rows, schema=schema)), 0))


def test_an_image_in_json_is_refused(tmp_path):
    row = {"problem": "See.", "answer": "1", "image": {"bytes": "iVBORw0", "path": "a.png"}}
    with pytest.raises(BadRow, match="row 0: column 'image' holds an image"):
        read(write(tmp_path / "p.jsonl", row))
