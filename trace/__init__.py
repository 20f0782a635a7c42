"""The method: segmenting, routing, teacher prompt, advantages, losses, schedule, trainer.

The stages in pipelines/ call it. It needs torch, transformers and pyarrow, and no network. To read
the trainer: sequences, packing, fused, losses, schedule, trainer.
"""

import logging

# transformers imports torchao where it is installed, which then warns of each CUDA library that it
# cannot load, and of its own calls of PyTorch.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
