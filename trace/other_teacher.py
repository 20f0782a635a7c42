"""A teacher of its own weights: `teacher.model`, another model of the policy's vocabulary.

Stage train calls `check_teacher` before anything is loaded and `load_teacher` on every rank;
start.py places the model next to the student.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..schemas.errors import InputError
from .identity import model_revision
from .loading import load_model, load_tokenizer, require_finite
from .lora import load_adapters
from .policy import Policy, vocab_fingerprint, vocab_size
from .ranks import Ranks

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class TeacherFiles:
    """The folder of a model, and that of adapters which are merged into it; None: without."""

    base: str
    adapter: str | None = None


def adapters_base(path: str) -> str | None:
    """The name of the model that a folder's adapters were trained on; None: no folder of adapters.

    Raises:
        InputError: its adapter_config.json names no model.
    """
    file = Path(path) / _ADAPTER
    if not file.is_file() or (Path(path) / "config.json").exists():
        return None
    try:
        base = json.loads(file.read_bytes())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: names no base model ({type(error).__name__}: {error}); give a folder that "
            "peft wrote"
        ) from None
    if not isinstance(base, str) or not base:
        raise InputError(f"{file}: base_model_name_or_path is {base!r:.80}; name the base model")
    return base


def check_teacher(files: TeacherFiles, policy: str, trust_remote_code: bool) -> str:
    """Check that a teacher can teach the policy in a folder; the teacher's identity.

    Raises:
        InputError: another vocabulary, or a file that is missing or damaged.
    """
    own, theirs = (_vocabulary(path, trust_remote_code) for path in (policy, files.base))
    if own != theirs:
        what = "tokens" if own[0] != theirs[0] else f"entries ({theirs[1]} for {own[1]})"
        raise InputError(
            f"teacher.model {files.base}: its vocabulary has other {what} than the policy's, and "
            "the loss compares them one by one; take a teacher of the policy's vocabulary"
        )
    revision = model_revision(files.base, trust_remote_code)
    if files.adapter is None:
        return revision
    return f"{revision}+{model_revision(files.adapter)}"


def _vocabulary(path: str, trust_remote_code: bool) -> tuple[str, int]:
    """The tokens' fingerprint and the number of logits."""
    tokenizer = load_tokenizer(path, trust_remote_code)
    return vocab_fingerprint(tokenizer), vocab_size(path, trust_remote_code)


def load_teacher(
    files: TeacherFiles, policy: Policy, ranks: Ranks, trust_remote_code: bool = False
) -> Any:
    """The teacher's model, frozen, in the policy's compute type; its adapters are merged.

    If the ranks shard models, the first rank's is on the CPU and the others' are on meta, as
    load_policy's; else it is on the policy's device.

    Raises:
        InputError: a model that is missing, damaged, incomplete or not finite; adapters that do not
            fit it.
    """
    dtype = policy.compute_dtype
    sharded = ranks.shards(dtype)
    if sharded and not ranks.first:
        model = load_model(files.base, dtype, trust_remote_code, device_map="meta")
    else:
        model = load_model(files.base, dtype, trust_remote_code)
        require_finite(model, files.base)
        if files.adapter is not None:
            model = load_adapters(model, Path(files.adapter)).merge_and_unload()
            require_finite(model, files.adapter)
    model.requires_grad_(False)
    if not sharded:
        model.to(policy.device)
    return model.eval()
