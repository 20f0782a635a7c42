"""Predicts a step's seconds on each GPU: operations over a throughput. plan_table.py prints them.

Waiting for the verifier, the annotator and the disk is not counted.
"""

from .model_shape import ModelShape
from .plan_setting import Setting


def predict_seconds(where: Setting, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds of a step's parts on each GPU. flops: per second; bandwidth: bytes per second.

    A product takes 2 operations per weight and token; its two gradients 4, its recomputation 2. A
    decoding step takes the longer of reading every weight once for all rows, and computing.
    """
    config, shape, tokens = where.config, where.shape, where.step_tokens
    forward = _forward(shape, where.sequence_tokens)
    passes = (2 if config.lora else 3) + where.recomputed_layers / shape.layers
    head_passes = 2 if config.lora else 3
    seconds = {"training": tokens * (passes * forward + head_passes * 2 * shape.head) / flops}
    if where.taught:
        share = config.online.routing.alpha if config.online.routing.rule != "all" else 1.0
        # At most: the teacher stops at a response's last routed token.
        asked = where.teacher or shape
        one = tokens * (_forward(asked, where.sequence_tokens) + share * 2 * asked.head) / flops
        seconds["teacher, while λ > 0"] = one
        if config.online.routing.contrast_context is not None:
            seconds["contrast, while λ > 0"] = config.online.routing.contrasts * one
    if config.loss.reference_kl:
        seconds["reference"] = tokens * (forward + 2 * shape.head) / flops
    if config.online.steps:
        responses = config.groups_per_step * config.online.group_size / where.gpus
        rows = where.rows_at_once
        weights = where.computed * (shape.linear + shape.head)
        one = max(weights / bandwidth, rows * (forward + 2 * shape.head) / flops)
        seconds["sampling"] = responses / rows * where.response_tokens * one
    return seconds


def _forward(shape: ModelShape, tokens: int) -> int:
    """Operations per token of a sequence, without the head."""
    # Scores and mixing, over half of the sequence on average.
    return 2 * shape.linear + 2 * shape.layers * shape.queries * tokens
