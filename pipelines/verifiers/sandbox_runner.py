"""Runs a program's tests; the only file of ours inside the sandbox. sandbox.py starts it.

Alone with the standard library: `python -I -S -B sandbox_runner.py`. Standard input is a job as
JSON, standard output its result: {"passed": n, "tests": n, "stderr": text}, with "late" if the time
was up, or {"fault": text}, the tests being at fault. The program runs in a child process, under
limits that it can't raise.
"""
# ruff: noqa: S102, PTH123 - code is what it runs, and pathlib is slow to import

import ast
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback

_MOST_STDERR = 4096  # bytes read from its end
_STDERR = "stderr.txt"


def limit(job):
    """Limits of this process and its children; in a sandbox of root's a user of its own first."""
    if job["uid"]:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    mib = 2**20
    for what, most in (
        (resource.RLIMIT_AS, job["memory_mib"] * mib),
        (resource.RLIMIT_CPU, int(job["timeout_s"]) + 1),
        (resource.RLIMIT_FSIZE, job["file_mib"] * mib),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


class Counted(ast.NodeTransformer):
    """Makes each assertion count itself, so that one that fails does not end the rest."""

    def __init__(self, name):
        self.name = name
        self.found = 0

    def visit_Assert(self, node):
        self.found += 1
        again = ast.Try(
            body=[node],
            handlers=[
                ast.ExceptHandler(
                    type=ast.Name("Exception", ast.Load()),
                    name=self.name,
                    body=[self._call(ast.Name(self.name, ast.Load()))],
                )
            ],
            orelse=[self._call(ast.Constant(None))],
            finalbody=[],
        )
        return ast.fix_missing_locations(ast.copy_location(again, node))

    def _call(self, argument):
        count = ast.Name(f"{self.name}count", ast.Load())
        return ast.Expr(ast.Call(count, [argument], []))


def check_program(job):
    """The program in a forked child, then its tests, which count themselves."""
    secret = f"_{os.urandom(8).hex()}"
    try:
        tests = ast.parse(job["tests"])
        counted = Counted(secret)
        compiled = compile(ast.fix_missing_locations(counted.visit(tests)), "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"fault": f"tests: {type(error).__name__}: {error}"[:300]}
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        try:
            redirect(os.devnull, os.devnull)
            run_tests(job, compiled, secret, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    os.close(writing)
    # Read once, not to the end: a process that the program left behind may hold the pipe open.
    answered, _, _ = select.select([reading], [], [], job["timeout_s"])
    written = os.read(reading, 1000) if answered else b""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not answered:
        return {"passed": 0, "tests": max(counted.found, 1), "late": True}
    try:
        answer, *numbers = written.decode().split()
        passed, failed, ended = map(int, numbers)
    except ValueError:
        answer, passed, failed, ended = "", 0, 0, 0
    if answer != secret:
        passed = failed = ended = 0
    # Tests that ended early have assertions that were not reached.
    tests = passed + failed if ended else max(counted.found, passed + failed)
    return {"passed": passed, "tests": max(tests, 1)}


def run_tests(job, tests, secret, pipe):
    counts, ended = [0, 0], 0  # passed, failed

    def count(error):
        counts[error is not None] += 1
        if error is not None and counts[1] <= 3:
            print(f"{type(error).__name__}: {str(error)[:200]}", file=sys.stderr)

    space: dict = {"__name__": "program"}
    report = os.write
    try:
        exec(compile(job["program"], "program", "exec"), space)
        entry = job["entry_point"]
        if entry and entry not in space:
            raise NameError(f"the program defines no {entry}")
        space |= {"__name__": "tests", f"{secret}count": count}
        exec(tests, space)
        if entry and callable(space.get("check")):
            space["check"](space[entry])
        if counts == [0, 0]:  # without assertions the tests are one
            counts[0] = 1
        ended = 1
    except Exception as error:
        count(error)
        last = traceback.extract_tb(error.__traceback__)[-1]
        print(f"in {last.filename}, line {last.lineno}", file=sys.stderr)
    report(pipe, f"{secret} {counts[0]} {counts[1]} {ended}".encode())
    sys.stderr.flush()
    os._exit(0)


def redirect(source, target):
    """Standard input and output of this process; standard error goes to a file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for path, how, number in ((source, os.O_RDONLY, 0), (target, os.O_WRONLY, 1)):
        os.dup2(os.open(path, how), number)
    os.dup2(os.open(_STDERR, flags, 0o600), 2)


def check_cases(job):
    """The program once per case: what it prints, compared without white space at line ends."""
    with open("program.py", "w") as file:
        file.write(job["program"])
    passed, end = 0, time.monotonic() + job["timeout_s"]
    for case in job["cases"]:
        with open("stdin.txt", "w") as file:
            file.write(case["stdin"])
        command = [sys.executable, "-I", "-S", "-B", "program.py"]
        with (
            open("stdin.txt") as stdin,
            open("stdout.txt", "wb") as stdout,
            open(_STDERR, "wb") as stderr,
        ):
            process = subprocess.Popen(
                command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True
            )
            try:
                code = process.wait(max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return {"passed": passed, "tests": len(job["cases"]), "late": True}
        with open("stdout.txt", errors="replace") as file:
            printed = file.read(len(case["stdout"]) * 2 + 1000)
        right = code == 0 and lines(printed) == lines(case["stdout"])
        passed += right
        if code == 0 and not right:
            with open(_STDERR, "w") as file:
                file.write(
                    f"printed {printed.strip()[:200]!r}, not {case['stdout'].strip()[:200]!r}"
                )
        if not right and job["stop"]:
            break
    return {"passed": passed, "tests": len(job["cases"])}


def lines(text):
    return [line.rstrip() for line in text.rstrip().splitlines()]


def last_stderr():
    try:
        with open(_STDERR, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - _MOST_STDERR, 0))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def main():
    job = json.load(sys.stdin)
    limit(job)
    result = check_cases(job) if job["cases"] else check_program(job)
    print(json.dumps(result | {"stderr": last_stderr()}))


if __name__ == "__main__":
    main()
