"""Renders chat templates until its pipe closes, under limits on CPU time and memory.

Started by chat_template.py as `python -m trace_opd.trace.template_worker <fd> <CPU s> <memory MiB>`.
Questions and answers are JSON: what a template wrote is not unpickled.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def answer(template: str, messages: list[Any], variables: dict[str, Any], most: int) -> bytes:
    """["rendered", text] or ["refused", why], as JSON."""
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
    """Answer questions until the other end closes."""
    limit = memory_mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError):
        while True:
            job = json.loads(connection.recv_bytes())
            # The default action of SIGPROF ends the process, in the middle of a C function too.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            said = answer(*job)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send_bytes(said)


if __name__ == "__main__":
    with suppress(BrokenPipeError, ConnectionResetError):  # the parent was killed
        serve(Connection(int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3]))
