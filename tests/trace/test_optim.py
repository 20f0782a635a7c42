"""Optimisers and learning rates: schedules as transformers', moments of 8 bits, offload."""

import json
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
import transformers
from pydantic import ValidationError

from trace_opd.pipelines.models import resolve_policy
from trace_opd.schemas.configs import LoraConfig, OfflineConfig, OptimConfig, TrainConfig
from trace_opd.schemas.errors import InputError
from trace_opd.tests.ranks.torchrun import forked
from trace_opd.trace.adamw_8bit import BLOCK, has_8_bits
from trace_opd.trace.optim import MOMENT_BYTES, check_optimizer, learning_rate, make_optimizer
from trace_opd.trace.policy import load_policy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EIGHT = OptimConfig(kind="adamw_8bit", lr=1e-3)
# On every rank: three updates of a small model with and without sharding and offload, and a resumed
# one; writes what differs. The shapes: rows that two ranks share unevenly, and a single row.
PROGRAM = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.device_mesh import init_device_mesh
from trace_opd.schemas.configs import OptimConfig
from trace_opd.trace.optim import make_optimizer
from trace_opd.trace.ranks import join_ranks, local_tensor, whole_tensor
from trace_opd.trace.shards import read_shards, staged, write_shards
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict,
)

ranks = join_ranks("cpu")
mesh = init_device_mesh("cpu", (ranks.count,))

def model(**fsdp):
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        torch.nn.Linear(192, 81), torch.nn.Linear(81, 4096, bias=False), torch.nn.Linear(4096, 1)
    )
    return fully_shard(made, mesh=mesh, **fsdp) if fsdp else made

def train(made, optimizer, steps):
    for step in steps:
        for micro_batch in range(2):
            generator = torch.Generator().manual_seed(10 * step + micro_batch)
            made(torch.randn(8, 192, generator=generator)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

def same(left, right):
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all([torch.equal(whole_tensor(a), whole_tensor(b)) for a, b in pairs])

def update_both(made, optimizer, sharded, other):
    "With the same gradients, so that a sharded update is compared to the last bit."
    for p, q in zip(made.parameters(), sharded.parameters(), strict=True):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 1e-2
        q.grad = torch.distributed.tensor.distribute_tensor(p.grad, mesh, q.placements)
    for one in (optimizer, other):
        one.step()
        one.zero_grad()

found = {}
eight = OptimConfig(kind="adamw_8bit", lr=1e-3, weight_decay=0.1)
cpu = torch.device("cpu")
alone, sharded = model(), model(reshard_after_forward=True)
one, many = (make_optimizer(m.parameters(), eight, cpu) for m in (alone, sharded))
for _ in range(3):
    update_both(alone, one, sharded, many)
found["weights"] = same(alone, sharded)
options = StateDictOptions(full_state_dict=True)
whole = get_optimizer_state_dict(sharded, many, options=options)
expected = get_optimizer_state_dict(alone, one, options=options)
found["states"] = all(
    torch.equal(value, whole["state"][name][key])
    for name, state in expected["state"].items() for key, value in state.items()
)
found["empty on a rank"] = [local_tensor(p).numel() for p in sharded.parameters()].count(0)
def tensors(made, optimizer):
    return {
        f"{key}.{name}": value.detach()
        for name, p in made.named_parameters() for key, value in optimizer.state[p].items()
    }

written, wanted = tensors(sharded, many), tensors(alone, one)
write_shards(staged(written), Path(sys.argv[1], "shards"), ranks.count, ranks.waiting)
read = {name: torch.zeros_like(value) for name, value in wanted.items()}
read_shards(read, Path(sys.argv[1], "shards"))
found["read by one rank"] = all(torch.equal(read[name], wanted[name]) for name in wanted)
again = model(reshard_after_forward=True)
again.load_state_dict(sharded.state_dict())
resumed = make_optimizer(again.parameters(), eight, cpu)
set_optimizer_state_dict(again, resumed, expected, options=options)
for made, optimizer in ((sharded, many), (again, resumed)):
    train(made, optimizer, [5, 6])
found["resumed"] = same(sharded, again)

plain = OptimConfig(lr=1e-3)
offloaded = model(offload_policy=CPUOffloadPolicy(pin_memory=False))
kept = model(reshard_after_forward=True)
for made in (offloaded, kept):
    # As on a GPU: the fused update.
    optimizer = make_optimizer(made.parameters(), plain, torch.device("cuda"))
    assert optimizer.defaults["fused"]
    train(made, optimizer, range(3))
found["offload"] = same(offloaded, kept)
found["trained"] = not same(offloaded, model())
Path(sys.argv[1], f"{ranks.index}.json").write_text(json.dumps(found))
"""


# --- learning rates ---


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize(
    ("config", "theirs", "arguments"),
    [
        ({"schedule": "constant"}, "constant", {}),
        ({"schedule": "linear"}, "linear", {}),
        ({"schedule": "cosine"}, "cosine", {}),
        ({"schedule": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (
            {"schedule": "linear", "min_lr_ratio": 0.25},
            "polynomial",
            {"lr_end": 0.25 * 3e-4, "power": 1.0},
        ),
    ],
)
def test_learning_rates_are_those_of_transformers_schedules(warmup, config, theirs, arguments):
    total = 23
    config = OptimConfig(lr=3e-4, warmup_steps=warmup, **config)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=config.lr)
    if theirs == "constant" and warmup:
        theirs = "constant_with_warmup"
    scheduler = transformers.get_scheduler(
        theirs, optimizer, warmup, total, scheduler_specific_kwargs=arguments
    )
    expected = []
    for _ in range(total + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [learning_rate(step, total, config) for step in range(total)]
    # transformers wastes the first step of a warm-up on a learning rate of 0.
    assert ours[:warmup] == pytest.approx(expected[1 : warmup + 1], rel=1e-12)
    assert ours[warmup:] == pytest.approx(expected[warmup:-1], rel=1e-12, abs=1e-20)


def test_a_schedule_after_its_end_or_within_its_warm_up_alone_is_defined():
    config = OptimConfig(lr=1.0, schedule="cosine", min_lr_ratio=0.2, warmup_steps=3)
    assert learning_rate(9, 5, config) == pytest.approx(0.2)
    assert [learning_rate(step, 2, config) for step in range(2)] == pytest.approx([1 / 3, 2 / 3])


def test_a_smallest_learning_rate_without_a_schedule_is_refused():
    with pytest.raises(ValidationError, match="needs schedule linear or cosine"):
        OptimConfig(min_lr_ratio=0.1)


# --- AdamW ---


def updated(optimizer, parameters, steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def some_parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(100, 128), (64, 192), (128,), (4096,), (33, 100)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator) / 50) for s in shapes]


def test_adamw_on_the_cpu_is_pytorchs_default_to_the_bit():
    ours, theirs = some_parameters(), some_parameters()
    config = OptimConfig(lr=1e-3, weight_decay=0.1)
    left = updated(make_optimizer(ours, config, CPU), ours)
    adamw = torch.optim.AdamW(theirs, 1e-3, (config.beta1, config.beta2), weight_decay=0.1)
    right = updated(adamw, theirs)
    assert all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def test_adamw_is_fused_for_a_gpu_and_for_weights_that_are_offloaded():
    optimizers = [
        make_optimizer(some_parameters(), config, device)
        for config, device in (
            (OptimConfig(), CPU),
            (OptimConfig(), CUDA),
            (OptimConfig(offload=True), CUDA),
        )
    ]
    assert [bool(optimizer.defaults["fused"]) for optimizer in optimizers] == [False, True, True]


def test_frozen_parameters_are_left_out():
    trained, frozen = some_parameters()[:2]
    optimizer = make_optimizer([trained, frozen.requires_grad_(False)], OptimConfig(), CPU)
    assert optimizer.param_groups[0]["params"] == [trained]


# --- moments of 8 bits ---


def test_moments_have_8_bits_and_small_tensors_float32():
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, EIGHT, CPU)
    updated(optimizer, parameters)
    assert [has_8_bits(p) for p in parameters] == [True, True, False, False, False]
    for parameter in parameters:
        state = optimizer.state[parameter]
        sizes = {k: v.numel() * v.element_size() for k, v in state.items() if k != "step"}
        if has_8_bits(parameter):
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
            assert state["exp_avg_scale"].shape == (parameter.shape[0], parameter.shape[1] // BLOCK)
            assert sum(sizes.values()) == MOMENT_BYTES["adamw_8bit"] * parameter.numel()
            assert len(state["exp_avg"].unique()) > 100
        else:
            assert sum(sizes.values()) == MOMENT_BYTES["adamw"] * parameter.numel()


def test_weights_after_an_update_are_near_adamws():
    """Each value moves by about the learning rate; 8 bits change this by a few percent."""
    moved = []
    for kind in ("adamw", "adamw_8bit"):
        parameters = some_parameters()
        config = OptimConfig(kind=kind, lr=1e-3, weight_decay=0.1)
        after = updated(make_optimizer(parameters, config, CPU), parameters, steps=10)
        moved.append([a - b.detach() for a, b in zip(after, some_parameters(), strict=True)])
    for exact, low, parameter in zip(*moved, some_parameters(), strict=True):
        error = ((low - exact).norm() / exact.norm()).item()
        assert 0.001 < error < 0.1 if has_8_bits(parameter) else error < 1e-4


def test_a_loss_falls_as_with_adamw():
    """Micro learns four random sequences by heart."""
    ids = torch.randint(5, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = {}
    for kind in ("adamw", "adamw_8bit"):
        model = load_policy(resolve_policy("micro"), "cpu", trainable=True).model
        optimizer = make_optimizer(model.parameters(), OptimConfig(kind=kind, lr=1e-3), CPU)
        losses[kind] = []
        for _ in range(6):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[kind].append(loss.item())
    exact, low = losses["adamw"], losses["adamw_8bit"]
    assert exact[-1] < 0.6 * exact[0]
    assert low == pytest.approx(exact, rel=0.002)


def test_a_loaded_state_goes_on_as_the_saved_one():
    parameters = some_parameters()
    optimizer = make_optimizer(parameters, EIGHT, CPU)
    updated(optimizer, parameters)
    others = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = make_optimizer(others, EIGHT, CPU)
    other.load_state_dict(deepcopy(optimizer.state_dict()))
    assert other.state[others[0]]["exp_avg"].dtype == torch.uint8
    left, right = updated(optimizer, parameters), updated(other, others)
    assert all(torch.equal(*pair) for pair in zip(left, right, strict=True))


# --- ranks ---


@pytest.mark.slow
def test_ranks_update_as_one_and_offloading_changes_no_bit(forks, tmp_path):
    count = 2
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    forked(forks, count, tmp_path, program=program)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    assert sum(rank.pop("empty on a rank") for rank in found) > 0
    assert found == [dict.fromkeys(found[0], True)] * count


# --- what is printed and refused ---


def test_a_command_is_silent_where_torchao_is_installed():
    program = "from trace_opd.trace.policy import load_policy; import torchao"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    for refused in (
        lambda: check_optimizer(EIGHT, CPU, False),
        lambda: make_optimizer(some_parameters(), EIGHT, CPU),
    ):
        with pytest.raises(InputError, match=r"torchao is not installed.*trace-opd\[8bit\]"):
            refused()


def test_offloading_from_the_cpu_or_from_one_rank_in_float32_is_refused():
    config = OptimConfig(offload=True)
    with pytest.raises(InputError, match=r"the CPU already; set optim\.offload=false"):
        check_optimizer(config, CPU, True)
    with pytest.raises(InputError, match=r"set policy\.precision=bfloat16"):
        check_optimizer(config, CUDA, False)
    check_optimizer(config, CUDA, True)


def test_offloading_8_bits_or_adapters_is_refused():
    with pytest.raises(ValidationError, match="use kind adamw, or offload=false"):
        OptimConfig(kind="adamw_8bit", offload=True)
    with pytest.raises(ValidationError, match=r"set optim\.offload=false"):
        TrainConfig(
            offline=OfflineConfig(steps=1), lora=LoraConfig(), optim=OptimConfig(offload=True)
        )
