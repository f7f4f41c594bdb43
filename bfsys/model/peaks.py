"""Peak speeds from data sheets: operations per second of dense matrix products, by the name of the GPU.

A utilisation (MFU) refers to this peak, so that runs on one type of GPU can be compared. There is no peak for a device
that is not in the table, for a part of a GPU (MIG, vGPU), or for a variant of another speed ("Laptop GPU", "Ti").

H100, H200, A100, A10, A40, V100 and B200 were compared with public tables. L4, L40, L40S, A30, RTX 3090 and 4090, GH200
and the float32 figures of the NVL cards have not been compared with their data sheets yet.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Peak(NamedTuple):
    """TFLOP/s of a GPU, without sparsity."""

    bf16: float | None
    """The peak in bfloat16 with float32 sums; None if the GPU has no such instruction."""
    fp32: float
    """The peak in float32 itself, not TF32: PyTorch's default, which bfsys keeps."""


# By words of PyTorch's name of the GPU; the first entry whose words all occur in it is used. Rates of data sheets that
# state only the rate with sparsity are halved.
PEAKS = {
    # nvidia.com/en-us/data-center/gb200-nvl72 and /hgx: 5 and 4.5 PFLOP/s with sparsity
    "GB200": Peak(2500, 80),
    "B200": Peak(2250, 75),
    # nvidia.com/en-us/data-center/h200: 1,979 (SXM) and 1,671 (NVL) with sparsity
    "H200 NVL": Peak(835.5, 60),
    "H200": Peak(989.5, 67),
    # nvidia.com/en-us/data-center/grace-hopper-superchip: the GPU of an H100 SXM
    "GH200": Peak(989.5, 67),
    # nvidia.com/en-us/data-center/h100: 1,979 (SXM), 1,671 (NVL) and, in the first edition, 1,513 (PCIe) with sparsity
    "H100 NVL": Peak(835.5, 60),
    "H100 PCIE": Peak(756.5, 51),
    "H100": Peak(989.5, 67),
    # NVIDIA's A100 data sheet (nvidia-1758950), the same for SXM and PCIe
    "A100": Peak(312, 19.5),
    # NVIDIA's data sheets of A30, A40 and A10
    "A30": Peak(165, 10.3),
    "A40": Peak(149.7, 37.4),
    "A10": Peak(125, 31.2),
    # NVIDIA's data sheets: L4 242 with sparsity, L40 181.05, L40S 362.05
    "L4": Peak(121, 30.3),
    "L40": Peak(181.05, 90.5),
    "L40S": Peak(362.05, 91.6),
    # NVIDIA's white papers of the Ada (AD102, 2023) and Ampere (GA102, 2021) architectures, with float32 sums
    "RTX 4090": Peak(165.2, 82.6),
    "RTX 3090": Peak(71, 35.6),
    # NVIDIA's V100 data sheet (1165301): float16 products only
    "V100 PCIE": Peak(None, 14),
    "V100 SXM2": Peak(None, 15.7),
    # amd.com: Instinct MI300X data sheet
    "MI300X": Peak(1307.4, 163.4),
}
# Other words of a name, as in NVIDIA A100-SXM4-80GB and NVIDIA H100 80GB HBM3.
OTHER_WORDS = re.compile(r"NVIDIA|AMD|TESLA|GEFORCE|INSTINCT|SXM\d*|PCIE|HBM\d\w*|\d+GB?")


def data_sheet_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a device in bfloat16 or float32; None if the table has no entry."""
    import torch

    return peak_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the GPU of that name in bfloat16 or float32; None if the table has no entry."""
    import torch

    words = set(name.upper().replace("-", " ").split())
    for known, peak in PEAKS.items():
        others = words - set(known.split())
        if words.issuperset(known.split()) and all(map(OTHER_WORDS.fullmatch, others)):
            tflops = peak.bf16 if dtype == torch.bfloat16 else peak.fp32
            return None if tflops is None else 1e12 * tflops
    return None
