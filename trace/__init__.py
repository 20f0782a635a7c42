"""The method: segmenting, routing, teacher prompt, advantages, losses, schedule, trainer.

The stages in pipelines/ call it. It needs torch, transformers and pyarrow, and no network. To read
the trainer: sequences, packing, fused, losses, schedule, trainer.
"""
