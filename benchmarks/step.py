"""Seconds and memory of one optimiser step: our GRPO and TRACE, plain transformers, TRL's GRPO.

    make bench-step
    python benchmarks/step.py --shape qwen3-1.7b --lengths 8x2048,1x16384

One model, the same rollouts, AdamW, float32 on CPU (on CUDA float32 weights computed in bfloat16).
TRACE runs with λ at full weight and α = 25 % of every response routed, FKL in correct responses and
RKL in wrong ones; `--error none` leaves wrong responses to GRPO (TRACE-FKL). `ours_rlsd` reweights
all tokens by a teacher that reads a correct response of the group, `ours_rlcsd` compares it with
one that reads a wrong response: the difference is what one more context costs.

Without --lengths a bundled model samples the rollouts, and steps are measured without generation
and with it, by each trainer's own sampler over transformers; those rollouts differ, so the table
has their tokens. With --lengths the weights are random numbers of the shape (shapes.py) and the
rollouts random ids; several lengths are measured one after another. A row may have overrides:
`ours_trace:gradient_checkpointing=true,loss.backend=torch` of TrainConfig,
`plain:gradient_checkpointing=true` for a peer. TRL is left out if it is not installed, and where a
group has one response; pip install 'trace-opd[peers]'.

Each implementation is a process. On CPU they take turns, so that drift of the machine affects all;
on CUDA they follow one another, and a repetition more than counts warms each size up. A warm-up on
shortened responses runs first: gradient norms of GRPO must agree with each other, and those of
TRACE. All cut the batch into micro-batches of about as many tokens. Seconds are the median of the
repetitions. Memory is their maximum: a step's peak beyond what the process holds before it
(weights, optimiser states, the teacher's weights: `resident_mib`), from the resident set's
high-water mark on CPU (Linux), the allocator's on CUDA. `predicted_mib` is what `trace-opd plan`
expects of the sum. MFU is trace/model_flops.py's, where the card's peak is published. Prints a
table and the time of the teacher's forward passes alone, and writes benchmarks/results/step.json,
which keeps the rows of other devices and shapes. A row that fails has nulls and a note.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from machine import cuda_here, peak_of, processor, stamp
from results import append, console, write_rows
from shapes import NAMES, lengths_of, shape_of
from step_measure import measure, prepare
from step_table import contrasts_share, rows_of, table_of, teachers_share

IMPLEMENTATIONS = ("ours_grpo", "ours_trace", "ours_rlsd", "ours_rlcsd", "plain", "trl_grpo")
SAMPLED_MODELS = ("smollm2", "micro")
# micro_batch_tokens of sampled rollouts on CPU, and of all others.
FEW_TOKENS, MANY_TOKENS = 384, 16_384


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of one optimiser step.")
    on_cuda = cuda_here()
    parser.add_argument("--shape", default="smollm2", help=f"a config.json, or {', '.join(NAMES)}")
    parser.add_argument("--lengths", help="responses x tokens of each, a list; random ids")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_cuda else "cpu")
    parser.add_argument(
        "--implementations", nargs="+", default=IMPLEMENTATIONS, help="names, with overrides"
    )
    parser.add_argument("--groups", type=int, default=2, help="of sampled rollouts")
    parser.add_argument("--group-size", type=int, default=8, help="most responses of a group")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of sampled rollouts")
    parser.add_argument("--error", choices=["rkl", "fkl", "none"], default="rkl")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int)
    parser.add_argument("--models", help="folder of random models; each is written once")
    parser.add_argument("--log", type=Path, help="add the rows to this file instead")
    options = parser.parse_args()
    names = list(options.implementations)
    if unknown := [n for n in names if n.partition(":")[0] not in IMPLEMENTATIONS]:
        parser.error(f"no such implementation: {', '.join(unknown)}")
    try:
        shape_of(options.shape)
        sizes = [lengths_of(text) for text in (options.lengths or "").split(",") if text]
    except ValueError as error:
        parser.error(str(error))
    if not sizes and options.shape not in SAMPLED_MODELS:
        parser.error(f"--lengths: give them, as only {' and '.join(SAMPLED_MODELS)} can sample")
    device = options.device
    tokens = options.micro_batch_tokens
    tokens = tokens or (MANY_TOKENS if sizes or device == "cuda" else FEW_TOKENS)

    out, rows = console(), []
    with TemporaryDirectory(prefix="trace-opd-") as folder:
        with out.status("making the batch"):
            batches = prepare(options, sizes, options.models or folder)
        for batch in batches:
            out.print(batch.description, highlight=False)
        for name, samples in measure(names, batches, device, tokens, options.repetitions):
            found = rows_of(name, samples, batches, options.shape, device)
            for row in found:
                if "note" in row:
                    out.print(f"{name}, {row['lengths']}: {row['note']}", markup=False)
            if options.log:
                append(options.log, [stamp(device) | {"part": "step"} | row for row in found])
            rows += found
    peak = peak_of(stamp(device)["card"])
    out.print(table_of(rows, f"{processor(device)}; {options.shape}", peak))
    for line in (*teachers_share(rows), *contrasts_share(rows)):
        out.print(line, highlight=False)
    if not options.log:
        write_rows("step.json", rows, same=("device", "shape"))


if __name__ == "__main__":
    main()
