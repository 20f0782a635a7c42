"""The harness of the benchmarks: what it computes, keeps and refuses, and a small run of it.

    python -m pytest tests/test_benchmarks.py

Timings are not tested. The run is that of benchmarks/gpu.py on the CPU with few tokens: every row
of it has agreed with plain PyTorch.
"""

import json
import os
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import gpu
    import gpu_gates
    import gpu_parts
    import gpu_profile
    import results
    import shapes
    import step_table
    import turns
finally:
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("name", "hidden", "vocab", "layers"),
    [
        ("smollm2", 576, 49_152, 30),
        ("qwen3-1.7b", 2048, 151_936, 28),
        ("qwen3-8b", 4096, 151_936, 36),
        ("qwen3-8b-12-layers", 4096, 151_936, 12),
    ],
)
def test_shapes_have_the_sizes_of_their_models(name, hidden, vocab, layers):
    shape = shapes.shape_of(name)
    assert (shape.hidden, shape.vocab, shape.layers) == (hidden, vocab, layers)


def test_a_shape_is_read_from_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "vocab_size": 5}))
    for path in (tmp_path, tmp_path / "config.json"):
        assert shapes.shape_of(str(path)).hidden == 8


@pytest.mark.parametrize("name", ["qwen3-9b", "/no/such/config.json"])
def test_an_unknown_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"give a config\.json, or micro, "):
        shapes.shape_of(name)


@pytest.mark.parametrize("text", ["8", "8x", "x8", "0x8", "8x-1", "8x2x2", ""])
def test_lengths_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="such as 8x2048"):
        shapes.lengths_of(text)


def test_a_log_survives_a_torn_line(tmp_path):
    log = tmp_path / "log.jsonl"
    assert results.read_log(log) == []
    results.append(log, [{"a": 1}])
    with log.open("a") as file:
        file.write('{"a": ')
    results.append(log, [{"a": 2}, {"a": 3}])
    assert [row["a"] for row in results.read_log(log)] == [1, 2, 3]


def test_a_table_keeps_the_rows_of_other_devices_and_shapes(tmp_path):
    file, same = tmp_path / "loss.json", ("device", "shape")

    def row(device: str, shape: str, seconds: int) -> dict:
        return {"device": device, "shape": shape, "seconds": seconds}

    results.write_rows(file, [row("cpu", "tiny", 1), row("cpu", "micro", 1)], same)
    results.write_rows(file, [row("cuda", "tiny", 1), row("cpu", "tiny", 2)], same)
    assert json.loads(file.read_text()) == [
        row("cpu", "micro", 1),
        row("cpu", "tiny", 2),
        row("cuda", "tiny", 1),
    ]


def test_time_that_a_part_leaves_over_is_the_next_ones():
    chosen = [gpu_parts.Part("a", 1, []), gpu_parts.Part("b", 3, [])]
    assert gpu.deadlines(chosen, 8) == [120, 480]


def command(code: str, seconds: float = 30, needs: tuple[str, ...] = ()) -> gpu_parts.Command:
    return gpu_parts.Command(("-c", code), seconds, needs)


def test_a_run_is_taken_up_where_it_ended(tmp_path):
    log, marks = tmp_path / "log.jsonl", tmp_path / "marks"
    write = f"open({str(marks)!r}, 'a').write('x')"
    failing = command("raise SystemExit(3)")
    part = gpu_parts.Part("loss", 1, [command(write), failing, command("", needs=("nowhere",))])
    for _ in range(2):
        unfinished = gpu.measure([part], 5, log, "cpu")
    assert marks.read_text() == "x", "a finished command is not repeated"
    assert [line.rpartition(": ")[2] for line in unfinished] == [
        "ended with exit code 3",
        "nowhere missing",
    ]
    kinds = [row["part"] for row in results.read_log(log)]
    assert kinds.count("finished") == 1
    assert kinds.count("unfinished") == 4, "two in each call"


def test_a_command_beyond_its_limit_ends_with_what_it_started(tmp_path):
    file = tmp_path / "pid"
    code = (
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"open({str(file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    ended = gpu.run(command(code), 3, tmp_path / "log", "")
    assert ended == "stopped after 3 s"
    pid = int(file.read_text())
    for _ in range(100):  # until its new parent has collected it
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")


def test_without_time_nothing_starts(tmp_path):
    part = gpu_parts.Part("loss", 1, [command("raise SystemExit(3)")])
    (line,) = gpu.measure([part], 0, tmp_path / "log.jsonl", "cpu")
    assert line.endswith("no time left")


def test_names_of_commands_do_not_depend_on_the_machine():
    for part in gpu_parts.parts(None, "cuda"):
        for one in part.commands:
            assert str(gpu_parts.ROOT) not in one.name
            assert (one.line(Path("log"), "models")[1:])[0] == one.arguments[0]
    assert [part.name for part in gpu_parts.parts(None, "cuda")] == list(gpu.NAMES)


def loss_row(name: str, ms: float, mib: float, shape: str = gpu_gates.LARGE) -> dict:
    return {
        "part": "loss",
        "card": "NVIDIA H200",
        "shape": shape,
        "lengths": "1x2048",
        "tokens": 2048,
        "implementation": name,
        "seconds": ms / 1000,
        "peak_mib": mib,
    }


def step_row(name: str, seconds: float, shape: str = gpu_gates.SMALL, **more: float) -> dict:
    return {
        "part": "step",
        "card": "NVIDIA H200",
        "shape": shape,
        "lengths": "1x16384",
        "with_generation": False,
        "implementation": f"{name}:gradient_checkpointing=true",
        "seconds": seconds,
        "tokens_per_second": 16_384 / seconds,
        **more,
    }


def passed(rows: list[dict]) -> dict[str, bool | None]:
    return {gate.name: gate.passed for gate in gpu_gates.gates(rows)}


def test_without_rows_no_gate_says_anything():
    assert set(passed([]).values()) == {None}


def test_gates_of_the_loss():
    rows = [
        loss_row("floor", 10, 900),
        loss_row("ours", 20, 900),  # of an earlier run
        loss_row("ours", 11.4, 1900),
        loss_row("naive", 12, 3800),
        loss_row("liger", 11, 1950) | {"note": "differs"},
    ]
    of = passed(rows)
    assert of["loss, qwen3-8b, from 2,048 tokens: worst × floor"] is True
    assert of["loss, qwen3-8b: faster than every peer"] is True
    assert of["loss, qwen3-8b: smaller than every peer"] is True
    assert of["loss, qwen3-8b, 2,048 tokens: memory"] is True
    assert of["loss, qwen3-1.7b, from 2,048 tokens: worst × floor"] is None
    slow = passed([*rows, loss_row("ours", 11.6, 2100), loss_row("trl_span", 11.5, 2000)])
    assert slow["loss, qwen3-8b, from 2,048 tokens: worst × floor"] is False
    assert slow["loss, qwen3-8b: faster than every peer"] is False
    assert slow["loss, qwen3-8b: smaller than every peer"] is False
    assert slow["loss, qwen3-8b, 2,048 tokens: memory"] is False


def test_gates_of_kernels_and_launches():
    ends = [
        {"part": part, "command": "cases.py --device cuda"} for part in ("finished", "unfinished")
    ]
    assert passed(ends[:1])["loss: kernels against float64"] is True
    assert passed(ends)["loss: kernels against float64"] is False
    profile = {"part": "profile", "shape": gpu_gates.LARGE, "implementation": "ours", "chunks": 2}
    name = "loss, qwen3-8b: launches a chunk"
    assert passed([profile | {"launches": 120}])[name] is True
    assert passed([profile | {"launches": 123}])[name] is False


def test_gates_of_the_step():
    flops = 0.4 * 989.4e12 * 0.7
    grpo = step_row("ours_grpo", 0.7, flops=flops)
    of = passed([grpo, step_row("ours_trace", 1.0, teacher_seconds=0.3, flops=flops)])
    assert of["step, qwen3-1.7b, 16,384 tokens"] is True
    assert of["step, qwen3-1.7b, 16,384 tokens: MFU"] is True
    name = "step: TRACE over GRPO, as a multiple of 1 + the teacher's forward passes"
    assert of[name] is True
    assert of["step, qwen3-8b-12-layers, 16,384 tokens: MFU"] is None
    fast = step_row("ours_grpo", 0.7, flops=flops)
    fast["implementation"] += ",layers=liger"
    slower = step_row("ours_grpo", 0.9, flops=flops)
    assert passed([slower])["step, qwen3-1.7b, 16,384 tokens"] is False
    assert passed([slower, fast])["step, qwen3-1.7b, 16,384 tokens"] is True
    slow = passed([step_row("ours_grpo", 0.8, flops=0.35 * 989.4e12 * 0.8),
                   step_row("ours_trace", 1.2, teacher_seconds=0.3)])  # fmt: skip
    assert slow["step, qwen3-1.7b, 16,384 tokens"] is False
    assert slow["step, qwen3-1.7b, 16,384 tokens: MFU"] is False
    assert slow[name] is False


def test_a_gate_of_sampling_needs_a_phase():
    name = "sampling, qwen3-1.7b: wake and hand-over"
    row = {"part": "phases", "shape": gpu_gates.SMALL}
    assert passed([row])[name] is None
    assert passed([row | {"seconds_wake": 1.0, "seconds_hand_over": 1.5}])[name] is True
    assert passed([row | {"seconds_wake": 1.0, "seconds_hand_over": 2.5}])[name] is False


def test_utilisation_is_that_of_the_batch_whoever_trains_it():
    ours = step_row("ours_grpo", 2.0, flops=8e14)
    plain = step_row("plain", 4.0)
    rows = [ours, plain, step_row("ours_grpo", 1.0, shape="another", flops=1e9)]
    assert step_table.mfu(ours, rows, 1e15) == pytest.approx(0.4)
    assert step_table.mfu(plain, rows, 1e15) == pytest.approx(0.2)
    assert step_table.mfu(plain, rows, None) is None
    assert step_table.mfu(plain, [plain], 1e15) is None


def test_a_contrast_is_compared_with_the_same_step_without_it():
    rows = [
        step_row("ours_rlsd", 2.0, teacher_seconds=0.5),
        step_row("ours_rlcsd", 2.75, teacher_seconds=1.0),
        step_row("ours_trace", 1.5, teacher_seconds=0.25),
    ]
    (line,) = step_table.contrasts_share(rows)
    assert "adds 0.75 s to 2.00 s; its forward passes alone take 0.50 s" in line
    assert list(step_table.contrasts_share(rows[1:])) == []
    of_grpo = [*rows, step_row("ours_grpo", 1.0)]
    assert [line.count("takes") for line in step_table.teachers_share(of_grpo)] == [1, 1, 1]


def test_the_busy_share_counts_overlaps_once():
    assert gpu_profile.busy_share([(0, 4), (2, 3), (3, 5), (9, 10)]) == pytest.approx(0.6)
    assert gpu_profile.busy_share([(1, 2)]) == 1


def test_the_end_of_a_process_has_a_reason(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    with turns.Workers("cpu", []) as workers:
        assert workers.call(max, 2, 3) == 3
        with pytest.raises(turns.Ended, match="ended with exit code 3"):
            workers.call(os._exit, 3)
        with pytest.raises(turns.Ended, match="ValueError: invalid literal"):
            workers.call(int, "x")


def test_loss_and_step_run_on_a_small_shape(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of products this small a second one is a loss
    log = tmp_path / "log.jsonl"
    losses = ["floor", "ours", "naive", "ours:backend=torch", "ours:nothing=1"]
    steps = ["plain", "ours_grpo", "ours_trace:gradient_checkpointing=1"]
    loss, step = (
        gpu_parts.Command(
            (str(BENCHMARKS / script), "--shape", "tiny", "--lengths", lengths, "--device", "cpu",
             "--implementations", *names, *more),
            300, makes_models=script == "step.py",
        )
        for script, lengths, names, more in (
            ("loss.py", "2x32", losses, ()),
            ("step.py", "2x32,1x48", steps, ("--repetitions", "1")),
        )
    )  # fmt: skip
    assert gpu.measure([gpu_parts.Part("loss", 1, [loss, step])], 10, log, "cpu") == []
    rows = results.read_log(log)
    measured = {
        (row["implementation"], row["lengths"]): row for row in rows if row["part"] != "finished"
    }
    assert "nothing: unknown key" in measured.pop(("ours:nothing=1", "2x32"))["note"]
    assert measured.keys() == {(name, "2x32") for name in losses[:-1] + steps} | {
        (name, "1x48") for name in steps
    }
    for row in measured.values():
        assert "note" not in row
        assert row["seconds"] > 0
        assert row["torch"]
    trace = measured[steps[2], "2x32"]
    assert trace["teacher_seconds"] > 0
    assert trace["predicted_mib"] > 0
    assert trace["flops"] == measured["ours_grpo", "2x32"]["flops"]
