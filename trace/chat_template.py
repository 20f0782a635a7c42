"""Chat templates rendered under limits; prompt.py calls `render_template`.

A template is a program that comes with a model. Jinja's sandbox denies it files and Python objects,
but it may loop or exhaust memory. So this process renders only known templates. Any other renders
in a worker process with limits on CPU time, memory and the length of the text: this module, started
as `python -m trace_opd.trace.chat_template <fd> <CPU s> <memory MiB>`. Questions and answers are
JSON, so nothing that a template wrote is unpickled.
"""

import atexit
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, cast

from ..schemas.errors import InputError

if TYPE_CHECKING:  # stage convert starts without it
    from transformers import PreTrainedTokenizerBase

# SHA-256 of the templates of the bundled models, micro and smollm2.
_KNOWN = {
    "78e0a4d744f547c0e0ee8b0d2d4d3206c3ef599c6dabbf1fe666adb14f916c47",  # micro
    "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",  # smollm2
}
_CPU_S, _MEMORY_MIB = 5, 1024
# For a worker that is starved of CPU; its own CPU limit ends it much earlier.
_DEADLINE_S = 300.0
# Limit of the text: a template adds a system prompt, and a few tokens per turn.
_ADDED_CHARS, _TIMES_CHARS = 1 << 20, 16
# A worker killed from outside (out of memory) is restarted once.
_ATTEMPTS = 2


def render_template(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
) -> str:
    """The text of a conversation, up to where the assistant's turn begins.

    Raises:
        InputError: the template fails, or exceeds a limit.
    """
    from transformers import PreTrainedTokenizerBase

    # A tokenizer's own method is code that the user allowed (trust_remote_code).
    own_code = (
        type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
    )
    if own_code or _is_known(tokenizer.chat_template):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=True,
            **options,
        )
        return cast(str, text)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # several templates and no default
        raise _refused(tokenizer, f"is not found ({' '.join(str(error).split()):.200})") from None
    most = _ADDED_CHARS + _TIMES_CHARS * sum(len(message["content"]) for message in messages)
    variables = {**tokenizer.special_tokens_map, **options}
    kind, value = _WORKER.ask([template, list(messages), variables, most])
    if kind == "rendered":
        return value
    raise _refused(tokenizer, value)


def _is_known(template: Any) -> bool:
    return hashlib.sha256(str(template).encode("utf-8", "replace")).hexdigest() in _KNOWN


def _refused(tokenizer: "PreTrainedTokenizerBase", what: str) -> InputError:
    return InputError(
        f"tokenizer {tokenizer.name_or_path}: its chat template {what}; mend chat_template.jinja "
        "in "
        "the model folder, or use another model"
    )


class _Worker:
    """One worker process, started by the first question; a lock serialises threads.

    A fork of this process starts its own worker.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._owner = 0

    def ask(self, job: list[Any]) -> tuple[str, str]:
        """("rendered", text) or ("refused", why)."""
        question = json.dumps(job, default=str).encode()
        with self._lock:
            code = None
            for _ in range(_ATTEMPTS):
                connection = self._started()
                answer = None
                with suppress(EOFError, OSError):  # it died
                    connection.send_bytes(question)
                    if connection.poll(_DEADLINE_S):
                        answer = connection.recv_bytes()
                if answer is not None:
                    kind, value = json.loads(answer)
                    return kind, value
                code = self.close()
                if code == -signal.SIGPROF:
                    return "refused", f"runs for more than {_CPU_S} s of CPU time"
        return "refused", f"ends the process that renders it (exit code {code})"

    def close(self) -> int | None:
        """Kill the process; its exit code."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None or self._owner != os.getpid():
            return None
        # Wait first: a worker that ended by itself keeps its exit code.
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.kill()
        connection.close()
        return process.wait()

    def _started(self) -> Connection:
        if self._connection is not None and self._owner == os.getpid():
            return self._connection
        self._connection, theirs = Pipe()
        # -P keeps the working directory off the module path, where a checkout's `trace` folder
        # would shadow the standard library's module. A new session shields the worker from Ctrl-C.
        command = [sys.executable, "-P", "-W", "ignore", "-m", f"{__package__}.chat_template"]
        self._process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(_CPU_S), str(_MEMORY_MIB)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._owner = os.getpid()
        return self._connection


_WORKER = _Worker()
atexit.register(_WORKER.close)


def answer(template: str, messages: list[Any], variables: dict[str, Any], most: int) -> bytes:
    """Render one conversation: ["rendered", text] or ["refused", why], as JSON."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=True,
            **variables,
        )
        if len(text) > most:
            why = f"makes {len(text):,} characters of a conversation that allows {most:,}"
            return json.dumps(["refused", why]).encode()
        return json.dumps(["rendered", text]).encode()
    except MemoryError:
        return json.dumps(["refused", "needs too much memory"]).encode()
    except Exception as error:  # a template may raise anything
        reason = " ".join(f"{type(error).__name__}: {error!s:.1000}".split())
        return json.dumps(["refused", f"fails ({reason:.200})"]).encode()


def serve(connection: Connection, cpu_s: float, memory_mib: int) -> None:
    """Run the worker: set its limits, and answer until the other end closes."""
    import transformers.utils.chat_template_utils  # noqa: F401 - no answer's time or memory

    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError):
        while True:
            job = json.loads(connection.recv_bytes())
            # SIGPROF's default action kills the process even inside a C function.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            reply = answer(*job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(reply)


if __name__ == "__main__":
    with suppress(BrokenPipeError, ConnectionResetError):  # the parent was killed
        serve(Connection(int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3]))
