"""The pipeline that `trace-opd init` writes for one's own model, problems and annotator."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from .commented import Shared, commented_yaml, plain
from .config_faults import models_in
from .configs import PipelineConfig, ProblemsConfig, RoutingConfig, TrainConfig
from .errors import InputError, quoted
from .settings import load_config
from .template import tag_of

AnnotatorName = Literal["self", "openai", "rule"]

_INSTRUCTION = (
    "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
)
_HINT = "\n\nHint: the difficulty of this problem is of the type {diagnostic_type}."
# The bundled micro policy knows no instruction.
_MICRO = {"student": "{problem}", "teacher": "{problem}\nhint: {diagnostic_type}"}
_FILE = re.compile(r"(?i)\.(parquet|jsonl|ndjson|json|csv|tsv)(\.(gz|bz2|xz|zst))?$|[*?\[]|://")
_GENERATED = ("arithmetic", "word-problems")  # without end
_LOCAL_HOST = re.compile(r"https?://(localhost|127\.|\[::1\])")
_HEAD = """\
# Written by `trace-opd init`: the fields that are most often changed.
#
#   trace-opd pipeline {file} --dry-run    # checks everything; runs nothing, pays nothing
#   trace-opd pipeline {file}
#
# `trace-opd config pipeline` prints every field. A section with &name is repeated by *name.
"""


@dataclass(frozen=True)
class Answers:
    """What the command asks. annotator_model: of an endpoint; max_new_tokens: of a response."""

    name: str
    model: str
    problems: str
    eval_problems: str
    annotator: AnnotatorName
    annotator_model: str | None = None
    annotator_url: str = "https://api.openai.com/v1"
    max_new_tokens: int = 2048


def starter(answers: Answers, file: str) -> str:
    """The pipeline's YAML, commented. file: the name under which it will be run.

    Raises:
        InputError: the answers make no valid config.
    """
    values = _values(answers)
    load_config(PipelineConfig, plain(values))
    return _HEAD.format(file=file) + commented_yaml(PipelineConfig, values)


def source_of(text: str) -> dict[str, str]:
    """The source that a text names: a file, folder, glob or URL; a hub id; a preset of the hub; or
    a kind of problems that needs no further field.

    Raises:
        InputError: it can be none of these.
    """
    alone = list(_kinds_alone())
    if text in alone:
        return {"kind": text}
    if _FILE.search(text) or (text and Path(text).exists()) or text.startswith((".", "/", "~")):
        return {"kind": "files", "path": text}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return {"kind": "hub", "dataset": text}
    if re.fullmatch(r"[\w.-]+", text):
        return {"kind": "hub", "preset": text}
    raise InputError(
        f"problems {quoted(text)}: is no file, and no name of the hub; give a file, a folder, a "
        f"dataset of the hub (owner/name), one of its presets (math-500), or {', '.join(alone)}"
    )


def _kinds_alone() -> Iterator[str]:
    """The kinds of problems that need no further field."""
    for model in models_in(ProblemsConfig.model_fields["source"].annotation):
        name, kind = tag_of(model)
        with suppress(ValidationError):
            model.model_validate({name: kind})
            yield str(kind)


def _values(answers: Answers) -> dict[str, Any]:
    policy = Shared("policy", {"path": answers.model})
    sampler = Shared("sampler", {"engine": "transformers"})
    templates = {"student": _INSTRUCTION, "teacher": _INSTRUCTION + _HINT}
    prompt = Shared("prompt", _MICRO if answers.model == "micro" else templates)
    limit = answers.max_new_tokens
    sampling = Shared("sampling", {"temperature": 1.0, "max_new_tokens": limit})
    defaults = RoutingConfig().model_dump(mode="json")
    routing = {name: defaults[name] for name in ("rule", "alpha", "key", "error")}
    routed = Shared("routing", routing)
    annotator, in_training = _annotators(answers, policy)
    return {
        "name": answers.name,
        "problems": _problems(answers.problems, 320, {}),
        "eval_problems": _problems(answers.eval_problems, 128, {"seed": 1}) | {"split": "test"},
        "rollout": {
            "policy": policy,
            "sampler": sampler,
            "prompt": prompt,
            "sampling": sampling,
            "group_size": 8,
        },
        "annotate": {"annotator": annotator},
        "convert": {"policy": policy, "routing": routed},
        "train": {
            "policy": policy,
            "sampler": sampler,
            "prompt": prompt,
            "offline": {"steps": 20},
            "online": {
                "steps": 80,
                "group_size": 8,
                "sampling": sampling,
                "annotator": in_training,
                "routing": routed,
            },
            "schedule": {"w0": 0.5, "hold_steps": 10, "decay_steps": 30},
            "optim": {"lr": 1e-6},
            "groups_per_step": TrainConfig.model_fields["groups_per_step"].default,
            "micro_batch_tokens": max(16_384, 2 * limit),
        },
        "evaluate": {
            "policy": policy,
            "sampler": sampler,
            "prompt": prompt,
            "sampling": sampling,
            "k": 8,
        },
    }


def _problems(text: str, limit: int, seed: dict[str, int]) -> dict[str, Any]:
    """A section of problems; limit, seed: of generated ones."""
    source = source_of(text)
    if source["kind"] in _GENERATED:
        return {"source": source, "limit": limit, **seed}
    return {"source": source, "limit": None}


def _annotators(answers: Answers, policy: Shared) -> tuple[Any, Any]:
    """Of stage annotate, and of the online steps, where `self` is the current weights."""
    if answers.annotator == "self":
        return {"engine": "self", "policy": policy}, {"engine": "self", "policy": None}
    if answers.annotator == "rule":
        shared = Shared("annotator", {"engine": "rule", "match": "line"})
        return shared, shared
    if answers.annotator_model is None:
        raise InputError(
            "annotator openai: has no model; give --annotator-model, its name at the endpoint"
        )
    url = answers.annotator_url
    fields = {
        "engine": "openai",
        "base_url": url,
        "model": answers.annotator_model,
        "api_key_env": None if _LOCAL_HOST.match(url) else "OPENAI_API_KEY",
        "budget_usd": None,
    }
    shared = Shared("annotator", fields)
    return shared, shared
