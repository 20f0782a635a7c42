"""The journal of paid answers: durable, shared by processes, tolerant of damage."""

import asyncio
import multiprocessing
import os
import resource
import shutil
import threading
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from trace_opd.pipelines.paid.journal import GroupCommit, Journal, request_key
from trace_opd.pipelines.paid.journal_lines import Answered, Reserved, Settled, read_lines
from trace_opd.schemas.errors import InputError
from trace_opd.tests.soak.file_faults import damage
from trace_opd.tests.soak.schedule import DAMAGES


def test_a_torn_line_costs_no_other_line(tmp_path: Path):
    first = Journal(tmp_path)
    first.append([Answered("a", {"n": 1})])
    first.append([Answered("b", {"n": 2})])
    first.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    second = Journal(tmp_path)
    assert (second.get("a"), second.get("b")) == ({"n": 1}, None)
    second.append([Answered("b", {"n": 3})])
    second.close()
    assert Journal(tmp_path).get("b") == {"n": 3}


@pytest.mark.parametrize(
    "damage",
    [
        b"\0\0\0\n",
        b'{"key": "a", "record": {"n": "\xff"}}\n',
        b'{"key": "\xff", "record": {}}\n',
        b"[]\n",
        b"{}\n",
        b'{"key": 1, "record": {}}\n',
        b'{"key": "a", "record": [1]}\n',
        b'{"key": "a", "record": {"n": 1}\n',
        b"\n",
        b"[" * 100_000 + b"\n",
        b'{"key": "a", "record": {"n": ' + b"9" * 5000 + b"}}\n",
    ],
    ids=lambda damage: repr(damage[:30]),
)
def test_damaged_lines_are_skipped_and_counted(tmp_path: Path, damage: bytes, caplog):
    lines = [b'{"key": "b", "record": {"n": 1}}\n', b'{"key": "c", "record": {"n": 2}}\n']
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(lines[0] + damage + lines[1] + damage)
    kept = Journal(tmp_path)
    assert [kept.get(key) for key in "abc"] == [None, {"n": 1}, {"n": 2}]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: skipped 2 damaged lines"
    ]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_costs_only_the_lines_that_it_touches(tmp_path: Path, how: str):
    keys = [sha256(bytes([n])).hexdigest() for n in range(60)]
    first = Journal(tmp_path / "first")
    first.append([Answered(key, {"n": n}) for n, key in enumerate(keys)])
    first.close()
    (undamaged,) = (tmp_path / "first").iterdir()
    spans = [(start, end) for start, end, _ in read_lines(undamaged)]
    size = spans[-1][1]
    for trial in range(40):
        path = Path(shutil.copytree(tmp_path / "first", tmp_path / f"{trial}")) / undamaged.name
        damage(path, how, trial / 40)
        begin = int(trial / 40 * size)
        end = {"flip": begin + 1, "zeros": begin + 512, "cut": size}[how]
        kept = Journal(path.parent)
        for n, (line_begin, line_end) in enumerate(spans):
            if line_end <= begin or line_begin > end:  # the line end before a line belongs to it
                assert kept.get(keys[n]) == {"n": n}


def test_an_unreadable_record_hides_no_readable_one(tmp_path: Path):
    (tmp_path / "1.jsonl").write_text('{"key": "a", "record": {"n": 1}}\n')
    (tmp_path / "2.jsonl").write_text('{"key": "a", "record": {}}\n')
    (tmp_path / "0.jsonl").write_text('{"key": "a", "record": {}}\n')
    assert Journal(tmp_path, readable=lambda record: "n" in record).get("a") == {"n": 1}


def test_a_folder_or_a_pipe_named_like_a_journal_is_ignored(tmp_path: Path):
    (tmp_path / "1.jsonl").mkdir()
    os.mkfifo(tmp_path / "2.jsonl")
    assert Journal(tmp_path).get("a") is None


def test_an_answer_of_a_removed_journal_is_not_found(tmp_path: Path):
    theirs = Journal(tmp_path / "theirs")
    theirs.append([Answered("a", {"n": 1})])
    ours = Journal(tmp_path / "ours", lambda: [tmp_path / "theirs"])
    shutil.rmtree(tmp_path / "theirs")
    assert ours.get("a") is None


def test_records_are_read_as_they_were_written(tmp_path: Path):
    record = {
        "body": {"text": 'é\n"quoted" {"key":"b","record":1} \U0001f600', "n": 0.1, "null": None}
    }
    journal = Journal(tmp_path)
    journal.append([Answered("a", record)])
    assert journal.get("a") == Journal(tmp_path).get("a") == record
    assert Journal(tmp_path).get("b") is None


SHARED: dict[str, Any] = {
    "base_url": "http://one/v1",
    "model": "m",
    "messages": [{"role": "user", "content": "?"}],
    "schema": {"type": "object"},
    "sampling": {"temperature": 0.0, "max_new_tokens": 64},
    "prompt_version": "v1",
}


def test_a_key_stays_the_same_over_versions():
    """A changed key would pay for every journalled answer again."""
    key = "7b8e60ac6fc8799555a1928addef44664ce581c4be28ed39c98473f23e0bf0ca"
    assert request_key(**SHARED) == key


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "http://two/v1"},
        {"model": "other"},
        {"messages": [{"role": "user", "content": "!"}]},
        {"messages": [{"role": "system", "content": "?"}]},
        {"schema": {"type": "array"}},
        {"schema": None},
        {"sampling": {"temperature": 0.5, "max_new_tokens": 64}},
        {"sampling": {"temperature": 0.0, "max_new_tokens": 65}},
        {"prompt_version": "v2"},
        {"sample_index": 1},
    ],
)
def test_everything_that_decides_an_answer_is_in_its_key(change: dict[str, Any]):
    assert request_key(**SHARED) == request_key(**{k: SHARED[k] for k in reversed(SHARED)})
    assert request_key(**SHARED) != request_key(**(SHARED | change))


def test_get_finds_what_another_journal_has_written_meanwhile(tmp_path: Path):
    one, other = Journal(tmp_path), Journal(tmp_path)
    assert other.get("a") is None
    one.append([Answered("a", {"n": 1})])
    assert other.get("a") == {"n": 1}
    one.append([Answered("b", {"n": 2})])
    other.append([Answered("c", {"n": 3})])
    assert (other.get("b"), one.get("c")) == ({"n": 2}, {"n": 3})


def test_other_journals_are_read_and_never_written(tmp_path: Path):
    theirs = Journal(tmp_path / "theirs")
    theirs.append([Answered("a", {"n": 1})])
    theirs.close()
    before = {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    ours = Journal(tmp_path / "ours", lambda: [tmp_path / "theirs"])
    ours.append([Answered("b", {"n": 2})])
    assert (ours.get("a"), ours.get("b")) == ({"n": 1}, {"n": 2})
    assert {path: path.read_bytes() for path in (tmp_path / "theirs").iterdir()} == before


def write_and_read(folder: Path, name: str, count: int) -> None:
    journal = Journal(folder)
    for n in range(count):
        journal.append([Answered(f"{name}-{n}", {"n": n, "text": name * 500})])
        journal.get(f"{name}-{n + 1}")  # missing: indexes the records of the others


def test_threads_and_processes_share_a_folder(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    workers: list[Any] = [
        fork.Process(target=write_and_read, args=(tmp_path, f"process{n}", 40)) for n in range(3)
    ]
    workers += [
        threading.Thread(target=write_and_read, args=(tmp_path, f"thread{n}", 40)) for n in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    journal = Journal(tmp_path)
    assert len(journal) == 6 * 40
    for kind in ("process", "thread"):
        for number in range(3):
            for n in range(40):
                name = f"{kind}{number}"
                assert journal.get(f"{name}-{n}") == {"n": n, "text": name * 500}


def test_threads_share_a_journal(tmp_path: Path):
    journal = Journal(tmp_path)

    def work(name: str) -> None:
        for n in range(20):
            journal.append([Answered(f"{name}-{n}", {"n": n})])
            assert journal.get(f"{name}-{n}") == {"n": n}

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Journal(tmp_path)) == 80


class _Counted(Journal):
    writes = 0

    def append(self, lines) -> None:
        self.writes += 1
        super().append(lines)


def test_waiting_records_share_a_write(tmp_path: Path):
    journal = _Counted(tmp_path)

    async def answer(commit: GroupCommit, n: int) -> None:
        await commit.append(str(n), {"n": n})
        # It counts from here on, so every reader must find it.
        assert Journal(tmp_path).get(str(n)) == {"n": n}

    async def all_answers() -> None:
        commit = GroupCommit(journal)
        await asyncio.gather(*(answer(commit, n) for n in range(50)))
        await asyncio.gather(*(answer(commit, n) for n in range(50, 100)))

    asyncio.run(all_answers())
    assert len(Journal(tmp_path)) == 100
    assert journal.writes < 20


def test_a_reservation_is_durable_before_it_returns_and_lasts_until_it_is_settled(
    tmp_path: Path,
):
    journal = _Counted(tmp_path)

    def standing() -> set[str]:
        lines = [
            line
            for path in tmp_path.iterdir()
            for _, _, line in read_lines(path)
            if line is not None
        ]
        settled = {line.name for line in lines if isinstance(line, Settled)}
        return {line.name for line in lines if isinstance(line, Reserved)} - settled

    async def ask(commit: GroupCommit, n: int) -> None:
        name = await commit.reserve(0.5)
        assert name in standing()
        match n % 3:
            case 0:
                await commit.append(str(n), {"n": n}, name)
                assert name not in standing()
            case 1:
                commit.settle(name)  # refused
            case 2:
                pass  # lost in flight

    async def all_requests() -> None:
        commit = GroupCommit(journal)
        await asyncio.gather(*(ask(commit, n) for n in range(30)))
        commit.close()

    asyncio.run(all_requests())
    assert len(standing()) == 10
    assert len(Journal(tmp_path)) == 10
    assert journal.writes < 10


def test_a_full_disk_fails_every_waiting_append_and_harms_no_written_line(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.append([Answered("a", {"n": 1})])

    async def two() -> list[BaseException | None]:
        commit = GroupCommit(journal)
        waiting = [commit.append(key, {"text": 5000 * "x"}) for key in "bc"]
        return await asyncio.gather(*waiting, commit.append("d", {}), return_exceptions=True)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        outcomes = asyncio.run(two())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [type(outcome) for outcome in outcomes] == [InputError] * 3
    assert "make room and run again" in str(outcomes[0])
    journal.append([Answered("e", {"n": 5})])
    kept = Journal(tmp_path)
    assert [kept.get(key) for key in "abcde"] == [{"n": 1}, None, None, None, {"n": 5}]
