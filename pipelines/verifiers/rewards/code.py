"""Part `code`: the problem's tests against the response's last code block, in a sandbox.

sandbox.py isolates and limits the program, sandbox_runner.py runs the tests. A program that fails,
loops or exceeds a limit is wrong: value 0. Only a sandbox or a test that fails leaves no value.
"""

import ast
import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from ....schemas.configs import CodePart, VerifyConfig
from ....schemas.errors import InputError
from ....schemas.labels import VerdictStatus
from ...terminal import visible as shown
from ..reading import visible
from ..sandbox import find_sandbox
from .part import Batch, Values

logger = logging.getLogger(__name__)

_LINE_CHARS = 300  # of feedback
_PYTHON = ("", "python", "python3", "py")


def identity(part: CodePart) -> str:
    return f"code 1, Python {sys.version_info.major}.{sys.version_info.minor}"


class Code:
    def __init__(self, part: CodePart, config: VerifyConfig) -> None:
        self._part, self._config = part, config
        self._sandbox = find_sandbox(part.allow_unisolated)
        if self._sandbox.name == "rlimits":
            logger.warning("code: nothing isolates here: programs run with your rights")
        else:
            logger.info("code: isolated by %s", self._sandbox.name)
        self._threads = ThreadPoolExecutor(config.workers, "code")

    def judge(self, batch: Batch) -> Values:
        tests = [_tests(problem) for problem in batch.problems]
        if not any(tests):
            raise InputError(
                "rewards: code: no problem has tests; name their column with source.columns.tests "
                "or source.columns.cases"
            )
        blocks = [last_block(visible(response)) for response in batch.responses]
        pairs = [
            None if not tests[index] or block is None else (index, block)
            for index, block in zip(batch.of, blocks, strict=True)
        ]
        distinct = list(dict.fromkeys(pair for pair in pairs if pair is not None))
        ran = self._threads.map(lambda pair: self._run(tests[pair[0]] or {}, pair[1]), distinct)
        results = dict(zip(distinct, ran, strict=True))
        rows = [
            (results[pair] if pair is not None else _unread(bool(tests[index])))
            for pair, index in zip(pairs, batch.of, strict=True)
        ]
        values, status, seconds, feedback = (list(column) for column in zip(*rows, strict=True))
        return Values(values, status, seconds, blocks, feedback=feedback)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _run(
        self, tests: dict[str, Any], block: str
    ) -> tuple[float | None, VerdictStatus, float, str | None]:
        part, config = self._part, self._config
        job = {
            "program": _program(tests, block),
            "tests": tests.get("tests", ""),
            "entry_point": tests.get("entry_point", ""),
            "cases": tests.get("cases", []),
            "stop": part.score == "all",
            "timeout_s": config.timeout_s,
            "memory_mib": config.memory_mib,
            "processes": part.processes,
            "file_mib": part.file_mib,
        }
        begun = time.monotonic()
        result = self._sandbox.run(job)
        seconds = time.monotonic() - begun
        for what, status in (
            ("error", VerdictStatus.ERROR),
            ("fault", VerdictStatus.GOLD_UNPARSED),
        ):
            if what in result:
                logger.warning("code: %s", shown(str(result[what])))
                return None, status, seconds, None
        share = result.get("passed", 0) / max(result.get("tests", 1), 1)
        value = share if part.score == "share" else float(share == 1)
        return value, VerdictStatus.OK, seconds, self._feedback(result) if share < 1 else None

    def _feedback(self, result: dict[str, Any]) -> str | None:
        lines = str(result.get("stderr", "")).splitlines()
        if result.get("late"):
            lines.append(f"stopped after {self._config.timeout_s:g} s")
        most = self._part.feedback_lines
        return "\n".join(line[:_LINE_CHARS] for line in lines[-most:]) or None if most else None


def _unread(tested: bool) -> tuple[float | None, VerdictStatus, float, str | None]:
    """Of a response without a code block, or to a problem without tests."""
    if tested:
        return 0.0, VerdictStatus.PRED_UNPARSED, 0.0, None
    return None, VerdictStatus.GOLD_UNPARSED, 0.0, None


def _tests(problem: dict[str, Any]) -> dict[str, Any] | None:
    """The tests of a problem; None if it has none.

    Raises:
        InputError: its metadata's entry `code` is not what the sources write.
    """
    metadata = problem.get("metadata")
    found = json.loads(metadata).get("code") if metadata else None
    if found is not None and not _are_tests(found):
        raise InputError(
            f"rewards: code: problem {problem['problem_id']}: its metadata's code holds no tests; "
            "name their column with source.columns.tests or source.columns.cases, or give the "
            "entry of your own another name"
        )
    return found


def _are_tests(found: Any) -> bool:
    """Whether the sandbox can run them."""
    if not isinstance(found, dict):
        return False
    texts = (found.get(name, "") for name in ("prompt", "tests", "entry_point"))
    cases = found.get("cases", [])
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(cases, list)
        and all(isinstance(case, dict) and _is_case(case) for case in cases)
    )


def _is_case(case: dict[str, Any]) -> bool:
    return all(isinstance(case.get(name), str) for name in ("stdin", "stdout"))


def last_block(text: str) -> str | None:
    """The content of the last closed block fenced by ``` that is Python's or names no language;
    without one, the last of any language.
    """
    blocks: list[tuple[str, str]] = []
    language: str | None = None
    lines: list[str] = []
    for line in text.splitlines():
        mark = line.strip()
        if not mark.startswith("```"):
            lines.append(line)
        elif language is None:
            language, lines = mark.strip("`").strip().lower(), []
        else:
            blocks.append((language, "\n".join(lines)))
            language = None
    python = [block for tag, block in blocks if tag.partition(" ")[0] in _PYTHON]
    return next(reversed(python or [block for _, block in blocks]), None)


def _program(tests: dict[str, Any], block: str) -> str:
    """The block behind what stands before its function in the prompt: imports and helpers. A block
    that does not define the function continues the prompt.
    """
    prompt, entry = tests.get("prompt", ""), tests.get("entry_point", "")
    define = f"def {entry}("
    if not entry or define not in prompt:
        return block
    if define not in block:
        return f"{prompt.rstrip()}\n{block}"
    before = prompt[: prompt.index(define)]
    return f"{before}\n{block}" if _is_python(before) else block


@lru_cache(maxsize=512)
def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
