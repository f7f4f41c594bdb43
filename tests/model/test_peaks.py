from __future__ import annotations

import pytest
import torch

from bfsys.model.peaks import data_sheet_peak, peak_of


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756.5, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA GH200 144G HBM3e", 989.5, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362.05, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("Tesla V100-SXM2-32GB", None, 15.7),
        ("Tesla V100-PCIE-16GB", None, 14),
        ("AMD Instinct MI300X", 1307.4, 163.4),
    ],
)
def test_names_as_pytorch_gives_them(name: str, bf16: float | None, fp32: float) -> None:
    assert peak_of(name, torch.bfloat16) == (None if bf16 is None else pytest.approx(1e12 * bf16))
    assert peak_of(name, torch.float32) == pytest.approx(1e12 * fp32)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10-8Q",
        "NVIDIA A10G",
        "NVIDIA T4",
        "",
    ],
)
def test_devices_that_are_not_in_the_table_have_no_peak(name: str) -> None:
    assert peak_of(name, torch.bfloat16) is None
    assert peak_of(name, torch.float32) is None


def test_a_cpu_has_no_data_sheet_peak() -> None:
    assert data_sheet_peak(torch.device("cpu"), torch.float32) is None
