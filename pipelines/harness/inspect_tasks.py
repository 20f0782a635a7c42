"""Problems of a store as tasks of Inspect (inspect.aisi.org.uk), judged by our verifier.

    inspect eval trace_opd/problems -T problems=held-out -T config=configs/micro.yaml --model …

Inspect loads this file by its entry point; nothing of trace_opd imports it. The tasks take the same
config as stage evaluate, and ask each response with the seed that the stage would ask it with.
"""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
import pyarrow as pa
from inspect_ai import Epochs, Task, task  # pyright: ignore[reportMissingImports] - extra harness
from inspect_ai.dataset import MemoryDataset, Sample  # pyright: ignore[reportMissingImports]
from inspect_ai.model import (  # pyright: ignore[reportMissingImports]
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentReasoning,
    ContentText,
    GenerateConfig,
)
from inspect_ai.scorer import (  # pyright: ignore[reportMissingImports]
    CORRECT,
    INCORRECT,
    Score,
    Scorer,
    Target,
    scorer,
)
from inspect_ai.solver import (  # pyright: ignore[reportMissingImports]
    Generate,
    Solver,
    TaskState,
    solver,
)
from rich.markup import escape

from ...data.store import Dataset, Store
from ...schemas.configs import EvaluateConfig
from ...schemas.conversation import COLUMN
from ...schemas.errors import InputError
from ...schemas.labels import FinishReason
from ...schemas.settings import load_config
from ...schemas.tables import PROBLEMS
from ...trace.prompt import student_prompt
from ..samplers.chat_request import extra_fields
from ..samplers.rollouts import sample_seed
from ..stages.evaluate import verdicts_of_answers
from ..verifiers.registry import open_verifier
from .inspect_figures import VERDICT, avg_at, estimate, maj_at, pass_at
from .suites import benchmarks, require_suite

# Providers whose servers take vLLM's fields in addition to OpenAI's; others refuse them.
_TAKE_EXTRA_FIELDS = {"openai-api", "vllm", "sglang"}
_MESSAGES = {
    "system": ChatMessageSystem,
    "user": ChatMessageUser,
    "assistant": ChatMessageAssistant,
}
# What stage evaluate calls truncated: the response has no end of its own.
_CUT = {"max_tokens", "model_length", "content_filter"}


@task
def problems(
    problems: str | None = None,
    config: str | None = None,
    set: str | list[str] | None = None,
    store: str = "store",
) -> Task:
    """A problems dataset of a store.

    problems: alias, id or stage/id; None: the config's. config: YAML of stage evaluate, or of a
    pipeline with that section. set: overrides of it, key=value.
    """
    with _sentences():
        loaded = _config(config, set)
        if problems is not None:
            loaded = loaded.model_copy(update={"problems": problems})
        return _task(loaded, [Store(store).get(loaded.problems, PROBLEMS)])


@task
def suite(
    name: str = "paper",
    config: str | None = None,
    set: str | list[str] | None = None,
    store: str = "store",
    limit: int | None = None,
) -> Task:
    """All benchmarks of a suite, which `trace-opd evaluate --suite` has downloaded.

    limit: its --suite-limit. The other parameters are those of `problems`.
    """
    with _sentences():
        loaded = _config(config, set)
        require_suite(name, loaded)
        found = list(benchmarks(name, Store(store), limit))
        if missing := [one.preset for one in found if one.problems is None]:
            raise InputError(
                f"{', '.join(missing)}: not in store {store}; run `trace-opd evaluate --suite "
                f"{name}` first, which downloads them"
            )
        return _task(loaded, [one.problems for one in found if one.problems is not None])


@contextmanager
def _sentences() -> Iterator[None]:
    """Raise a user's mistake as the exception that Inspect prints without a traceback."""
    try:
        yield
    except InputError as error:
        try:
            from inspect_ai._util.error import (  # pyright: ignore[reportMissingImports]
                PrerequisiteError,
            )
        except ImportError:  # it is not public
            raise error from None
        raise PrerequisiteError(escape(str(error))) from None


def _config(path: str | None, overrides: str | list[str] | None) -> EvaluateConfig:
    # Inspect splits -T values at commas.
    changes = [overrides] if isinstance(overrides, str) else list(overrides or [])
    loaded = load_config(EvaluateConfig, path, changes, "evaluate")
    if loaded.verify.judges:
        raise InputError(
            "verify.rewards holds a judge, whose answers Inspect's tasks would not keep; use "
            "`trace-opd evaluate`"
        )
    return loaded


def _task(config: EvaluateConfig, datasets: list[Dataset]) -> Task:
    sampling, k = config.sampling, config.k
    rows = [row for dataset in datasets for row in dataset.read().to_pylist()]
    refs = [dataset.ref for dataset in datasets]
    return Task(
        dataset=MemoryDataset([_sample(config, row) for row in rows], name=", ".join(refs)),
        solver=ask(config.model_dump(mode="json")),
        scorer=answer_verdict(config.model_dump(mode="json")),
        metrics=[estimate(config.bootstrap, config.seed)],
        epochs=Epochs(k, [avg_at(k), pass_at(k), maj_at(k)]),
        config=GenerateConfig(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or None,
            max_tokens=sampling.max_new_tokens,
        ),
        metadata={"problems": refs, "thinking": config.prompt.thinking, "k": k},
    )


def _sample(config: EvaluateConfig, row: dict[str, Any]) -> Sample:
    prompt = student_prompt(None, config.prompt, row["problem"], row.get(COLUMN))
    messages: list[ChatMessage] = [
        _MESSAGES[message["role"]](content=message["content"]) for message in prompt.messages
    ]
    return Sample(
        input=messages,
        target=row["answer"],
        id=row["problem_id"],
        metadata={"source": row["source"], "row": row},
    )


@solver
def ask(config: dict[str, Any]) -> Solver:
    """Ask with the seed and the fields of stage evaluate. config: an EvaluateConfig."""
    loaded = EvaluateConfig.model_validate(config)

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        seed = sample_seed(loaded.seed, str(state.sample_id), state.epoch - 1)
        if str(state.model.api) not in _TAKE_EXTRA_FIELDS:
            return await generate(state, seed=seed)
        prompt = student_prompt(None, loaded.prompt, "")
        extra = extra_fields(prompt, loaded.sampling)
        del extra["logprobs"], extra["return_token_ids"]
        return await generate(state, seed=seed, extra_body=extra)

    return solve


@scorer(metrics=[])  # the task names its metric, which needs the config
def answer_verdict(config: dict[str, Any]) -> Scorer:
    """C or I by the verifier of a config; unscored where it has no verdict."""
    loaded = EvaluateConfig.model_validate(config)
    verifier = open_verifier(loaded.verify)
    atexit.register(verifier.close)  # Inspect does not say when a task ends
    one_at_a_time = anyio.Lock()

    def judge(row: dict[str, Any], response: str, cut: bool, name: str) -> dict[str, Any]:
        problem = PROBLEMS.table([row])
        reason = FinishReason.LENGTH if cut else FinishReason.STOP
        rollout = {
            "rollout_id": name,
            "problem_id": row["problem_id"],
            "group_id": row["problem_id"],
            "response": response,
            "finish_reason": reason.value,
        }
        rollouts = pa.Table.from_pylist([rollout])
        verdicts = verifier.verify(problem, rollouts)
        judged = verdicts_of_answers(loaded.verify, verifier, problem, rollouts, verdicts)
        (verdict,) = verdicts.select(
            ["rollout_id", "correct", "reward", "parsed_answer", "status", "verifier"]
        ).to_pylist()
        return verdict | {"answer_correct": judged.get(name)}

    async def score(state: TaskState, target: Target) -> Score:
        response = response_text(state)
        cut = state.output.stop_reason in _CUT
        name = f"{state.sample_id}-{state.epoch}"
        async with one_at_a_time:
            row = state.metadata["row"]
            verdict = await anyio.to_thread.run_sync(judge, row, response, cut, name)
        about = {"answer": verdict["parsed_answer"], "explanation": f"status {verdict['status']}"}
        about["metadata"] = {VERDICT: verdict}
        if verdict["correct"] is None:
            return Score.unscored(reason=str(verdict["status"]), **about)
        return Score(value=CORRECT if verdict["correct"] else INCORRECT, **about)

    return score


def response_text(state: TaskState) -> str:
    """The response with its thinking, which Inspect takes out of the text."""
    content = state.output.message.content if state.output.choices else ""
    if isinstance(content, str):
        return content
    parts = []
    for part in content:
        if isinstance(part, ContentReasoning):
            parts.append(f"<think>\n{part.reasoning}\n</think>\n\n")
        elif isinstance(part, ContentText):
            parts.append(part.text)
    return "".join(parts)
