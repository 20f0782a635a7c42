"""Published peaks of GPUs in dense bfloat16 products, by which model FLOPs utilisation divides.

trainer.py looks its device up; benchmarks do too.
"""

import re

import torch

# TFLOP/s of the tensor cores in bfloat16 with float32 sums, without sparsity, by the card's name as
# CUDA reports it. Where a datasheet gives the figure with 2:4 sparsity alone, half of it. A name
# must match as a whole: laptop chips, MIG slices and export variants have other peaks.
_TFLOPS = (
    # NVIDIA HGX B200 and GB200 NVL72 datasheets: 4.5 and 5 PFLOPS with sparsity.
    (r"NVIDIA B200", 2250.0),
    (r"NVIDIA GB200", 2500.0),
    # NVIDIA H100, H200 and GH200 datasheets: 1,979 with sparsity; H100 PCIe 1,513; H100 NVL and
    # H200 NVL 1,671. H800 SXM is the same chip with a slower NVLink. H20 datasheet: 148.
    (r"NVIDIA H100( SXM5)?( \d+GB)?( HBM\w+)?|NVIDIA H800|NVIDIA H200", 989.4),
    (r"NVIDIA GH200 \w+( HBM\w+)?", 989.4),
    (r"NVIDIA H100 PCIe", 756.5),
    (r"NVIDIA H100 NVL|NVIDIA H200 NVL", 835.5),
    (r"NVIDIA H20", 148.0),
    # NVIDIA A100, A30, A40, A10 and A10G datasheets.
    (r"NVIDIA A[18]00[- ].*GB( PCIe)?", 312.0),
    (r"NVIDIA A30", 165.0),
    (r"NVIDIA A40", 149.7),
    (r"NVIDIA A10", 125.0),
    (r"NVIDIA A10G", 70.0),
    # NVIDIA L4, L40 and L40S datasheets: 242, 362.1 and 733 with sparsity.
    (r"NVIDIA L4", 121.0),
    (r"NVIDIA L40", 181.0),
    (r"NVIDIA L40S", 362.0),
    # NVIDIA's architecture whitepapers: Ampere GA102, Ada, RTX Blackwell ("FP32 accumulate").
    (r"NVIDIA GeForce RTX 3090", 71.0),
    (r"NVIDIA GeForce RTX 4090", 165.2),
    (r"NVIDIA GeForce RTX 5090", 209.5),
    # AMD Instinct datasheets.
    (r"AMD Instinct MI300X( .*)?|AMD Instinct MI325X( .*)?", 1307.4),
)


def published_peak(name: str) -> float | None:
    """FLOP/s of a card in dense bfloat16 products; None: unknown.

    name: as `torch.cuda.get_device_name` gives it.
    """
    for pattern, tflops in _TFLOPS:
        if re.fullmatch(pattern, name):
            return tflops * 1e12
    return None


def device_peak(device: torch.device) -> float | None:
    """`published_peak` of a device; None on the CPU."""
    return published_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
