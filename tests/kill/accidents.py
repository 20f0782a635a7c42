"""Accidents of every stage: a full disk, a read-only store, two runs at once, a clock that jumps,
and files that rot afterwards.

    make test-kill
"""

import os
import queue
import random
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from trace_opd.data.store import Store
from trace_opd.tests.kill.conftest import PAID, PREPARED, STAGES
from trace_opd.tests.kill.disk import disk
from trace_opd.tests.kill.ends import assert_no_leftovers, assert_same_datasets
from trace_opd.tests.kill.harness import Launcher, assert_refused, launcher, together

TABLES = [name for name in STAGES if name not in (*PAID, "report")]

JUMPY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
/* The wall clock of this process jumps by up to a year, back or forth, each time it is read. */
static time_t jump(void) { return (rand() % 2 ? 1 : -1) * (time_t)(rand() % 31536000); }
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, t);
  if (id == CLOCK_REALTIME) t->tv_sec += jump();
    return status;
}
time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  t->tv_sec = now.tv_sec;
  t->tv_usec = now.tv_nsec / 1000;
  return 0;
}
"""


def size(root: Path) -> int:
    """Bytes on a file system with pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("name", [name for name in STAGES if name not in PAID])
def test_a_full_disk_ends_in_a_sentence_and_goes_on_when_there_is_room(
    name: str, share: float, runs: Launcher, undisturbed, tmp_path
):
    stage = undisturbed[name]
    with disk(tmp_path / "disk") as full:
        shutil.copytree(stage.before, full.root)
        full.leave(int(share * (size(stage.after) - size(stage.before))))
        run = runs.start(*stage.args, store=full.root)
        assert_refused(run, "could not be written", "make room", str(full.root))
        full.make_room()
        runs.done(*stage.args, store=full.root)
        runs.assert_nobody_is_left()
        if name != "report":
            assert_no_leftovers(full.root)
            assert_same_datasets(full.root, stage.after)


@pytest.mark.parametrize("name", [name for name in STAGES if name not in PAID])
def test_a_store_that_cannot_be_written_serves_what_is_finished(
    name: str, runs: Launcher, undisturbed, tmp_path
):
    stage = undisturbed[name]
    with disk(tmp_path / "disk") as frozen:
        shutil.copytree(stage.before, frozen.root)
        frozen.writable(False)
        assert_refused(runs.start(*stage.args, store=frozen.root), str(frozen.root))
        frozen.writable(True)
        shutil.copytree(stage.after, frozen.root, dirs_exist_ok=True)
        frozen.writable(False)
        if name == "report":
            runs.done(*stage.args, "--output", tmp_path / "page.html", store=frozen.root)
            return
        runs.done(*stage.args, store=frozen.root)
        newest = max(Store(stage.after).datasets(), key=lambda d: d.manifest["finished_at"])
        for command in (["ls"], ["show", newest.ref], ["lineage", newest.ref], ["verify-store"]):
            runs.done(*command, store=frozen.root)


@pytest.mark.parametrize("name", TABLES)
def test_of_two_runs_at_once_one_works_and_the_other_finds_it_done(
    name: str, runs: Launcher, undisturbed, tmp_path
):
    stage = undisturbed[name]
    root = Path(shutil.copytree(stage.before, tmp_path / "store"))
    first, second = together(runs, stage.args, root)
    assert (first.wait(), second.wait()) == (0, 0)
    assert_no_leftovers(root)
    assert_same_datasets(root, stage.after)


@pytest.mark.parametrize("name", TABLES)
def test_of_two_runs_at_once_the_other_goes_on_where_one_is_killed(
    name: str, runs: Launcher, undisturbed, tmp_path
):
    stage = undisturbed[name]
    root = Path(shutil.copytree(stage.before, tmp_path / "store"))
    first, second = together(runs, stage.args, root)
    try:
        assert first.wait(0.3 * stage.seconds) == 0
    except queue.Empty:  # still at work
        os.killpg(first.pid, signal.SIGKILL)
    assert second.wait() == 0, second.err
    runs.assert_nobody_is_left()
    assert_no_leftovers(root)
    assert_same_datasets(root, stage.after)


def test_a_clock_that_jumps_changes_nothing(undisturbed, tmp_path):
    source, library = tmp_path / "jumpy.c", tmp_path / "jumpy.so"
    source.write_text(JUMPY)
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler to build the jumping clock with")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    root = tmp_path / "store"
    with launcher(tmp_path / "output", LD_PRELOAD=str(library)) as runs:
        for name in TABLES:
            for args in [*PREPARED.get(name, ()), STAGES[name]]:
                runs.done(*args, store=root)
    assert_no_leftovers(root)
    assert_same_datasets(root, undisturbed["evaluate"].after)
    times = [dataset.manifest for dataset in Store(root).datasets()]
    assert any(t["started_at"] > t["finished_at"] for t in times)  # the clock did jump
    assert all(0 <= t["seconds"] < 600 for t in times)


def test_rotten_files_are_found_and_made_again(runs: Launcher, undisturbed, tmp_path):
    after = undisturbed["evaluate"].after
    root = Path(shutil.copytree(after, tmp_path / "store"))
    chance = random.Random(0)
    for dataset in Store(root).datasets():
        path = Path(dataset.path(chance.choice(dataset.listed)["name"]))
        content = bytearray(path.read_bytes())
        if chance.random() < 0.5:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content)) :]
        path.write_bytes(content)
    checked = runs.start("verify-store", store=root)
    assert checked.wait() == 1
    output = Path(checked.output[0]).read_text()
    assert all(dataset.ref in output for dataset in Store(root).datasets())
    commands = [line for line in output.splitlines() if " && " in line]
    for command in commands:
        removal, again = command.split(" && ")
        subprocess.run(shlex.split(removal), check=True)
        program, *args = shlex.split(again)
        assert program == "trace-opd"
        run = runs.start(*args)
        assert run.wait() == 0, run.err
    assert "intact" in Path(runs.done("verify-store", store=root).output[0]).read_text()
    shutil.copy(after / "aliases.json", root)
    assert_same_datasets(root, after)
