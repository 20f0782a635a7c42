"""Time and CPU of asking an endpoint 1,000 questions: our annotator and its peers' clients.

    make bench-annotate

A server on loopback, in its own process, gives the same valid answer to every question: at once, or
after 200 ms, with 64 requests in flight. annotate_peers.py describes each row. Ideal is a client
without cost: ceil(requests / in flight) times the latency. CPU is that of the client's process with
all its threads. The server's CPU time is printed too; it shows that the server is not the limit.

Each measurement is a process. Implementations take turns, and the median of the rounds counts.
Peers that are not installed are skipped. They pin other versions of the same libraries, so they may
have an environment of their own, given by its interpreter:

    python -m venv .venv-peers
    .venv-peers/bin/pip install 'distilabel[openai]' bespokelabs-curator
    .venv/bin/python benchmarks/annotate.py --peers-python .venv-peers/bin/python

Prints a table and writes benchmarks/results/annotate.json.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import annotate_peers
import uvicorn
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
REQUESTS, WARM_UP, CONCURRENCY, ROUNDS = 1000, 64, 64, 3
LATENCIES_S = (0.0, 0.2)
MODEL, MAX_NEW_TOKENS = "benchmark", 512
ANSWER = '{"abstain": false, "spans": [{"segments": [2], "quote": null}], "type": "arithmetic"}'
STEPS = (
    "Each box holds 4 pens and the shop packs box {n} after box {m}.",
    "So after box {n} there are $4 \\cdot {n} = {wrong}$ pens on the counter.",
    "The next box adds $4$ to these, which makes ${wrong} + 4 = {sum}$.",
)


def response_of(number: int) -> str:
    """A wrong response of about 1,500 characters, distinct for each number."""
    lines = [f"Order {number}: let $p$ be the number of pens."]
    for n in range(1, 9):
        values = {"n": n, "m": n - 1, "wrong": 4 * n + number % 7, "sum": 4 * n + number % 7 + 4}
        lines += [step.format(**values) for step in STEPS]
    return "\n".join([*lines, "The answer is 7."])


def make_case(base_url: str) -> dict[str, Any]:
    from trace_opd.pipelines.annotators.prompting import ask, load_prompt
    from trace_opd.pipelines.annotators.rows import items
    from trace_opd.schemas.configs import SegmentConfig
    from trace_opd.schemas.labels import SpanKind

    prompt = load_prompt()
    responses = [response_of(number) for number in range(WARM_UP + REQUESTS)]
    work = items(*annotate_peers.tables(responses), SegmentConfig())
    questions = [{"response": item.response, "messages": ask(prompt, item)} for item in work]
    return {
        "base_url": base_url,
        "concurrency": CONCURRENCY,
        "model": MODEL,
        "max_new_tokens": MAX_NEW_TOKENS,
        "schema": prompt.schemas[SpanKind.ERROR],
        "warm_up": questions[:WARM_UP],
        "measured": questions[WARM_UP:],
    }


def serve(latency_s: float, pipe: Connection) -> None:
    """Answer every POST after `latency_s`; send the port, then serve until terminated."""
    message = {"role": "assistant", "content": ANSWER}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [choice],
            "usage": {"prompt_tokens": 1000, "completion_tokens": 30, "total_tokens": 1030},
        }
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        due = asyncio.get_running_loop().time() + latency_s
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def run() -> None:
        config = uvicorn.Config(app, port=0, lifespan="off", log_level="error", access_log=False)
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        pipe.send(server.servers[0].sockets[0].getsockname()[1])
        await running

    asyncio.run(run())


@contextmanager
def served(latency_s: float) -> Iterator[tuple[str, int]]:
    """Base URL and process id of a running server."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(latency_s, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}/v1", process.pid or 0
    finally:
        process.terminate()
        process.join()


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_once(name: str, case: Path, python: str, console: Console) -> dict[str, float] | None:
    """Seconds and CPU seconds of one run; None if the implementation is missing or fails."""
    command = [python, annotate_peers.__file__, name, str(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        console.print(f"{name} fails: {done.stderr.strip().splitlines()[-1]}", markup=False)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    latency_s: float, pythons: dict[str, str], console: Console
) -> tuple[list[dict[str, Any]], float]:
    """One row per installed implementation, and the server's CPU seconds per request."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    with served(latency_s) as (base_url, pid), tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.json"
        case.write_text(json.dumps(make_case(base_url)))
        began, asked = cpu_seconds(pid), 0
        for round_ in range(ROUNDS):
            for name, python in pythons.items():
                with console.status(f"latency {latency_s:g} s, round {round_ + 1}: {name}"):
                    figures = measure_once(name, case, python, console)
                if figures is not None:
                    samples[name].append(figures)
                    asked += WARM_UP + REQUESTS
        server_s = (cpu_seconds(pid) - began) / max(1, asked)
    rows = []
    for name, measured in samples.items():
        if not measured:
            continue
        cpu_s = statistics.median(figures["cpu_seconds"] for figures in measured)
        rows.append(
            {
                "implementation": name,
                "requests": REQUESTS,
                "concurrency": CONCURRENCY,
                "server_latency_s": latency_s,
                "seconds": statistics.median(figures["seconds"] for figures in measured),
                "ideal_seconds": math.ceil(REQUESTS / CONCURRENCY) * latency_s,
                "cpu_ms_per_request": cpu_s / REQUESTS * 1000,
            }
        )
    return rows, server_s


def table_of(rows: list[dict[str, Any]], server_s: float) -> Table:
    first = rows[0]
    table = Table(
        title=f"{REQUESTS:,} requests, {CONCURRENCY} in flight, {first['server_latency_s']:g} s of "
        f"latency; server {server_s * 1000:.2f} ms of CPU per request"
    )
    for column in ("", "seconds", "× ideal", "CPU ms per request", "× ours"):
        table.add_column(column, justify="right" if column else "left")
    own = next((r["cpu_ms_per_request"] for r in rows if r["implementation"] == "ours"), None)
    for row in rows:
        ideal, cpu_ms = row["ideal_seconds"], row["cpu_ms_per_request"]
        table.add_row(
            row["implementation"],
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / ideal:.3f}" if ideal else "–",
            f"{cpu_ms:.2f}",
            f"{cpu_ms / own:.2f}" if own else "–",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and CPU of clients of an endpoint.")
    parser.add_argument(
        "--implementations",
        default=",".join(annotate_peers.IMPLEMENTATIONS),
        help="subset, by name",
    )
    parser.add_argument(
        "--peers-python",
        default=sys.executable,
        help="interpreter of an environment with the peers",
    )
    options = parser.parse_args()
    wanted = options.implementations.split(",")
    if unknown := set(wanted) - set(annotate_peers.IMPLEMENTATIONS):
        parser.error(f"no such implementation: {', '.join(sorted(unknown))}")
    pythons = {
        name: sys.executable if annotate_peers.installed(name) else options.peers_python
        for name in wanted
    }
    console = Console()
    rows: list[dict[str, Any]] = []
    for latency_s in LATENCIES_S:
        measured, server_s = measure(latency_s, pythons, console)
        if measured:
            console.print(table_of(measured, server_s))
        rows += measured
    if skipped := [name for name in wanted if name not in {row["implementation"] for row in rows}]:
        console.print(
            f"Skipped: {', '.join(skipped)}; install them with pip install 'distilabel[openai]' "
            "bespokelabs-curator, and name their environment's interpreter by --peers-python.",
            markup=False,
        )
    target = ROOT / "benchmarks" / "results" / "annotate.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
