"""The Triton loss on random cases, against float64's autograd (twin.py) and the PyTorch path.

    python tests/trace/triton/cases.py --cases 300 --seed 0
    python tests/trace/triton/cases.py --device cuda

On CPU Triton's interpreter runs the kernels, in float64, float32, and bfloat16 with logits in
float32. On CUDA bfloat16's own logits come too, and a vocabulary of 151,936. Memory that nothing
has written holds NaN. Prints one line of JSON; ends with 1 at the first case that differs.
"""

import argparse
import json
import os
import random
import sys
import warnings
from collections import Counter

parser = argparse.ArgumentParser()
parser.add_argument("--cases", type=int, default=48)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--only", type=int, help="one case, by its number")
parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
ARGUMENTS = parser.parse_args()
if ARGUMENTS.device == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch  # noqa: E402

from trace_opd.schemas.configs import LossConfig  # noqa: E402
from trace_opd.schemas.labels import KlClip, Route  # noqa: E402
from trace_opd.tests.trace.twin import Case, gradients, made_case, ours, twin  # noqa: E402
from trace_opd.tests.trace.twin_options import drawn_options, valid, with_options  # noqa: E402
from trace_opd.trace import fused_triton  # noqa: E402
from trace_opd.trace.losses import LossOutput  # noqa: E402

# Largest difference as a share of the norm: of float64, float32, and of states in bfloat16.
BOUNDS = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 3e-2}
FLAGS = ("ratio_clipped", "kl_clipped")  # may flip where a term is within rounding of its bound
LAYOUTS = (
    [3, 0, 4, 1, 2, 0], [0, 4, 1, 3, 2], [2, 3, 1, 4, 1], [0, 0, 3, 3, 0], [0] * 4, [4, 0, 4],
    [1], [0],
)  # fmt: skip
MASKS = ((0.0, 0.0), (0.0, 0.0), (0.4, 0.0), (0.0, 0.4), (0.3, 0.5))


def drawn(index: int, device: str) -> tuple[dict, dict, dict, dict | None]:
    """A case's shape, its loss, how it is computed, and arguments of `with_options`.

    The first axes take turns, so that few cases cover each of their values; the rest is random.
    """
    at = random.Random(f"{ARGUMENTS.seed}-{index}")
    small = device == "cpu"
    types = [torch.float64, torch.float32, torch.bfloat16] + [torch.bfloat16] * (not small)
    shape = {
        "routes": LAYOUTS[index % len(LAYOUTS)] if index % 3 else at.choices(range(5), k=6),
        "seed": at.randrange(10**6),
        # Each new vocabulary compiles the kernels again.
        "vocab": at.randint(2, 70) if small else at.choice([65, 5003, 151_936]),
        "width": at.randint(1, 8),
        "bias": at.random() < 0.5,
        "softcap": at.choice([None, None, 2.0, 30.0]),
        "temperature": at.choice([None, 1.0, 0.6]),
        "scale": at.choice([0.3, 1.0, 3.0]),
        "masked": MASKS[index % len(MASKS)],
    }
    loss = {
        "kl_clip": list(KlClip)[index % len(KlClip)],
        "kl_clip_value": at.uniform(0.01, 0.5) if small else 0.05,
        "jsd_beta": at.uniform(0.05, 0.95) if small else at.choice([0.1, 0.5]),
        "grpo": at.random() < 0.8,
        "truncated_importance": at.choice([None, None, 1.1]),
        "reference_kl": at.choice([0.0, 0.3]),
        "entropy_beta": at.choice([0.0, 0.7]),
        "reweight_clip": at.uniform(0.05, 0.9),
    }
    states = types[index % len(types)]
    logits = states == torch.bfloat16 and (small or at.random() < 0.5)
    weights = at.choice([None, torch.float32]) if states == torch.bfloat16 else None
    how = {
        "states": states, "weights": weights, "fp32_logits": logits,
        "lam": 0.0 if index % 7 == 5 else at.uniform(0.05, 0.5),
        "rows": at.choice([3, 6, 100]), "block": 32 if small else fused_triton.BLOCK,
    }  # fmt: skip
    options = None
    if index % 2:  # else the plain objective and its first baselines
        if index % 4 == 3:  # what scores can teach
            shape |= {"routes": at.choices((0, 1, 1, 4), k=6), "softcap": at.choice([None, 2.0])}
        elif index % 8 == 1:  # what has a divergence
            shape["routes"] = at.choices((0, 1, 2, 3), k=6)
        more, options = drawn_options(at, shape["routes"])
        more.pop("top_k", None)  # the PyTorch path's alone
        loss |= more
    return shape, loss, how, options


def share(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The difference as a share of the norm, or of 0.05 where terms cancel."""
    got, expected = got.double().cpu(), expected.double().cpu()
    return float((got - expected).norm() / expected.norm().clamp(min=0.05))


def differences(
    mine: tuple[LossOutput, dict], theirs: tuple[LossOutput, dict], exact: bool
) -> dict[str, float]:
    """Of each output and gradient; NaN and infinity differ from everything."""
    found = {}
    for name, value in mine[0]._asdict().items():
        if name not in FLAGS or exact:
            found[name] = share(value, getattr(theirs[0], name))
    for name, value in mine[1].items():
        found[f"d {name}"] = share(value, theirs[1][name])
    return found


def run(index: int) -> tuple[dict[str, float], dict[str, float], dict]:
    """Differences of case `index` from the twin and from the PyTorch path, and what it covers."""
    shape, loss, how, options = drawn(index, ARGUMENTS.device)
    states, lam = how["states"], how["lam"]
    fused_triton.BLOCK = how["block"]
    stride = -(-shape["vocab"] // 64) * 64
    size = 4 if how["fp32_logits"] else states.itemsize
    fused_triton.BUFFER_BYTES = how["rows"] * stride * size
    case = made_case(**shape)
    if options is not None:
        case = with_options(case, shape["seed"], **options)
    case = case.to(states, ARGUMENTS.device, how["weights"])
    config = valid({"backend": "triton", "fp32_logits": how["fp32_logits"], **loss})

    def computed(case: Case, config: LossConfig) -> tuple[LossOutput, dict]:
        out = ours(case, config, lam, 1 - lam)
        return out, gradients(case, out.loss)

    mine = computed(case, config)
    for name, gradient in mine[1].items():
        assert gradient.dtype == case.variables[name].dtype, name
    torch_path = computed(case, config.model_copy(update={"backend": "torch"}))
    double = case.to(torch.float64)
    expected = twin(double, config, lam, 1 - lam)
    exact = states == torch.float64
    return (
        differences(mine, (expected, gradients(double, expected.loss)), exact),
        differences(mine, torch_path, exact),
        shape | config.model_dump() | how | (options or {}),
    )


def refuses_a_scaled_loss() -> bool:
    """The backward pass is the identity, so a factor on the loss is an error."""
    case = made_case([0, 1]).to(torch.float32, ARGUMENTS.device)
    try:
        gradients(case, 2 * ours(case, LossConfig(backend="triton"), 0.3, 0.4).loss)
    except RuntimeError as error:
        return "scale the loss's token weights" in str(error)
    return False


def covered(cases: list[dict]) -> dict[str, list[str]]:
    """Values of each axis that a case had."""
    kinds = {str(Route(int(r)).label) for case in cases if case["lam"] for r in case["routes"]}
    axes = ("kl_clip", "softcap", "temperature", "bias", "masked", "states", "fp32_logits", "rows")
    found = {axis: sorted({str(case[axis]) for case in cases}) for axis in axes}
    names = (
        "truncated_importance", "reference_kl", "entropy_beta", "importance_clip", "contrast",
        "teacher_temperature", "limits", "scores",
    )  # fmt: skip
    options = Counter(name for case in cases for name in names if case.get(name))
    return found | {
        "gates": sorted({str(gate["of"].value) for case in cases for gate in case["gates"]}),
        "reweight": sorted({case["reweight"] for case in cases}),
        "policy": sorted({case["policy"] for case in cases}),
        "routes": sorted(kinds),
        "options": sorted(options),
        "without a teacher": sorted({str(not case["lam"]) for case in cases}),
    }


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # PyTorch then fills the memory that it allocates with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    worst: dict[str, float] = {}
    cases = []
    numbers = range(ARGUMENTS.cases) if ARGUMENTS.only is None else [ARGUMENTS.only]
    for index in numbers:
        from_twin, from_torch, case = run(index)
        cases.append(case)
        bound = BOUNDS[case["states"]]
        compared = {"float64": from_twin, "torch": from_torch}
        if case["states"] == torch.bfloat16 and not case["fp32_logits"]:
            del compared["float64"]  # logits of 8 bits put terms on other sides of their bounds
        for against, found in compared.items():
            key = f"{str(case['states']).removeprefix('torch.')} from {against}"
            worst[key] = max(worst.get(key, 0.0), *found.values())
            bad = {name: value for name, value in found.items() if not value <= bound}
            if bad:
                print(
                    f"case {index} of seed {ARGUMENTS.seed} differs from {against}: {bad}\n{case}"
                )
                return 1
    if ARGUMENTS.device == "cpu" and not refuses_a_scaled_loss():  # on CUDA it ends the process
        print("a scaled loss is not refused")
        return 1
    print(json.dumps({"cases": len(cases), "worst": worst, "covered": covered(cases)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
