"""Compile the loss's kernels ahead of time, without a GPU, and print registers and spills.

    python tests/trace/triton/compile.py

For sm_80 (A100) and sm_90 (H100, H200), vocabularies of 151,936 (Qwen3) and 49,152 (SmolLM2),
logits in bfloat16 and float32, and each divergence with the clip that costs most. One line of JSON
per kernel: registers per thread, bytes of stack (spills) per thread, and warps that fit an SM.
"""

import argparse
import json
import re
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trace_opd.trace import fused_kernels
from trace_opd.trace.fused_triton import BLOCK, WARPS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTERS = 65_536  # of an SM, both architectures
TYPES = {
    "token_ids": "*i64", "rows": "*i64", "route": "*u8", "first": "i32", "base": "i32",
    "ROUTE": "i32",
}  # fmt: skip
ALIGNED = ("logits", "teacher", "slopes")


def compiled(kernel: Any, sm: int, logits: str, constants: dict[str, Any]) -> dict[str, int]:
    """What the kernel takes on `sm`. The other tensors are float32."""
    names = kernel.arg_names
    types = {"logits": f"*{logits}", "teacher": f"*{logits}", "slopes": "*bf16"} | TYPES
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED if n in names},
    )
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (
        int(re.findall(rf"{name}:(\d+)", usage)[0]) for name in ("REG", "STACK", "LOCAL")
    )
    blocks = REGISTERS // (-(-registers // 8) * 8 * 32 * WARPS)
    wide = re.findall(r"(?:ld|st)\.global[^ ]*\.v4\.", made.asm["ptx"])
    return {
        "registers": registers, "spilled_bytes": stack + local,
        "warps_per_sm": min(64, blocks * WARPS), "loads_of_16_bytes": len(wide),
    }  # fmt: skip


def variants(quick: bool) -> list[tuple[str, Any, int, str, dict[str, Any]]]:
    """(name, kernel, architecture, type of logits, constants) of each kernel to compile."""
    found = []
    vocabularies = (151_936,) if quick else (151_936, 49_152)
    for sm, vocab, logits in product((80, 90), vocabularies, ("bf16", "fp32")):
        shape = {
            "STRIDE": vocab, "VOCAB": vocab, "CAP": None, "WIDE": tl.float32, "BLOCK": BLOCK,
            "bias": None,
        }  # fmt: skip
        found.append(("statistics", fused_kernels.statistics, sm, logits, shape | {"rows": None}))
        for route, term in [(None, None), *fused_kernels.TERMS.items()]:
            for cap in (None,) if quick else (None, 30.0):
                clip = "none" if term is None else "entry_symmetric"
                constants = shape | {
                    "TERM": term, "CLIP": clip, "BOUND": 0.05, "BETA": 0.5, "CAP": cap,
                    "TEACHER_CAP": cap, "teacher_bias": None, "NARROW": logits == "fp32",
                }  # fmt: skip
                name = f"gradient of {route.label if route else 'grpo'}{', capped' * bool(cap)}"
                found.append((name, fused_kernels.gradient, sm, logits, constants))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one vocabulary, no soft cap")
    for name, kernel, sm, logits, constants in variants(parser.parse_args().quick):
        used = compiled(kernel, sm, logits, constants)
        row = {"kernel": name, "sm": sm, "vocabulary": constants["VOCAB"], "logits": logits}
        print(json.dumps(row | used), flush=True)
