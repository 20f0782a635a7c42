"""Shapes of models, by name or config.json, and model folders of a shape with random weights.

Nothing is downloaded: Qwen3's shapes ship with the plan. A folder has micro's tokenizer, with a
made-up token for each further id of the shape's vocabulary.
"""

import json
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MICRO = ROOT / "data" / "micro"
SHIPPED = ROOT / "pipelines" / "training" / "shapes" / "Qwen"
SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 2,
}
NAMES = (
    "micro", "smollm2", "tiny", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b",
    "qwen3-8b-12-layers",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """name: as given. config: the contents of its config.json."""

    name: str
    config: dict[str, Any]

    @property
    def hidden(self) -> int:
        return self.config["hidden_size"]

    @property
    def vocab(self) -> int:
        return self.config["vocab_size"]

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]


def shape_of(name: str) -> Shape:
    """A shape by one of NAMES, or the path of a config.json or of its folder.

    Raises:
        ValueError: neither.
    """
    if name == "smollm2":
        return Shape(name, SMOLLM2)
    if name == "tiny":
        return Shape(name, _read(MICRO) | TINY)
    if name in NAMES:
        base, _, layers = name.removesuffix("-layers").partition("8b-")
        folder = MICRO if name == "micro" else SHIPPED / (base + "8b" * bool(layers)).title()
        given = {"num_hidden_layers": int(layers)} if layers else {}
        return Shape(name, _read(folder) | given)
    path = Path(name)
    if not (path / "config.json" if path.is_dir() else path).is_file():
        raise ValueError(f"shape {name}: is no file; give a config.json, or {', '.join(NAMES)}")
    return Shape(name, _read(path))


def lengths_of(text: str) -> tuple[int, int]:
    """Number of responses and tokens of each, from `8x2048`.

    Raises:
        ValueError: another form, or a zero.
    """
    count, _, tokens = text.partition("x")
    if not (count.isdigit() and tokens.isdigit() and int(count) and int(tokens)):
        raise ValueError(f"lengths {text}: give responses x tokens, such as 8x2048")
    return int(count), int(tokens)


def random_model(shape: Shape, folder: str) -> str:
    """A model folder with config, tokenizer and random weights, in `folder`.

    The same weights each time on a device. Written once: a folder that is there is taken.
    """
    text = json.dumps(shape.config)
    target = Path(folder) / f"{Path(shape.name).stem}-{zlib.crc32(text.encode()):08x}"
    if not target.exists():
        draft = Path(tempfile.mkdtemp(dir=folder))
        (draft / "config.json").write_text(text)
        _write_tokenizer(shape.vocab, draft)
        _write_weights(draft)
        draft.rename(target)
    return str(target)


def _write_weights(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()  # other processes need the memory


def _write_tokenizer(vocab: int, target: Path) -> None:
    for file in (*MICRO.glob("tokenizer*.json"), *MICRO.glob("*.jinja")):
        shutil.copy(file, target)
    spec = json.loads((target / "tokenizer.json").read_text())
    known = spec["model"]["vocab"]
    known |= {f"w{index} ": index for index in range(len(known), vocab)}
    (target / "tokenizer.json").write_text(json.dumps(spec))


def _read(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json" if path.is_dir() else path).read_text())
