"""The command that trains or measures the bundled policy: python -m trace_opd.pipelines.micro

`make micro` and `make bases` call it.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..trace.policy import load_policy
from .annotators.prompting import load_prompt
from .bundled.demonstrations import Mixture
from .bundled.micro import arithmetic_problems, pretrain
from .models import MICRO
from .study.mechanism import label_effect


def main(
    output: Path = MICRO,
    steps: int = 800,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
    snapshot: Annotated[list[int], typer.Option(help="Steps after which a copy is saved.")] = [],  # noqa: B006  typer copies it
    subtraction: Annotated[float, typer.Option(help="Share of the problems that subtract.")] = 0.0,
    marking: Annotated[float, typer.Option(help="Share of batches that mark responses.")] = 0.0,
    prompt: Annotated[str | None, typer.Option(help="Annotation prompt of the markings.")] = None,
    answer_schema: Annotated[str | None, typer.Option(help="Its answer schema.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure --output instead.")] = False,
) -> None:
    """Train the micro policy, or measure how much a type label changes its teacher."""
    if measure:
        problems = arithmetic_problems(64, seed)
        print(json.dumps(label_effect(load_policy(str(output)), problems, seed), indent=2))
        return
    marked = load_prompt(prompt, answer_schema) if marking else None
    mixture = Mixture(subtraction, marking, marked)
    pretrain(output, steps, batch_size, lr, seed, snapshot, mixture)


if __name__ == "__main__":
    typer.run(main)
