"""The command that makes or measures the bundled policy: python -m trace_opd.pipelines.micro

`make micro` and `make bases` call it; `--measure` prints how much a type label changes the teacher.
"""

import argparse
import json
from pathlib import Path

from ..trace.policy import load_policy
from .annotators.prompting import load_prompt
from .bundled.demonstrations import Mixture
from .bundled.micro import arithmetic_problems, pretrain
from .models import MICRO
from .study.mechanism import label_effect


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or measure the micro policy.")
    parser.add_argument("--output", type=Path, default=MICRO)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--snapshots", type=int, nargs="*", default=[], help="steps after which a copy is kept"
    )
    parser.add_argument(
        "--subtraction", type=float, default=0.0, help="share of the problems that subtract"
    )
    parser.add_argument(
        "--marking", type=float, default=0.0, help="share of the batches that mark responses"
    )
    parser.add_argument("--prompt", help="annotation prompt of the markings")
    parser.add_argument("--answer-schema", help="its answer schema")
    parser.add_argument(
        "--measure", action="store_true", help="measure the model in --output instead of training"
    )
    args = parser.parse_args()
    if args.measure:
        policy = load_policy(str(args.output))
        figures = label_effect(policy, arithmetic_problems(64, args.seed), args.seed)
        print(json.dumps(figures, indent=2))
    else:
        prompt = load_prompt(args.prompt, args.answer_schema) if args.marking else None
        mixture = Mixture(args.subtraction, args.marking, prompt)
        pretrain(
            args.output,
            args.steps,
            args.batch_size,
            args.lr,
            args.seed,
            args.snapshots,
            mixture,
        )


if __name__ == "__main__":
    main()
