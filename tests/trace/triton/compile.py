"""Compile the kernels that the Triton loss launches, without a GPU; print registers and spills.

    python tests/trace/triton/compile.py

The loss runs on tensors in the host's memory under a driver that only names the target, and each
launch compiles its kernel with the arguments that it would have on a GPU: for sm_80 (A100) and
sm_90 (H100, H200), vocabularies of 151,936 (Qwen3) and 49,152 (SmolLM2), logits in bfloat16 and
float32, every clip, with and without bias and soft cap, with a gate of the divergence, and with
scores in the teacher's place. One line of JSON a kernel: registers and bytes of spills of a thread,
and the warps that fit an SM.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from trace_opd.schemas.configs import GateConfig, LossConfig
from trace_opd.schemas.labels import KlClip, Route, Signal
from trace_opd.tests.trace.twin import made_case
from trace_opd.tests.trace.twin_options import scores_of
from trace_opd.trace import fused_triton
from trace_opd.trace.fused_call import Call

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS, WARPS = 65_536, 64  # of an SM, on both architectures


class Target:
    """A driver without a device. The architecture is the device's number, which kernels are kept
    by."""

    sm = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiling:
    """Stands for a kernel: a launch compiles it and keeps what was made."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.made: dict[str, tuple[str, Any]] = {}

    def __getitem__(self, grid: tuple[int]) -> Callable:
        def launch(*args: Any, **options: Any) -> None:
            made = self.kernel.warmup(*args, grid=grid, **options)
            term = options.get("TERM")
            name = f"{self.kernel.__name__}{term.__name__ if term else ''}"
            if options.get("STAGE", "both") != "both":
                name += f" {options['STAGE']}"
            if options.get("HOLES"):
                name += " of the rest"
            self.made.setdefault(made.hash, (name, made))

        return launch


def usage(made: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", text)[0]) for name in ("REG", "STACK", "LOCAL")
    )
    blocks = REGISTERS // (-(-registers // 8) * 8 * 32 * fused_triton.WARPS)
    wide = re.findall(r"(?:ld|st)\.global[^ ]*\.v4\.", made.asm["ptx"])
    return {
        "registers": registers, "spilled_bytes": stack + local, "16_byte_accesses": len(wide),
        "warps_per_sm": min(WARPS, blocks * fused_triton.WARPS),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one vocabulary, one clip, no bias")
    quick = parser.parse_args().quick
    driver.set_active(Target())
    kernels = [Compiling(fused_triton.statistics), Compiling(fused_triton.gradient)]
    fused_triton.statistics, fused_triton.gradient = kernels
    axes: dict[str, list[Any]] = {
        "sm": [80, 90],
        "vocab": [151_936] if quick else [151_936, 49_152],
        "fp32_logits": [False, True],
        "kl_clip": [KlClip.ENTRY_SYMMETRIC] if quick else list(KlClip),
        "capped": [False] if quick else [False, True],
        "taught": ["all routes", "gate", "scores", *([] if quick else ["none"])],
    }
    for values in product(*axes.values()):
        at = dict(zip(axes, values, strict=True))
        Target.sm = at["sm"]
        routes = {
            "all routes": [int(route) for route in Route], "none": [0], "scores": [0, 1, 4],
            "gate": [0, 1, 2, 3],
        }[at["taught"]]  # fmt: skip
        case = made_case(
            routes, vocab=at["vocab"], bias=at["capped"], softcap=30.0 if at["capped"] else None
        )
        if at["taught"] == "scores":
            case = replace(case, inputs=replace(case.inputs, scores=scores_of(case, 64)))
        case = case.to(torch.bfloat16)
        gates = [GateConfig(of=Signal.DIVERGENCE, shape="above", at=0.1)]
        config = LossConfig(
            kl_clip=at["kl_clip"], fp32_logits=at["fp32_logits"],
            gates=gates if at["taught"] == "gate" else [],
        )  # fmt: skip
        call = Call(case.inputs, config, 0.3, 0.4, case.head, case.teacher_head)
        taught = case.teacher_hidden if at["taught"] in ("all routes", "gate") else None
        for kernel in kernels:
            kernel.made = {}
        fused_triton.TritonRoutedLoss.apply(
            case.hidden, case.head.weight, case.head.bias, taught, call
        )
        for kernel in kernels:
            for name, made in kernel.made.values():
                print(json.dumps({"kernel": name} | at | usage(made)), flush=True)


if __name__ == "__main__":
    main()
