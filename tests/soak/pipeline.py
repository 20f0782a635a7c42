"""The commands of a variant, and its undisturbed run, the reference for disturbed runs. Used by
run.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from trace_opd.data.store import Store
from trace_opd.pipelines.stages import REGISTRY
from trace_opd.tests.kill.harness import CONFIG, Launcher
from trace_opd.tests.soak import invariants
from trace_opd.tests.soak.answers import MAX_NEW_TOKENS, PATIENCE_S, TIMEOUT_S, USD_PER_MILLION
from trace_opd.tests.soak.endpoint import Endpoint
from trace_opd.tests.soak.schedule import STAGES, Variant


def commands(variant: Variant, url: str, budget_usd: float | None = None) -> dict[str, list[str]]:
    """The arguments of `trace-opd` by stage. One worker and one thread each; run.py says why."""
    annotate = ["annotate", CONFIG]
    if variant.engine == "openai":
        prompt, completion = USD_PER_MILLION
        annotate = [
            "annotate", "annotator.engine=openai", f"annotator.base_url={url}",
            "annotator.model=m", "annotator.api_key_env=null",
            f"annotator.max_new_tokens={MAX_NEW_TOKENS}",
            f"annotator.concurrency={variant.concurrency}",
            f"annotator.max_attempts={variant.max_attempts}",
            f"annotator.timeout_s={TIMEOUT_S}", f"annotator.patience_s={PATIENCE_S}",
            f"annotator.usd_per_million_prompt_tokens={prompt}",
            f"annotator.usd_per_million_completion_tokens={completion}",
        ]  # fmt: skip
        if budget_usd is not None:
            annotate.append(f"annotator.budget_usd={budget_usd:.6f}")
    return {
        "problems": [
            "problems", CONFIG, f"limit={variant.limit}", f"rows_per_part={variant.rows_per_part}",
        ],
        "rollout": ["rollout", CONFIG, f"group_size={variant.group_size}"],
        "verify": ["verify", CONFIG, "workers=1"],
        "select": ["select", CONFIG, "mixed=false"],
        "annotate": annotate,
        "convert": ["convert", CONFIG],
        "train": [
            "train", CONFIG, "offline.steps=1", "online.steps=2", "online.group_size=2",
            "groups_per_step=2", "schedule.hold_steps=2", "schedule.decay_steps=1",
            "checkpoint_every=1", f"tracker={variant.tracker}",
        ],
        "evaluate": ["evaluate", CONFIG, "trained=train", "k=1", "bootstrap=100"],
    }  # fmt: skip


@dataclass(frozen=True)
class Baseline:
    """An undisturbed run's results.

    refs: each stage's dataset. counts: by stage, changes of files as the launcher counts them
    ("files") and calls as shim.c counts them ("changes", "reads"). bill_usd: the annotation's
    price.
    """

    root: Path
    refs: dict[str, str]
    counts: dict[str, dict[str, int]]
    bill_usd: float


def undisturbed(runs: Launcher, endpoint: Endpoint, variant: Variant, root: Path) -> Baseline:
    """Run a variant's pipeline. Raises Broken if an invariant fails even without disturbance."""
    root.mkdir(parents=True)
    endpoint.begin("undisturbed", variant.lies)
    counts: dict[str, dict[str, int]] = {}
    for stage, args in commands(variant, endpoint.url).items():
        run = runs.start(*args, store=root)
        invariants.ended_with(run, args, (0,))
        ops = Path(run.output[0]).with_suffix(".ops")
        calls = json.loads(ops.read_text()) if ops.exists() else {"changes": 0, "reads": 0}
        counts[stage] = {"files": run.changes} | calls
    invariants.not_paid_again((), endpoint.log)
    invariants.not_lost(root, endpoint.log)
    aliases = Store(root).aliases()
    refs = {stage: aliases[REGISTRY[stage].alias] for stage in STAGES}
    return Baseline(root, refs, counts, sum(request.usd for request in endpoint.log))
