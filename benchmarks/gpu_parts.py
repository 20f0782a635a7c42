"""The parts of gpu.py: commands in the order of their worth, and how much time a part may take."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
KERNEL_CASES = ROOT / "tests" / "trace" / "triton" / "cases.py"
BASE = ("torch", "transformers", "pyarrow", "pydantic", "yaml", "safetensors", "fsspec", "rich")
STEPS = (*BASE, "jinja2", "jsonschema")
RECOMPUTED = "gradient_checkpointing=true"


@dataclass(frozen=True)
class Command:
    """seconds: its own limit. needs: modules without which it is left out."""

    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = BASE
    makes_models: bool = False

    @property
    def name(self) -> str:
        """What a log knows it by: the script and its arguments."""
        script, *rest = self.arguments
        return " ".join([Path(script).name, *rest])

    def line(self, log: Path, models: str) -> list[str]:
        """To run. Scripts of benchmarks/ add their rows to the log themselves."""
        own = ["--log", str(log)] if Path(self.arguments[0]).parent == BENCHMARKS else []
        own += ["--models", models] if self.makes_models else []
        return [sys.executable, *self.arguments, *own]

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if find_spec(name) is None]


@dataclass(frozen=True)
class Part:
    """minutes: its share of a whole run; what a part leaves over, those behind it have."""

    name: str
    minutes: float
    commands: list[Command]


def parts(shape: str | None, device: str) -> list[Part]:
    """The parts in their order. shape: of every part, for a rehearsal; None: those of GPU.md."""
    large, small, cut = (shape,) * 3 if shape else ("qwen3-8b", "qwen3-1.7b", "qwen3-8b-12-layers")
    return [
        Part("loss", 8, [*_ceilings(device), *_loss(large, small, shape, device)]),
        Part("step", 9, _steps(small, shape, device)),
        Part("layers", 5, _layers(cut, shape, device)),
        Part("rollout", 5, _rollouts(small, shape)),
    ]


def _ceilings(device: str) -> list[Command]:
    commands = [_command("gpu_ceilings.py", 60, "--device", device, needs=("torch", "rich"))]
    if KERNEL_CASES.exists():
        arguments = (str(KERNEL_CASES), "--device", device)
        commands.append(Command(arguments, 120, (*BASE, "triton")))
    return commands


def _loss(large: str, small: str, shape: str | None, device: str) -> list[Command]:
    ours = ["floor", "ours", "ours:backend=torch"]
    if device == "cuda":
        ours.append("ours:fp32_logits=true")
    peers = ["naive", *(["trl_span"] if find_spec("trl") else [])]
    peers += ["liger"] if find_spec("liger_kernel") else []
    sizes = ("1x32", "2x32") if shape else ("1x2048", "1x512", "4x2048", "16x2048")

    def command(of: str, lengths: tuple[str, ...], names: list[str]) -> Command:
        where = ("--shape", of, "--lengths", ",".join(lengths), "--device", device)
        return _command("loss.py", 200, *where, "--implementations", *names)

    where = ("--shape", large, "--lengths", sizes[0], "--device", device)
    profiled = _command("gpu_profile.py", 60, *where)
    commands = [command(large, sizes, ours), profiled, command(large, sizes[:3], peers)]
    commands += [command(small, sizes, ours), command(small, sizes[:3], peers)]
    return list(dict.fromkeys(commands))  # a rehearsal has one shape


def _steps(small: str, shape: str | None, device: str) -> list[Command]:
    """The settings that a gate needs first, then peers, then one change at a time."""
    every = "2x32,1x64" if shape else "8x2048,2x8192,1x16384,1x32768"
    long = "1x64" if shape else "1x16384"

    def command(lengths: str, *names: str, seconds: float = 150) -> Command:
        where = ("--shape", small, "--lengths", lengths, "--device", device)
        return _command(
            "step.py", seconds, *where, "--repetitions", "2", "--implementations", *names,
            needs=STEPS,
        )  # fmt: skip

    changes = ["loss.backend=torch", "layers=compile", "layers=liger", "attention=flash"]
    peers = [f"plain:{RECOMPUTED}"]
    if find_spec("trl") and find_spec("datasets"):
        peers.append(f"trl_grpo:{RECOMPUTED}")
    return [
        command(long, *(f"ours_{kind}:{RECOMPUTED}" for kind in ("grpo", "trace"))),
        command(long, "ours_grpo:gradient_checkpointing=auto"),
        command(every, f"ours_grpo:{RECOMPUTED}", *peers, seconds=240),
        *(command(long, f"ours_grpo:{RECOMPUTED},{change}") for change in changes),
        command(every, f"ours_trace:{RECOMPUTED}"),
        *(
            command(long, f"ours_grpo:gradient_checkpointing=auto,layers={layers}")
            for layers in ("compile", "liger")
        ),
        command(long, f"ours_grpo:{RECOMPUTED},loss.fp32_logits=true"),
    ]


def _layers(cut: str, shape: str | None, device: str) -> list[Command]:
    names = [f"ours_grpo:{RECOMPUTED}", "ours_grpo:gradient_checkpointing=auto"]
    return [
        _command(
            "step.py", 150, "--shape", cut, "--lengths", lengths, "--device", device,
            "--repetitions", "2", "--implementations", *names, needs=STEPS,
        )
        for lengths in (("1x128",) if shape else ("1x16384", "1x32768"))
    ]  # fmt: skip


def _rollouts(small: str, shape: str | None) -> list[Command]:
    few = ("--groups", "2", "--group-size", "2", "--max-new-tokens", "16")
    many = ("--groups", "64", "--group-size", "8", "--max-new-tokens", "2048")
    sizes = few if shape else many
    needs = (*STEPS, "vllm", "llguidance")
    where = ("--shape", small, *sizes)
    return [
        _command("rollout_phases.py", 150, *where, "--rounds", "2", needs=needs),
        _command(
            "rollout.py", 240, *where, "--repetitions", "1", "--implementations", "vllm_options",
            needs=needs,
        ),
    ]  # fmt: skip


def _command(
    script: str, seconds: float, *arguments: str, needs: tuple[str, ...] = BASE
) -> Command:
    makes_models = not script.startswith(("gpu_", "loss"))
    return Command((str(BENCHMARKS / script), *arguments), seconds, needs, makes_models)
