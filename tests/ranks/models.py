"""Qwen3 models of random weights and any size, in folders, with the micro policy's tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trace_opd.pipelines.models import MICRO


def save_qwen3(folder: Path, dtype: torch.dtype = torch.float32, **sizes: Any) -> Qwen3ForCausalLM:
    """Write a model of these sizes (Qwen3Config's fields), always with the same weights."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**sizes)).to(dtype)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MICRO / file, folder)
    return model
