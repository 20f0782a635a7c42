"""The method: segmenting, routing, teacher prompt, advantages, losses, schedule, trainer.

Pure: no network, no Prefect, no OpenAI. Imports torch, transformers and pyarrow alone.
"""
