"""Nested state (an optimiser's, generators') in one safetensors file: tensors by path, the rest JSON.

Nothing is pickled: whoever resumes from a checkpoint that came from elsewhere runs no code of it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..schemas.errors import InputError

_TREE = "tree"
_TENSOR = "tensor"  # the one key of a mapping that stands for a tensor


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write dictionaries with text keys, lists, tuples, numbers, texts and tensors.

    Tuples come back as lists, tensors on the CPU; tensors that share memory are written once.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {}

    def described(node: Any, at: str) -> Any:
        if isinstance(node, torch.Tensor):
            kept = node.detach().cpu().contiguous()
            seen = (kept.data_ptr(), kept.shape, kept.dtype) if kept.numel() else at
            name = names.setdefault(seen, at)
            tensors.setdefault(name, kept)
            return {_TENSOR: name}
        if isinstance(node, dict):
            return {key: described(child, f"{at}/{key}") for key, child in node.items()}
        if isinstance(node, list | tuple):
            return [described(child, f"{at}/{index}") for index, child in enumerate(node)]
        return node

    tree = json.dumps(described(state, ""))
    save_file(tensors, path, metadata={_TREE: tree})


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, tensors on the CPU.

    Raises:
        InputError: no such file, or one that `save_state` did not write.
    """
    try:
        with safe_open(path, "pt") as file:
            tree = json.loads(file.metadata()[_TREE])

            def built(node: Any) -> Any:
                if isinstance(node, dict):
                    if node.keys() == {_TENSOR}:
                        return file.get_tensor(node[_TENSOR])
                    return {key: built(child) for key, child in node.items()}
                if isinstance(node, list):
                    return [built(child) for child in node]
                return node

            state = built(tree)
            if not isinstance(state, dict):
                raise TypeError(f"a mapping is expected, not {type(state).__name__}")
            return state
    except (OSError, SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: is no state of a training run ({error}); remove its folder, and the run goes on "
            "from the checkpoint before"
        ) from None
