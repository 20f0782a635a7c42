"""lm-eval runs its own tasks against a served policy, and its results record the thinking mode.

Run where lm_eval is installed (`make test-harness`), else skipped.
"""

import json
import os
import subprocess
import sys

import pytest

from trace_opd.tests.pipelines.harness.served import serving_micro

pytest.importorskip("lm_eval")

TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [], do_sample: false}
filter_list:
  - name: boxed
    filter:
      - {function: regex, regex_pattern: 'boxed\\{(\\d+)\\}', group_select: -1}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.mark.parametrize("thinking", [True, False])
def test_the_results_record_the_thinking_mode_that_the_server_got(thinking, tmp_path):
    sums = [(12, 34), (57, 21), (88, 43)]
    data = tmp_path / "sums.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"{a}+{b}", "answer": str(a + b)}) + "\n" for a, b in sums)
    )
    (tmp_path / "sums.yaml").write_text(TASK.replace("FILE", str(data)))
    generation = {
        "temperature": 0.0,
        "max_gen_toks": 96,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    with serving_micro() as (url, asked):
        done = subprocess.run(
            [sys.executable, "-m", "lm_eval", "run", "--model", "local-chat-completions",
             "--model_args", f"model=micro,base_url={url}/chat/completions,num_concurrent=2",
             "--tasks", "sums", "--include_path", str(tmp_path), "--apply_chat_template",
             "--gen_kwargs", json.dumps(generation),
             "--output_path", str(tmp_path / "out"), "--log_samples"],
            capture_output=True, text=True, check=False, cwd=tmp_path,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
                              "OPENAI_API_KEY": "none"},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(asked) == 3
    for body in asked:
        assert body["chat_template_kwargs"] == {"enable_thinking": thinking}
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    recorded = results["config"]["gen_kwargs"]
    assert recorded["chat_template_kwargs"] == {"enable_thinking": thinking}
    assert results["results"]["sums"]["exact_match,boxed"] == 1.0
