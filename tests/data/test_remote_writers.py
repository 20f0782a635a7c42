"""Two processes write to one store on S3 (moto's server on loopback)."""

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator

import fsspec
import pytest
from werkzeug import Request, Response

from trace_opd.data.remote import put_new, update
from trace_opd.data.store import Draft, Store
from trace_opd.pipelines.cli.check_store import check_store
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import PROBLEMS

# A process that runs the code it reads, a line of JSON each, and says when it is done.
WRITER = """
import json
import sys
from trace_opd.data.store import Store
from trace_opd.schemas.tables import PROBLEMS
for line in sys.stdin:
    exec(json.loads(line))
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def writers(s3_server) -> Iterator[list[subprocess.Popen[str]]]:
    command = [sys.executable, "-P", "-c", WRITER]
    both = [
        subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    yield both
    for process in both:
        process.kill()
        process.communicate()


def each(writers: list[subprocess.Popen[str]], *codes: str) -> None:
    """Each process runs its code, at the same time."""
    for process, code in zip(writers, codes, strict=True):
        assert process.stdin is not None
        process.stdin.write(json.dumps(code) + "\n")
        process.stdin.flush()
    for process in writers:
        assert process.stdout is not None
        assert process.stdout.readline() == "done\n"


@pytest.fixture
def root(s3_server) -> str:
    return f"s3://bucket/{uuid.uuid4().hex}"


def problem(writer: str, part: int) -> dict[str, object]:
    return {
        "problem_id": f"{part}", "problem": "1 + 1?", "answer": "2", "answer_kind": "math",
        "solution": writer, "steps": None, "source": "test", "split": "train",
    }  # fmt: skip


def begun(store: Store) -> Draft:
    draft = store.begin("problems", {"a": 1}, {}, PROBLEMS)
    assert isinstance(draft, Draft)
    return draft


def test_of_aliases_that_two_processes_give_at_once_none_is_lost(writers, root):
    made = begun(Store(root)).finish(0)
    ready = f"store = Store({root!r}); dataset = store.get({made.ref!r})"
    each(writers, ready, ready)
    give = "for count in range(12): store.set_alias(f'{}-{{count}}', dataset)"
    each(writers, give.format("one"), give.format("two"))
    expected = {f"{name}-{count}" for name in ("one", "two") for count in range(12)}
    assert Store(root).aliases().keys() == expected


def test_two_that_finish_a_dataset_have_one_manifest_of_parts_that_are_there(writers, root):
    """Both make all parts, each with rows of its own, as answers of a model would be."""

    def ready(name: str) -> str:
        rows = [problem(name, part) for part in range(8)]
        return (
            f"draft = Store({root!r}).begin('problems', {{'a': 1}}, {{}}, PROBLEMS)\n"
            f"tables = [PROBLEMS.table([row]) for row in {rows}]"
        )

    each(writers, ready("one"), ready("two"))
    make = "for part in {}: draft.write_part(part, tables[part])"
    each(writers, make.format("range(8)"), make.format("reversed(range(8))"))
    finish = "made = draft.finish(8, dict(by='{}'))"
    each(writers, finish.format("one"), finish.format("two"))
    (made,) = Store(root).datasets()
    same = f"assert made.manifest == {made.manifest!r}"
    each(writers, same, same)
    assert made.summary["by"] in ("one", "two")
    assert set(made.read()["solution"].to_pylist()) == {"one", "two"}
    assert check_store(Store(root)).intact


def test_a_writer_that_comes_late_changes_nothing_of_a_finished_dataset(root):
    early, late = begun(Store(root)), begun(Store(root))
    early.write_part(0, PROBLEMS.table([problem("early", 0)]))
    made = early.finish(1)
    late.write_part(0, PROBLEMS.table([problem("late", 0)]))
    assert late.finish(1).manifest == made.manifest
    assert Store(root).get(made.ref).read()["solution"].to_pylist() == ["early"]
    assert check_store(Store(root)).intact


def test_an_alias_file_that_goes_or_comes_while_it_is_changed_is_read_again(root):
    store = Store(root)
    path = store.files.safe_path("aliases.json")
    seen: list[bytes | None] = []

    def change(content: bytes | None) -> bytes:
        seen.append(content)
        if len(seen) == 1:
            store.files.write("aliases.json", b'{"first": "a/1"}')
        elif len(seen) == 2:
            store.files.fs.rm_file(path)
        elif len(seen) == 3:
            store.files.write("aliases.json", b'{"second": "a/2"}')
        return json.dumps(json.loads(content or b"{}") | {"mine": "a/3"}).encode()

    update(store.files.fs, path, change)
    assert seen == [None, b'{"first": "a/1"}', None, b'{"second": "a/2"}']
    assert store.aliases() == {"second": "a/2", "mine": "a/3"}


def test_a_dataset_with_a_journal_has_one_owner(root, tmp_path, monkeypatch):
    def journal(folder: str) -> None:
        monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path / folder))
        begun(Store(root)).local_path("journal")

    journal("one")
    with pytest.raises(InputError, match=r"claim\.json: another local folder has the journal"):
        journal("two")
    journal("one")
    (tmp_path / "one").rename(tmp_path / "moved")
    journal("moved")
    Store(root).files.fs.rm_file(f"{Store(root).files.base}/{begun(Store(root)).ref}/claim.json")
    journal("two")


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"{}", b'{"owner": 1, "host": []}'])
def test_a_damaged_claim_is_one_sentence(root, tmp_path, monkeypatch, content):
    monkeypatch.setenv("TRACE_OPD_LOCAL", str(tmp_path))
    draft = begun(Store(root))
    Store(root).files.write(f"{draft.ref}/claim.json", content)
    with pytest.raises(InputError, match=r"remove this object if the folder is gone"):
        draft.local_path("journal")


@pytest.fixture
def plain_server(s3_server, serve_wsgi, s3_application) -> Iterator[str]:
    """An S3 server that answers conditional writes with 501, as some do: its URL."""
    error = "<Error><Code>NotImplemented</Code><Message>no conditions</Message></Error>"

    def application(variables, start):
        request = Request(variables)
        if request.method == "PUT" and (request.if_match or request.if_none_match):
            return Response(error, 501, mimetype="application/xml")(variables, start)
        return s3_application(variables, start)

    with serve_wsgi(application) as url:
        yield url


def test_a_server_without_conditional_writes_is_written_to_with_a_warning(plain_server, caplog):
    fs = fsspec.filesystem("s3", endpoint_url=plain_server, use_listings_cache=False)
    path = f"bucket/{uuid.uuid4().hex}"
    assert put_new(fs, path, b"1")
    update(fs, path, lambda content: (content or b"") + b"2")
    assert fs.cat_file(path) == b"12"
    assert caplog.text.count("this server has no conditional writes") == 2
