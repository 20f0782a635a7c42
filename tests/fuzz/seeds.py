"""The seed inputs of each fuzz target, in the form that the adapters in run.py read: shipped files
and valid tables. Used by run.py and test_fuzz.py.
"""

import gzip
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save as safetensors_bytes
from targets import SECTIONS

from trace_opd.pipelines.annotators.prompting import PROMPTS, SHIPPED_SCHEMA
from trace_opd.pipelines.paid.prices import SHIPPED_PRICES
from trace_opd.schemas.configs import PipelineConfig
from trace_opd.schemas.contract import TableContract
from trace_opd.schemas.settings import load_config
from trace_opd.schemas.tables import CONTRACTS

ROOT = Path(__file__).parents[2]
_ID = "0123456789abcdef"
_ANSWER = '{"abstain": false, "spans": [{"segments": [1, 2], "quote": "Two."}], "type": "algebra"}'
_TEXTS = (
    "One. Two $a. b$ three!\n\n\\boxed{1. 2}\n```\na. b\n```\n\\begin{align}x\\end{align} 漢。字",
    "naïve café 😀. e.g. 1. First {a} \\(x. y\\) \\[z\\] $$1.$$ costs $5. 'Q.' \ufffd",
)
_PROBLEM = {"problem": "1+1?", "answer": 2, "solution": "\\boxed{2}"}
_TURNS = [
    {"role": "system", "content": "Add."}, {"role": "user", "content": "1+0?"},
    {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
    {"from": "human", "value": "1+1?"},
]  # fmt: skip
_CONVERSATIONS = ({"messages": _TURNS, "answer": 2}, {"messages": json.dumps(_TURNS), "answer": 2})
_LABELLED = (
    {"id": "gsm8k-0", "generator": "g", "problem": "p", "steps": ["a", "b"],
     "final_answer_correct": False, "label": 1},
    {"question": {"problem": "p", "ground_truth_answer": "1", "ground_truth_solution": "s",
                  "pre_generated_steps": ["a"], "pre_generated_answer": "1"},
     "label": {"steps": [{"completions": [{"text": "a", "rating": -1, "flagged": None}],
                          "human_completion": None, "chosen_completion": 0}],
               "finish_reason": "found_error"}},
)  # fmt: skip


def seeds(target: str) -> list[bytes]:
    """The seeds of a target, in its adapter's form (run.py)."""
    return _SEEDS[target]()


def valid_table(contract: TableContract, rows: int = 2) -> pa.Table:
    """A table of a contract with a value in every column."""
    labels = {name: str(next(iter(kind))) for name, kind in contract.labels.items()}
    labels |= {f"{a}.{b}": str(next(iter(kind))) for (a, b), kind in contract.nested_labels.items()}
    labels |= {"metadata": "{}", "parts.status": "ok"}
    made = [
        {field.name: _value(field.type, field.name, row, labels) for field in contract.schema}
        for row in range(rows)
    ]
    return contract.table(made)


def parquet_bytes(table: pa.Table) -> bytes:
    """Uncompressed and without dictionaries, so that the fuzzer's changes reach the values."""
    sink = BytesIO()
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    return sink.getvalue()


def _value(kind: pa.DataType, path: str, row: int, labels: dict[str, str]) -> Any:
    if pa.types.is_list(kind):
        return [_value(kind.value_type, path, row, labels)]
    if pa.types.is_struct(kind):
        return {f.name: _value(f.type, f"{path}.{f.name}", row, labels) for f in kind}
    if pa.types.is_string(kind):
        return labels.get(path, f"{path} {row}")
    if pa.types.is_boolean(kind):
        return True
    return 0 if pa.types.is_integer(kind) else -0.5 if path.endswith("logprobs") else 0.5


def _configs() -> list[bytes]:
    content = (ROOT / "configs" / "micro.yaml").read_bytes()
    found = [bytes([which, 0]) + content for which in (0, 8)]  # the pipeline, and its section train
    sections = ["source: {kind: arithmetic}\nlimit: 3", "policy: {path: micro}", "timeout_s: 3",
                "max_chars: 9", "annotator: {engine: openai, model: m}", "routing: {alpha: 0.5}",
                "k: 8",
                "online: {steps: 1}", "k: 2", "limit: 3"]  # fmt: skip
    assert len(sections) == len(SECTIONS)
    found += [bytes([1 + i, 1]) + text.encode() + b"\xffseed=3" for i, text in enumerate(sections)]
    return found


def _prompts() -> list[bytes]:
    shipped = [path.read_bytes() for path in sorted(PROMPTS.glob("*.md"))]
    return [*shipped, shipped[0] + b"\xff" + SHIPPED_SCHEMA.read_bytes()]


def _answers() -> list[bytes]:
    return [
        text.encode()
        for text in (_ANSWER, f"<think>hm</think>\n```json\n{_ANSWER}\n```", _ANSWER + "\xff", "[]",
                     '{"spans": [], "type": "other", "abstain": true}')
    ]  # fmt: skip


def _completions() -> list[bytes]:
    logprobs = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1e-9}]}
    choice = {"message": {"content": "ab"}, "finish_reason": "stop", "token_ids": [4, 2]}
    plain = {"choices": [choice | {"token_ids": None}], "usage": {"prompt_tokens": 1}}
    full = {"choices": [choice | {"logprobs": logprobs}], "prompt_token_ids": [7, 8]}
    return [json.dumps(body).encode() for body in (plain, full)]


def _parquets() -> list[bytes]:
    return [
        bytes([index]) + parquet_bytes(valid_table(contract))
        for index, contract in enumerate(CONTRACTS.values())
    ]


def _problems_files() -> list[bytes]:
    lines = "\n".join([json.dumps(_PROBLEM), json.dumps(_PROBLEM | {"answer": "é"})])
    return [
        b"J" + lines.encode(),
        b"P" + parquet_bytes(pa.Table.from_pylist([_PROBLEM])),
        b"A" + json.dumps({"data": [_PROBLEM, {"question": [], "choices": ["1", "2"]}]}).encode(),
        b'C\xef\xbb\xbfquestion;"final answer"\r\n"1 + 1;\r\n""2""";2\r\n',
        b"Z" + gzip.compress(lines.encode()),
        b"M" + "\n".join(json.dumps(row) for row in _CONVERSATIONS).encode(),
    ]


def _manifests() -> list[bytes]:
    configs = load_config(PipelineConfig, ROOT / "configs" / "micro.yaml")
    digest = "0" * 64
    read = {"layout": "prm800k", "file": "a.jsonl", "limit": 3}
    estimates = {"base": {"pass@1": {"value": 0.5, "ci95": [0.25, 0.75]}}}
    kinds: list[dict[str, Any]] = [
        {"stage": "problems", "config": configs.problems.model_dump(mode="json")},
        {"stage": "problems", "config": {"import": read | {"sha256": digest}}},
        {"stage": "problems", "config": {"online": f"train/{_ID}"},
         "inputs": {"a": f"train/{_ID}"}},
        {"stage": "train", "config": configs.train.model_dump(mode="json"), "table": None,
         "summary": {"tables": {"rollouts": f"problems/{_ID}"}, "checkpoint": "checkpoints/final"},
         "files": [{"name": "metrics.jsonl", "bytes": 1, "sha256": digest}]},
        {"stage": "evaluate", "config": configs.evaluate.model_dump(mode="json"),
         "summary": {"policies": estimates, "per_part": [{"cost_usd": 0.5}]}},
    ]  # fmt: skip
    common = {
        "id": _ID, "table": "problems", "schema_version": 1, "inputs": {}, "seconds": 0.5,
        "started_at": "2026-01-01T00:00:00.000+00:00",
        "finished_at": "2026-01-01T00:00:01.000+00:00",
        "packages": {"torch": "2"}, "files": [], "summary": {"rows": 3},
        "parts": [{"name": "part-00000.parquet", "rows": 1, "bytes": 1, "sha256": digest}],
    }  # fmt: skip
    return [json.dumps(common | kind).encode() for kind in kinds]


def _journals() -> list[bytes]:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    parts = [{"type": "text", "text": _ANSWER}]
    messages = ({"content": _ANSWER}, {"content": parts}, {"content": None, "refusal": "no"})
    lines = []
    for number, message in enumerate(messages):
        body = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        record = {"latency_s": 0.5, "body": body, "batched": number == 1}
        lines += [{"reserved": f"r{number}", "usd": 0.5}, {"key": f"k{number}", "record": record}]
        lines.append({"settled": f"r{number}"})
        lines.append({"unanswered": "timed out", "key": f"k{number}", "at_most": [9, number]})
    lines = [json.dumps(line).encode() + b"\n" for line in lines]
    return [
        b"".join(lines),
        lines[1] + b"\0\0\n[]\n{}\n\xff\n" + lines[3],
    ]


def _model_files() -> list[bytes]:
    micro = ROOT / "data" / "micro"
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    return [bytes([at]) + (micro / name).read_bytes() for at, name in enumerate(names)]


def _checkpoint_files() -> list[bytes]:
    state = {"step": 0, "kl_exposure": 0.0, "skipped_in_a_row": 0, "skipped": 0}
    rng = {"torch": "AAAA", "cuda": [], "python": [3, [1, 2], None], "numpy": ["MT19937", [1], 1]}
    record = {"state": state, "teacher": False, "optimizer": {"w": {"step": 1}}, "rng": rng}
    places = {"model.w": {"saved_offsets": [1]}}
    shard = safetensors_bytes(
        {"model.w": np.ones(2, np.float32)}, {"DCP_SHARDING_INFO": json.dumps(places)}
    )
    return [b"\0" + json.dumps(record).encode(), b"\1" + shard]


_SEEDS = {
    "config": _configs,
    "prompt": _prompts,
    "yaml": lambda: [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))[:3]],
    "model-file": _model_files,
    "checkpoint-file": _checkpoint_files,
    "view-query": lambda: [b"from=0&count=100&after=-1&q=a&sort=disagreement", b"id=%00&from=9"],
    "chat-template": lambda: [
        (ROOT / "data" / "micro" / "chat_template.jinja").read_bytes(),
        b"{% for i in range(9) %}{{ messages[0].content * 9 }}{% endfor %}",
    ],
    "foreign-parquet": lambda: [parquet_bytes(pa.Table.from_pylist([_PROBLEM] * 3))],
    "prices": lambda: [SHIPPED_PRICES.read_bytes()],
    "segments": lambda: [b"\0\xc8" + text.encode() for text in _TEXTS],
    "alignment": lambda: [
        bytes([kind, high]) + text.encode()
        for kind in range(3)
        for high in (0, 200)
        for text in _TEXTS
    ],
    "answer": _answers,
    "journal": _journals,
    "completion": _completions,
    "parquet": _parquets,
    "problems-file": _problems_files,
    "labelled-file": lambda: [
        *(json.dumps(row).encode() for row in _LABELLED),
        json.dumps([_LABELLED[0]] * 2).encode(),
    ],
    "manifest": _manifests,
    "aliases": lambda: [json.dumps({"mine": f"train/{_ID}", "other": f"rollout/{_ID}"}).encode()],
}
