"""Loading a model folder: every file is checked, and missing weights are an error.

policy.py and the samplers load models, tokenizers and configs here; engines that load a folder
themselves call `check_model` first. transformers, tokenizers and safetensors raise errors of any
type on a damaged folder; each becomes one sentence with the file's name.
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..schemas.errors import InputError
from .identity import CHAT_TEMPLATES

# Optional files, each with one JSON object.
_OBJECTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
_BYTE_LEVEL = re.compile(rb'"type"\s*:\s*"ByteLevel"')
_CHUNK = 1 << 24  # numbers
_NAMED = 3  # tensors in an error


def load_model(
    path: str, dtype: torch.dtype | str, trust_remote_code: bool = False, **options: Any
) -> Any:
    """A causal language model with exactly the folder's weights.

    Raises:
        InputError: a damaged file, its own code, or tensors that are missing, unexpected or of
            another shape (transformers would initialise them at random).
    """
    check_files(path)
    if (Path(path) / "adapter_config.json").exists():
        # transformers applies them if peft is installed, vLLM never does.
        raise InputError(
            f"policy {path}: holds adapters next to the weights (adapter_config.json); merge "
            "them with "
            "peft's merge_and_unload, or move them to another folder"
        )
    with _errors(path, "config.json or its weights"), _quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the loading info lists them by name
            **options,
        )
    model, info = loaded
    require_complete(info, path)
    return model


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        InputError: there is none, or it needs its own code.
    """
    check_files(path)
    with _errors(path, "tokenizer.json or tokenizer_config.json"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        # transformers makes any vocabulary of the class LlamaTokenizer a SentencePiece one, also
        # the byte-level one of DeepSeek's Llama: prompts and texts lose their spaces.
        file, backend = Path(path) / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
        read_otherwise = backend is not None and "ByteLevel" not in repr(backend.decoder)
        if read_otherwise and file.exists() and _BYTE_LEVEL.search(file.read_bytes()):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        return tokenizer


def load_config(path: str, trust_remote_code: bool = False) -> Any:
    """The transformers config of a folder.

    Raises:
        InputError: there is none, or its architecture is unknown.
    """
    check_files(path)
    with _errors(path, "config.json"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def check_model(path: str, trust_remote_code: bool = False) -> None:
    """Check a folder like `load_model` and `require_finite`, for an engine that loads it itself.

    The engine has to check the tensor names of quantised models, and of architectures that are no
    causal language model in transformers.
    """
    config = load_config(path, trust_remote_code)
    quantised = getattr(config, "quantization_config", None) is not None
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not quantised:
        load_model(path, "auto", trust_remote_code, device_map="meta")
    for file in sorted(Path(path).glob("*.safetensors")):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                _require_finite(tensors.get_tensor(name), name, path)


def model_on_meta(config: Any, trust_remote_code: bool = False) -> Any:
    """The model of a config, without weights.

    Raises:
        InputError: no model can be made from the config.
    """
    with _errors(config.name_or_path, "config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )


def require_complete(info: dict[str, Any], path: str) -> None:
    """Check transformers' loading info, which omits tied tensors and those declared ignorable.

    Raises:
        InputError: a tensor is missing, unexpected or of another shape.
    """
    shapes = [
        f"{name} {tuple(found)} for {tuple(made)}" for name, found, made in info["mismatched_keys"]
    ]
    for what, names in (
        ("lack", info["missing_keys"]),
        ("hold other shapes than config.json:", shapes),
        ("hold tensors that its architecture does not know:", info["unexpected_keys"]),
    ):
        if names:
            shown = ", ".join(sorted(names)[:_NAMED])
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise InputError(
                f"policy {path}: its weights {what} {shown}{more}; give the config.json and the "
                "safetensors of one model"
            )


def require_finite(model: Any, path: str) -> None:
    """Raises InputError if a weight is NaN or infinite; names the tensor."""
    for name, tensor in model.state_dict().items():
        _require_finite(tensor, name, path)


def check_files(path: str) -> None:
    """Check a model folder's files without reading its weights.

    Raises:
        InputError: a JSON file without an object, a chat template that is not text, invalid
            end-of-text ids, weights without a valid header.
    """
    folder = Path(path)
    objects = {name: _json_object(folder / name) for name in _OBJECTS if (folder / name).is_file()}
    ends = objects.get("generation_config.json", {}).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [0 if ends is None else ends]
    if not all(type(end) is int and end >= 0 for end in listed):
        raise InputError(
            f"{folder / 'generation_config.json'}: eos_token_id is {ends!r:.80}; set it to a "
            "token id or a list of them"
        )
    for template in [*folder.glob("*.jinja"), *folder.glob(f"{CHAT_TEMPLATES}/*.jinja")]:
        try:
            template.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{template}: is no UTF-8 text ({error}); mend or remove it") from None
    for file in folder.glob("*.safetensors"):
        with _opened(file):
            pass


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
    else:
        if isinstance(found, dict):
            return found
        reason = f"it holds {type(found).__name__}"
    raise InputError(f"{file}: is no JSON object ({reason:.120}); download the model again")


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file, which reads its header.

    Raises:
        InputError: the file is truncated or damaged.
    """
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{file}: is no complete safetensors file ({error}); download the model again"
        ) from None


def _require_finite(tensor: torch.Tensor, name: str, path: str) -> None:
    if not tensor.is_floating_point():
        return
    for chunk in tensor.detach().flatten().split(_CHUNK):
        chunk = chunk.float() if chunk.element_size() == 1 else chunk
        # NaN and infinity survive a sum, which is many times faster than isfinite on the CPU. If
        # the sum overflows, each number is checked.
        if not chunk.sum(dtype=torch.float32).isfinite() and not chunk.isfinite().all():
            raise InputError(
                f"policy {path}: tensor {name} holds NaN or infinity; take another checkpoint, or "
                "download the model again"
            )


@contextmanager
def _errors(path: str, files: str) -> Iterator[None]:
    """Turn any error that a library raises on a folder into one sentence; files: what it read."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic in tokenizers' Rust code is a BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            raise InputError(
                f"policy {path}: needs Python code that comes with it; read that code, then set "
                "policy.trust_remote_code=true to run it"
            ) from None
        reason = " ".join(str(error).split())
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise InputError(
            f"policy {path}: {files} cannot be loaded ({reason:.160}); give a folder with "
            "config.json, safetensors and tokenizer.json, a hub id, micro or smollm2"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' table of tensors; `require_complete` reports them in one sentence."""
    logger = logging.getLogger("transformers.modeling_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
