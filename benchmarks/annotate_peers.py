"""Ask the same questions with one client, once: the process that annotate.py measures.

    python benchmarks/annotate_peers.py IMPLEMENTATION CASE

CASE is a JSON file: "base_url", "concurrency", "model", "max_new_tokens", "schema" of the answer,
and two lists of "questions" ("warm_up" and "measured"), each with a "response" and the "messages"
that ask about it. Prints {"seconds", "cpu_seconds"} of the measured questions as JSON; the warm-up
loads modules and opens connections.

- ours: the complete annotation of a part by `EndpointAnnotator`: segments, prompts, requests with
  the schema, a durable journal of answers, validation, rows. It builds the same messages itself.
- openai: `AsyncOpenAI` with a semaphore; takes the answer's text and does nothing else.
- distilabel: `OpenAILLM.generate`, in batches as large as the concurrency: its tasks send one batch
  after another.
- curator: `curator.LLM` with backend openai, its limits per minute raised out of reach, with the
  disk cache that it always writes.

No run needs a retry. Only `ours` needs this package.
"""

import asyncio
import atexit
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Case = dict[str, Any]
Ask = Callable[[list[dict[str, Any]]], None]
NEEDS = {
    "ours": "trace_opd",
    "openai": "openai",
    "distilabel": "distilabel",
    "curator": "bespokelabs",
}
OUT_OF_REACH = 10**9  # requests and tokens per minute


def ours(case: Case) -> Ask:
    from trace_opd.pipelines.annotators import open_annotator
    from trace_opd.schemas.configs import OpenAIAnnotator, SegmentConfig

    config = OpenAIAnnotator(
        engine="openai",
        base_url=case["base_url"],
        model=case["model"],
        api_key_env=None,
        concurrency=case["concurrency"],
        max_new_tokens=case["max_new_tokens"],
    )
    folder = tempfile.TemporaryDirectory(prefix="journal-")
    atexit.register(folder.cleanup)
    annotator = open_annotator(config, SegmentConfig(), journal=Path(folder.name))
    atexit.register(annotator.close)

    # Rollouts are made in advance, like the peers' messages; segmenting is part of the measurement.
    ready = {
        id(questions): tables([question["response"] for question in questions])
        for questions in (case["warm_up"], case["measured"])
    }

    def ask(questions: list[dict[str, Any]]) -> None:
        table = annotator.annotate(*ready[id(questions)])
        assert set(table["status"].to_pylist()) == {"ok"}, "an answer is not valid"

    return ask


def tables(responses: list[str]) -> tuple[Any, Any, Any]:
    """Problems, rollouts and verdicts: wrong responses to one problem."""
    from trace_opd.schemas.tables import PROBLEMS, ROLLOUTS, VERDICTS

    problem = {
        "problem_id": "p", "problem": "A shop packs 3 boxes of 4 pens. How many pens are packed?",
        "answer": "12", "answer_kind": "math", "solution": "3 · 4 = 12", "steps": None,
        "source": "benchmark", "split": "train",
    }  # fmt: skip
    rollout = {
        "prompt_token_ids": [], "token_ids": [], "logprobs": [], "finish_reason": "stop",
        "policy_name": "none", "policy_revision": "0", "policy_step": 0, "vocab_fingerprint": "",
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 512, "on_policy": False,
    }  # fmt: skip
    verdict = {
        "reward": 0.0, "correct": False, "parsed_answer": "7", "status": "ok", "verifier": "none",
        "seconds": 0.0,
    }  # fmt: skip
    ids = [
        {"rollout_id": f"r{i}", "problem_id": "p", "group_id": "g"} for i in range(len(responses))
    ]
    return (
        PROBLEMS.table([problem]),
        ROLLOUTS.table(
            rollout | row | {"sample_index": i, "seed": i, "response": response}
            for i, (row, response) in enumerate(zip(ids, responses, strict=True))
        ),
        VERDICTS.table(verdict | row for row in ids),
    )


def plain_openai(case: Case) -> Ask:
    import openai

    client = openai.AsyncOpenAI(base_url=case["base_url"], api_key="none", max_retries=0)
    runner = asyncio.Runner()
    schema = {"name": "annotation", "schema": case["schema"], "strict": True}

    async def all_of(questions: list[dict[str, Any]]) -> list[str | None]:
        slots = asyncio.Semaphore(case["concurrency"])

        async def one(messages: Any) -> str | None:
            async with slots:
                reply = await client.chat.completions.create(
                    model=case["model"],
                    messages=messages,
                    max_tokens=case["max_new_tokens"],
                    temperature=0.0,
                    response_format={"type": "json_schema", "json_schema": schema},  # type: ignore[arg-type]
                )
            return reply.choices[0].message.content

        return await asyncio.gather(*(one(question["messages"]) for question in questions))

    def ask(questions: list[dict[str, Any]]) -> None:
        assert all(runner.run(all_of(questions))), "an answer is missing"

    return ask


def distilabel(case: Case) -> Ask:
    from distilabel.models.llms import OpenAILLM  # type: ignore[import-not-found]

    llm = OpenAILLM(model=case["model"], base_url=case["base_url"], api_key="none", max_retries=0)
    llm.load()

    def ask(questions: list[dict[str, Any]]) -> None:
        for begin in range(0, len(questions), case["concurrency"]):
            batch = questions[begin : begin + case["concurrency"]]
            outputs = llm.generate(
                inputs=[question["messages"] for question in batch],
                max_new_tokens=case["max_new_tokens"],
                temperature=0.0,
            )
            assert all(output["generations"][0] for output in outputs), "an answer is missing"

    return ask


def curator(case: Case) -> Ask:
    os.environ |= {"TELEMETRY_ENABLED": "0", "CURATOR_DISABLE_RICH_DISPLAY": "1"}
    if (litellm := find_spec("litellm")) is not None and litellm.origin is not None:
        # It would download an encoding to count tokens; its own dependency includes this one.
        encodings = Path(litellm.origin).parent / "litellm_core_utils" / "tokenizers"
        os.environ["TIKTOKEN_CACHE_DIR"] = str(encodings)
    from bespokelabs import curator as library  # type: ignore[import-not-found]

    class Annotator(library.LLM):
        def prompt(self, input: dict[str, Any]) -> list[dict[str, str]]:
            return input["messages"]

        def parse(self, input: dict[str, Any], response: str) -> dict[str, str]:
            return {"answer": response}

    llm = Annotator(
        model_name=case["model"],
        backend="openai",
        generation_params={"max_tokens": case["max_new_tokens"], "temperature": 0.0},
        backend_params={
            "base_url": case["base_url"],
            "api_key": "none",
            "max_retries": 0,
            "max_concurrent_requests": case["concurrency"],
            "max_requests_per_minute": OUT_OF_REACH,
            "max_tokens_per_minute": OUT_OF_REACH,
        },
    )

    def ask(questions: list[dict[str, Any]]) -> None:
        rows = [{"messages": question["messages"]} for question in questions]
        with tempfile.TemporaryDirectory(prefix="curator-") as folder:
            made = llm(rows, working_dir=folder)
            assert all(row["answer"] for row in made.dataset), "an answer is missing"

    return ask


IMPLEMENTATIONS: dict[str, Callable[[Case], Ask]] = {
    "ours": ours,
    "openai": plain_openai,
    "distilabel": distilabel,
    "curator": curator,
}


def installed(name: str) -> bool:
    return find_spec(NEEDS[name]) is not None


def main() -> None:
    name, path = sys.argv[1:]
    if not installed(name):
        print("null")
        return
    case = json.loads(Path(path).read_text())
    ask = IMPLEMENTATIONS[name](case)
    ask(case["warm_up"])
    began, cpu_began = time.perf_counter(), time.process_time()
    ask(case["measured"])
    figures = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu_began,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
