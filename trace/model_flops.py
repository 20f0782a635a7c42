"""Operations of a step's forward and backward passes, counted from the model's sizes.

trainer.py divides them by seconds and by the GPU's published peak (device_peak.py): model FLOPs
utilisation (MFU; PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .policy import decoder_layers, output_head, transformers_model
from .sequences import TrainingSequence

# Settings of decoders whose tokens do not pass all weights, or whose keys and values have other
# sizes than queries.
_UNCOUNTED = ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank")


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a forward and backward pass: 6 · linear + 6 · head + 3 · causal attention.

    token: of a token in the layers' matrices; 2 a weight forward, 4 backward. Frozen weights, as
    LoRA's base, have no gradient of their own: 2 backward. scored: of a response token in the head,
    counted the same. pair: of a (query, key) pair in one layer's attention. windows: a layer each,
    the most keys of a query; None: all before it.
    """

    token: float
    scored: float
    pair: float
    windows: tuple[int | None, ...]

    def step(self, sequences: Sequence[TrainingSequence]) -> float:
        """Operations that a step on these sequences requires, over all ranks.

        A prompt counts once for the responses of its group. Attention is causal, half a square, as
        the kernels compute it; figures by the PaLM formula count the square. What an implementation
        adds is left out, as the definition of MFU demands: recomputed activations, prompts repeated
        in another micro-batch, the teacher and the reference.
        """
        prompts: dict[str, int] = {}
        tokens = scored = pairs = 0
        for sequence in sequences:
            prompt, response = len(sequence.prompt_ids), len(sequence.token_ids)
            if sequence.group_id not in prompts:
                prompts[sequence.group_id] = prompt
                tokens += prompt
                pairs += self._pairs(prompt)
            tokens += response
            scored += sequence.policy_tokens
            pairs += self._pairs(prompt + response) - self._pairs(prompt)
        return tokens * self.token + scored * self.scored + pairs * self.pair

    def _pairs(self, length: int) -> int:
        """(query, key) pairs of a sequence, over all layers."""
        total = 0
        for window in self.windows:
            full = min(length, window) if window else length
            total += full * (full + 1) // 2 + (length - full) * full
        return total


def model_flops(model: Any) -> ModelFlops | None:
    """The counts of a transformers model or its peft wrapper, sharded or not; None for a mixture of
    experts, latent attention, and configs without a decoder's sizes.

    Adapters without a gradient are the teacher's (lora.py) and not counted.
    """
    config = transformers_model(model).config.get_text_config()
    heads, hidden = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if not heads or not hidden or any(getattr(config, name, None) for name in _UNCOUNTED):
        return None
    layers = decoder_layers(model)
    window = getattr(config, "sliding_window", None)
    # Where a config names no layers' types, a window is that of all.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    head, _ = output_head(model)
    matrices = [
        parameter
        for layer in layers
        for name, parameter in layer.named_parameters()
        if parameter.dim() == 2 and (parameter.requires_grad or ".lora_" not in name)
    ]
    return ModelFlops(
        token=float(sum((6 if p.requires_grad else 4) * p.numel() for p in matrices)),
        scored=float((6 if head.requires_grad else 4) * head.numel()),
        pair=12.0 * heads * (getattr(config, "head_dim", None) or hidden // heads),
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )
