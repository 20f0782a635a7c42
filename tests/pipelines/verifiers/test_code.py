"""The reward `code`: what passes, and what hostile programs can do in each sandbox of this machine.

Without namespaces on a machine only the tests of `rlimits` run there.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trace_opd.data import sources
from trace_opd.pipelines.verifiers import sandbox
from trace_opd.pipelines.verifiers.registry import open_verifier
from trace_opd.pipelines.verifiers.rewards.code import last_block
from trace_opd.schemas.configs import FilesSource, VerifyConfig
from trace_opd.schemas.contract import validate
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.tables import PROBLEMS, VERDICTS

from .test_own_reward import rollouts

PROMPT = "import math\n\ndef halve(n: int) -> int:\n    '''Half of n, rounded down.'''\n"
TESTS = """
def check(candidate):
    assert candidate(4) == 2
    assert candidate(5) == 2
    for n in (6, 7):
        assert candidate(n) == 3, n
"""
HUMAN_EVAL = {"prompt": PROMPT, "tests": TESTS, "entry_point": "halve"}
RIGHT = "def halve(n):\n    return math.floor(n / 2)"
ECHO = {"cases": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "5 6\n", "stdout": "11\n"}]}
SUM = "print(sum(map(int, input().split())))"
FREE = {"tests": "assert done", "entry_point": ""}  # the program sets `done`


@pytest.fixture(params=[*(one.name for one in sandbox.isolating()), "rlimits"], name="isolation")
def _isolation(request, monkeypatch):
    """The part runs in this sandbox."""
    found = {one.name: one for one in [*sandbox.isolating(), sandbox.UNISOLATED]}[request.param]
    if found is sandbox.UNISOLATED and os.getuid() == 0 and Path("/usr/bin/python3").exists():
        # Programs run as a user of their own, who may not read root's Python.
        monkeypatch.setattr(sandbox, "_python", lambda: ["/usr/bin/python3", "-I", "-S", "-B"])
    if (fault := sandbox._tried(found)) is not None:
        pytest.skip(f"{found.name} does not work here: {fault}")
    monkeypatch.setattr(
        "trace_opd.pipelines.verifiers.rewards.code.find_sandbox", lambda allowed: found
    )
    return found.name


def ran(programs, tests=HUMAN_EVAL, fence="```python\n{}\n```", timeout_s=5.0, **options):
    problems, made = rollouts([fence.format(program) for program in programs])
    row = problems.to_pylist()[0] | {"metadata": json.dumps({"code": tests})}
    part = {"name": "code", **options}
    config = VerifyConfig.model_validate(
        {"rewards": [part], "timeout_s": timeout_s, "memory_mib": 512}
    )
    verifier = open_verifier(config)
    try:
        found = verifier.verify(PROBLEMS.table([row]), made)
        return validate(found, VERDICTS).to_pylist()
    finally:
        verifier.close()


def test_a_program_is_right_if_its_tests_pass(isolation):
    programs = [
        RIGHT,
        "def halve(n):\n    return n // 2 + (n > 5)",
        "    return n // 2",  # continues the prompt
        "def half(n): return n // 2",
        "def halve(n) return",
        "def halve(n):\n    raise KeyError(n)",
    ]
    rows = ran(programs)
    assert [row["correct"] for row in rows] == [True, False, True, False, False, False]
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[0]["feedback"] is None
    assert "AssertionError: 6" in rows[1]["feedback"]
    assert "SyntaxError" in rows[4]["feedback"]
    assert "KeyError: 4" in rows[5]["feedback"]
    shares = ran(programs[:2], score="share")
    assert [row["reward"] for row in shares] == [1.0, 0.5]


def test_assertions_that_no_run_reaches_count_only_if_the_tests_ended_early(isolation):
    branches = "if done:\n    assert done\nelse:\n    assert not done\n    assert False"
    assert ran(["done = True"], FREE | {"tests": branches})[0]["correct"]
    early = "assert done\n1 / 0\nassert done\nassert done"
    (row,) = ran(["done = True"], FREE | {"tests": early}, score="share")
    assert row["reward"] == pytest.approx(1 / 3)
    assert ran(["done = True"], FREE | {"tests": "x = done"})[0]["correct"]


def test_a_program_is_run_on_each_case(isolation):
    programs = [SUM, "print(3)", "a = input()\nwhile True: pass", "print(3); 1 / 0"]
    rows = ran(programs, ECHO, timeout_s=2.0, score="share")
    assert [row["reward"] for row in rows] == [1.0, 0.5, 0.0, 0.0]
    assert "printed '3', not '11'" in rows[1]["feedback"]
    assert "stopped after 2 s" in rows[2]["feedback"]
    assert [row["correct"] for row in ran(programs[:2], ECHO)] == [True, False]


def test_an_endless_loop_is_wrong_and_costs_its_time_alone(isolation):
    begun = time.monotonic()
    rows = ran(["while True: pass", RIGHT], timeout_s=1.0)
    assert [row["correct"] for row in rows] == [False, True]
    assert "stopped after 1 s" in rows[0]["feedback"]
    assert time.monotonic() - begun < 30


def test_a_fork_bomb_is_bounded_and_leaves_nothing_behind(isolation):
    name = f"bomb{os.urandom(4).hex()}"
    bomb = (
        f"import os\n{_called_as(name)}"
        "while True:\n"
        "    try:\n"
        "        if os.fork() == 0:\n"
        "            os.setsid()\n"
        "    except OSError:\n"
        "        pass\n"
    )
    rows = ran([bomb, RIGHT], timeout_s=1.0)
    assert [row["correct"] for row in rows] == [False, True]
    assert "stopped after 1 s" in rows[0]["feedback"]
    assert len(_called(name)) <= 16
    # Without a pid namespace what leaves its session ends by its limit on CPU time.
    end = time.monotonic() + (180 if isolation == "rlimits" else 10)
    while _called(name):
        assert time.monotonic() < end
        time.sleep(0.2)


def _called_as(name: str) -> str:
    """Code that gives a process, and those that it forks, a name (PR_SET_NAME)."""
    return f"import ctypes\nctypes.CDLL(None).prctl(15, {name.encode()!r})\n"


def _called(name: str) -> list[str]:
    return [one for one in map(_comm, Path("/proc").glob("[0-9]*")) if one == name]


def _comm(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""


def test_limits_hold(isolation):
    programs = {
        "memory": "x = bytearray(1 << 30)\ndone = True",
        "file": "open('big', 'wb').write(bytes(3 << 20))\ndone = True",
        "raise": "import resource as r\nr.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))\ndone = True",
    }
    rows = ran(list(programs.values()), FREE, file_mib=2)
    assert [row["correct"] for row in rows] == [False] * 3
    assert "MemoryError" in rows[0]["feedback"]
    assert "File too large" in rows[1]["feedback"]


def test_a_megabyte_of_output_is_dropped_and_feedback_is_bounded(isolation):
    loud = "import sys\nprint('x' * 2**20)\nsys.stderr.write('y' * 2**20)\n"
    rows = ran([f"{loud}done = True", f"{loud}done = False"], FREE)
    assert [row["correct"] for row in rows] == [True, False]
    assert len(rows[1]["feedback"]) < 2000
    (case,) = ran(["print('x' * 2**20)"], ECHO)
    assert not case["correct"]
    (silent,) = ran([f"{loud}done = False"], FREE, feedback_lines=0)
    assert silent["feedback"] is None


def test_a_program_that_ends_or_claims_success_has_not_passed(isolation):
    writes = (
        "import os\n"
        "for number in range(3, 20):\n"
        "    try:\n"
        "        os.write(number, b'_0 1 0 1')\n"
        "    except OSError:\n"
        "        pass\n"
    )
    programs = ["import os\nos._exit(0)", "raise SystemExit", writes]
    assert [row["correct"] for row in ran(programs, FREE)] == [False] * 3


def test_a_program_reaches_no_file_of_ours_where_isolated(isolation, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    tmp_path.chmod(0o755)
    here = Path(__file__).resolve()
    programs = [
        "open('/etc/passwd').read()\ndone = True",
        f"open({str(secret)!r}).read()\ndone = True",
        f"open({str(here)!r}).read()\ndone = True",
        "import os\nassert not [p for p in os.listdir('/proc') if p.isdigit() and int(p) > 200]\n"
        "done = True",
    ]
    rows = ran(programs, FREE)
    if isolation == "rlimits":
        assert rows[0]["correct"]  # anybody may read it
    else:
        assert [row["correct"] for row in rows] == [False, False, False, True]
        assert "No such file" in rows[0]["feedback"]


def test_a_program_writes_outside_its_folder_only_where_not_isolated(isolation, tmp_path):
    place = tmp_path / "written"
    tmp_path.chmod(0o777)
    programs = [f"open({str(place)!r}, 'w').write('x')\ndone = True"]
    programs += ["open('/usr/x', 'w')\ndone = True", "open('/x', 'w')\ndone = True"]
    rows = ran([*programs, "open('own', 'w').write('x')\ndone = True"], FREE)
    assert rows[3]["correct"]
    if isolation != "rlimits":
        assert [row["correct"] for row in rows[:3]] == [False] * 3
        assert not place.exists()


def test_a_program_reaches_no_network_where_isolated(isolation):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\ndone = True"
        (row,) = ran([program], FREE)
    assert row["correct"] == (isolation == "rlimits")


def test_tests_at_fault_leave_no_reward(isolation):
    (row,) = ran([RIGHT], {"tests": "def check(", "entry_point": "halve"})
    assert (row["status"], row["reward"], row["correct"]) == ("gold_unparsed", None, None)


def test_a_response_without_a_block_is_wrong_and_a_problem_without_tests_is_refused(isolation):
    (row,) = ran(["def halve(n): return n // 2"], fence="{}")
    assert (row["status"], row["reward"]) == ("pred_unparsed", 0.0)
    verifier = open_verifier(VerifyConfig.model_validate({"rewards": [{"name": "code"}]}))
    with pytest.raises(InputError, match=r"source\.columns\.tests"):
        verifier.verify(*rollouts(["x"]))
    verifier.close()


def test_code_is_refused_where_nothing_isolates(monkeypatch):
    monkeypatch.setattr(sandbox, "isolating", list)
    sandbox.find_sandbox.cache_clear()
    try:
        with pytest.raises(InputError, match=r"nothing isolates .*allow_unisolated"):
            open_verifier(VerifyConfig.model_validate({"rewards": [{"name": "code"}]}))
    finally:
        sandbox.find_sandbox.cache_clear()


def test_a_program_ends_soon_after_a_verifier_that_was_killed(isolation, tmp_path):
    if isolation != (found := sandbox.find_sandbox(True).name):
        pytest.skip(f"the killed process takes {found}")
    name = f"loop{os.urandom(4).hex()}"
    program = f"{_called_as(name)}while True: pass"
    job = {"program": program, "tests": "", "entry_point": "", "cases": [], "stop": True}
    job |= {"timeout_s": 4.0, "memory_mib": 512, "processes": 16, "file_mib": 1}
    code = (
        "from trace_opd.pipelines.verifiers.sandbox import find_sandbox\n"
        f"find_sandbox(True).run({job!r})\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", code], cwd=tmp_path) as verifier:
        _wait_until(lambda: bool(_called(name)), 60)
        verifier.kill()
    _wait_until(lambda: not _called(name), 30)


def _wait_until(holds, seconds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\na\n```\n```\nb\n```", "b"),
        ("```python\na\n```\n```bash\nb\n```", "a"),
        ("```bash\nb\n```", "b"),
        ("a ```python\nb", None),
        ("```python\na\n```\n```python\nb", "a"),
        ("  ```py\n  a\n  ```", "  a"),
        ("```" * 50_000, None),
        ("none", None),
    ],
)
def test_the_last_closed_block_of_python_counts(text, block):
    assert last_block(text) == block


# --- sources ---


def problem_rows(tmp_path, rows, **columns):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FilesSource.model_validate({"kind": "files", "path": str(path), "columns": columns})
    return list(sources.rows(source, 0)), sources.identity(source)["columns"]


ROW = {
    "task_id": "H/0", "prompt": PROMPT, "entry_point": "halve", "test": TESTS,
    "canonical_solution": "    return n // 2\n",
}  # fmt: skip


def test_a_file_like_human_eval_is_recognised_and_its_solutions_pass(tmp_path, isolation):
    (row,), columns = problem_rows(tmp_path, [ROW])
    assert columns["tests"] == "test"
    assert row["answer_kind"] == "text"
    assert row["source_id"] == "H/0"
    assert row["problem"] == PROMPT.strip()
    code = json.loads(row["metadata"])["code"]
    assert code == HUMAN_EVAL
    assert ran([row["solution"]], code)[0]["correct"]


def test_columns_of_other_names_and_cases(tmp_path):
    mbpp = {"text": "Half of n.", "test_list": ["assert f(2) == 1", "assert f(4) == 2"]}
    (row,), _ = problem_rows(tmp_path, [mbpp], problem="text", tests="test_list")
    tests = {"prompt": "Half of n.", "tests": "\n".join(mbpp["test_list"]), "entry_point": ""}
    assert json.loads(row["metadata"])["code"] == tests
    pairs = {"inputs": ["1 2\n", "5 6\n"], "outputs": ["3", "11\n"]}
    for cases in (pairs, json.dumps(pairs), ECHO["cases"]):
        (row,), _ = problem_rows(tmp_path, [{"question": "Add.", "io": cases}], cases="io")
        assert json.loads(row["metadata"])["code"] == ECHO


def test_metadata_of_ones_own_is_kept(tmp_path):
    rows = [{"question": "1+1", "answer": "2", "about": {"limit": 3}}]
    (row,), _ = problem_rows(tmp_path, rows, metadata="about")
    assert json.loads(row["metadata"]) == {"limit": 3}


@pytest.mark.parametrize(
    ("change", "columns", "sentence"),
    [
        ({"test": ""}, {}, "'test' holds no tests"),
        ({"entry_point": ""}, {}, "'entry_point' holds no name"),
        ({"io": [{"stdin": 1, "stdout": "x"}]}, {"cases": "io"}, "a case without texts"),
        ({"io": "x"}, {"cases": "io"}, "holds no cases"),
        ({"io": "x"}, {"metadata": "io"}, "holds no mapping"),
        ({}, {"tests": "unit"}, "column 'unit' is missing"),
    ],
)
def test_a_row_without_tests_is_a_sentence(tmp_path, change, columns, sentence):
    with pytest.raises(InputError, match=sentence):
        problem_rows(tmp_path, [ROW | change], **columns)


def test_metadata_that_is_no_object_is_refused():
    problems, _ = rollouts(["x"])
    table = PROBLEMS.table([problems.to_pylist()[0] | {"metadata": "[1]"}])
    with pytest.raises(InputError, match="row 0: metadata is no JSON object"):
        validate(table, PROBLEMS)
