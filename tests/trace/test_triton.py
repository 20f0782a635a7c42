"""The Triton loss: random cases in the interpreter, kernels compiled for GPUs, and its launches.

The interpreter has to be chosen before triton is imported, so the cases run in a process of their
own (triton/cases.py), as on a GPU. `make test-triton` runs more of them.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trace_opd.schemas.configs import GateConfig, LossConfig
from trace_opd.schemas.errors import InputError
from trace_opd.schemas.labels import KlClip, Route, Signal
from trace_opd.tests.trace.twin import gradients, made_case, ours
from trace_opd.trace import fused_kernels, fused_triton, losses
from trace_opd.trace.fused_call import Call
from trace_opd.trace.losses import Head, LossInputs, Scores

TERMS = fused_kernels.TERMS.values()
PROGRAMS = Path(__file__).parent / "triton"


def printed(program: str, *arguments: str) -> list[dict]:
    """The lines of JSON that a program in tests/trace/triton prints."""
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / program), *arguments],
        capture_output=True, text=True, check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_random_cases_equal_float64_and_the_pytorch_path():
    (found,) = printed("cases.py", "--cases", "48")
    covered = found["covered"]
    assert covered["routes"] == sorted(route.label for route in Route)
    assert covered["kl_clip"] == sorted(clip.value for clip in KlClip)
    assert len(covered["softcap"]) == 3
    assert len(covered["temperature"]) == 3
    assert len(covered["masked"]) == 4
    assert covered["states"] == ["torch.bfloat16", "torch.float32", "torch.float64"]
    assert covered["options"] == [
        "contrast", "entropy_beta", "importance_clip", "limits", "reference_kl", "scores",
        "teacher_temperature", "truncated_importance",
    ]  # fmt: skip
    assert covered["gates"] == sorted(signal.value for signal in Signal)
    assert covered["policy"] == ["cispo", "grpo", "gspo", "sapo"]
    assert covered["reweight"] == ["bounded", "inverse", "one_sided", "ratio"]
    for axis in ("bias", "fp32_logits", "without a teacher"):
        assert covered[axis] == ["False", "True"]


@pytest.mark.slow
def test_every_kernel_compiles_for_gpus_without_spills():
    kernels = printed("compile.py", "--quick")
    names = Counter((kernel["kernel"], kernel["sm"]) for kernel in kernels)
    # Two types of logits; statistics of the student's rows and of the teacher's.
    expected = {"statistics": 10, "statistics of the rest": 2, "gradient": 8}
    for term in TERMS:
        for stage in ("", " divergence", " slopes"):
            expected[f"gradient{term.__name__}{stage}"] = 2
    assert names == {(name, sm): n for name, n in expected.items() for sm in (80, 90)}
    for kernel in kernels:
        assert kernel["spilled_bytes"] == 0, kernel
        assert kernel["registers"] <= 128, kernel  # 16 warps on an SM
        assert kernel["16_byte_accesses"], kernel


# --- launches ---

# Operations that start nothing on a GPU.
FREE = {
    "prim.device", "aten.slice", "aten.detach", "aten.permute", "aten.view", "aten.empty",
    "aten.empty_like", "aten.expand", "aten.unbind", "aten.promote_types", "aten.scalar_tensor",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts what would be launched; the kernels themselves are counted and not run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = ".".join(str(func).split(".")[:2])
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.counts.update(["kernel"])


def launches(
    routes: list[int],
    rows: int,
    monkeypatch,
    config: LossConfig = LossConfig(),  # noqa: B008 - frozen
    k: int | None = None,
) -> Launches:
    """Of the forward and backward pass on tensors without data, which fail where one is asked."""
    tokens, vocab, width = len(routes), 512, 64
    counted = Launches()
    for kernel in ("statistics", "gradient"):
        monkeypatch.setattr(fused_triton, kernel, counted)
    monkeypatch.setattr(fused_triton, "BUFFER_BYTES", rows * vocab * 2)
    host = np.array(routes, np.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True):

        def made(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype)

        inputs = LossInputs(
            token_ids=made(tokens, dtype=torch.int64),
            old_logprobs=made(tokens),
            advantage=made(tokens),
            weight=made(tokens),
            temperature=made(tokens),
            route=made(tokens, dtype=torch.uint8),
            host_route=host,
            heated=True,
        )
        hidden = made(tokens, width, dtype=torch.bfloat16).requires_grad_()
        weight = made(vocab, width, dtype=torch.bfloat16).requires_grad_()
        teacher = made(vocab, width, dtype=torch.bfloat16)
        routed = int((host != 0).sum())
        if k is not None:
            ids = made(routed, k, dtype=torch.int64)
            inputs = replace(inputs, scores=Scores(ids, made(routed, k), made(routed)))
        call = Call(inputs, config, 0.3, 0.4, Head(weight), Head(teacher))
        taught = made(routed, width, dtype=torch.bfloat16)
        with counted:
            loss, *_ = fused_triton.TritonRoutedLoss.apply(hidden, weight, None, taught, call)
            loss.backward()
    return counted


def test_a_chunk_has_few_launches_and_none_waits_for_the_device(monkeypatch):
    routes = [0, int(Route.FKL), 0, 0] * 10
    one, two = (launches(routes, rows, monkeypatch).counts for rows in (100, 40))
    chunk = two - one
    assert chunk["aten.addmm"] == 4  # logits of student and teacher, gradients of states and head
    assert chunk["kernel"] == 4  # statistics of both, gradients of the two routes
    assert chunk.total() <= 50


def test_a_gate_of_the_divergence_takes_one_launch_more(monkeypatch):
    routes = [0, int(Route.FKL), 0, 0] * 10
    gates = [GateConfig(of=Signal.DIVERGENCE, shape="above", at=0.1)]
    one, two = (
        launches(routes, rows, monkeypatch, LossConfig(gates=gates)).counts for rows in (100, 40)
    )
    chunk = two - one
    assert chunk["aten.addmm"] == 4
    assert chunk["kernel"] == 5
    # A gate of anything else takes none.
    gates = [GateConfig(of=Signal.TEACHER_ENTROPY, shape="above", at=0.1)]
    one, two = (
        launches(routes, rows, monkeypatch, LossConfig(gates=gates)).counts for rows in (100, 40)
    )
    assert (two - one)["kernel"] == 4


def test_scores_take_no_product_of_a_teacher(monkeypatch):
    routes = [0, int(Route.FKL), 0, 0] * 10
    one, two = (launches(routes, rows, monkeypatch, k=8).counts for rows in (100, 21))
    chunk = two - one
    assert chunk["aten.addmm"] == 3
    assert chunk["kernel"] == 4  # statistics twice, gradients of the two routes


def test_a_token_without_a_teacher_costs_three_products_and_two_kernels(monkeypatch):
    one, two = (launches([0] * 40, rows, monkeypatch).counts for rows in (100, 21))
    chunk = two - one
    assert chunk["aten.addmm"] == 3
    assert chunk["kernel"] == 2


# --- which implementation ---


def test_on_cpu_auto_takes_pytorch_and_triton_is_refused():
    case = made_case([0, 1])
    plain = ours(case, LossConfig(), 0.3, 0.4)
    named = ours(case, LossConfig(backend="torch"), 0.3, 0.4)
    assert plain.loss == named.loss
    with pytest.raises(InputError, match=r"loss\.backend: triton needs a CUDA device"):
        ours(case, LossConfig(backend="triton"), 0.3, 0.4)


def test_a_divergence_without_a_triton_form_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(fused_kernels.TERMS, Route.JSD)
    with pytest.raises(InputError, match=r"has no form of jsd; .* or use torch"):
        ours(made_case([0]), LossConfig(backend="triton"), 0.3, 0.4)


def test_every_divergence_has_a_triton_form():
    assert fused_kernels.TERMS.keys() == losses.DIVERGENCES.keys()


def test_the_host_s_routes_replace_the_device_s():
    """The loss reads the routes of `host_route`, and asks the tensor only without it."""
    case = made_case([0, 1, 3])
    known = replace(case, inputs=replace(case.inputs, host_route=np.array([0, 1, 3], np.uint8)))
    expected, got = (ours(one, LossConfig(), 0.3, 0.4) for one in (case, known))
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)


def test_fp32_logits_are_not_rounded_to_the_states_type():
    case = made_case([0, 1, 2, 3, 4], vocab=40, width=64)
    low, double = case.to(torch.bfloat16), case.to(torch.bfloat16).to(torch.float64)
    exact = ours(double, LossConfig(), 0.3, 0.4)
    errors = [
        float((ours(low, LossConfig(fp32_logits=fp32), 0.3, 0.4).logprobs - exact.logprobs).norm())
        for fp32 in (False, True)
    ]
    assert errors[1] < 1e-4 < errors[0]
    assert gradients(low, ours(low, LossConfig(fp32_logits=True), 0.3, 0.4).loss)
