"""A model's sizes from its config alone, without weights; the training plan calls it."""

from dataclasses import dataclass

import torch

from ...schemas.configs import LoraConfig
from ...schemas.errors import InputError
from ...trace.loading import load_config, model_on_meta
from ...trace.lora import add_adapters
from ...trace.policy import backbone, output_head


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder with a gated MLP (Llama, Qwen and similar).

    parameters: number of weights, tied ones once, without adapters. trainable: those with
    gradients.
    linear: weights of the matrices that each token is multiplied by, without the head. ends:
    weights outside the layers (embeddings, head, norm). stored_bytes: of a weight in the model's
    files.
    """

    parameters: int
    trainable: int
    linear: int
    ends: int
    stored_bytes: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_dim: int
    vocab: int
    tied: bool
    normalises_queries: bool

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_dim

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def layer(self) -> int:
        """Weights of one layer, without adapters."""
        return (self.parameters - self.ends) // self.layers


def model_shape(
    path: str, lora: LoraConfig | None = None, trust_remote_code: bool = False
) -> ModelShape:
    """The shape of the model at a path (folder or hub id) from its config.json.

    Raises:
        InputError: no config, or an architecture without the sizes of a decoder.
    """
    config = load_config(path, trust_remote_code)
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    if missing := [name for name in sizes if getattr(config, name, None) is None]:
        raise InputError(
            f"policy {path}: its config has no {missing[0]}; the plan knows decoders with a gated "
            "MLP (Llama, Qwen and their kin) only"
        )
    stored = config.dtype or torch.float32  # of the files; the next line sets another
    model = model_on_meta(config, trust_remote_code)
    with torch.device("meta"):
        layers = backbone(model).get_submodule("layers")
        linear = sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        normalises = any(name.endswith("q_norm.weight") for name, _ in layers.named_parameters())
        parameters = sum(p.numel() for p in model.parameters())
        ends = parameters - sum(p.numel() for p in layers.parameters())
        tied = output_head(model)[0] is model.get_input_embeddings().weight
        if lora is not None:
            model = add_adapters(model, lora)
    heads = config.num_attention_heads
    return ModelShape(
        parameters=parameters,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        linear=linear,
        ends=ends,
        stored_bytes=stored.itemsize,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied=tied,
        normalises_queries=normalises,
    )
