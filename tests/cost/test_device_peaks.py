"""Peak speeds of devices: known ones by their whole name, unknown ones not at all."""

from __future__ import annotations

import re

import pytest
import torch

from dptrain.cost.device_peaks import PEAKS, matmul_precision, peak_flops_per_s


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "float32", 67),
        ("Tesla V100-SXM2-32GB", "float16", 125),
        ("Tesla T4", "float32", 8.1),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
    ],
)
def test_a_known_device_has_the_figure_of_its_data_sheet(name, precision, tflops):
    """Dense, in FLOP/s."""
    assert peak_flops_per_s(name, precision=precision) == pytest.approx(1e12 * tflops)


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA L40",
        "NVIDIA H100",
        "AMD Instinct MI300X",
    ],
)
def test_an_unknown_device_has_no_figure(name):
    """A relative of a known one is unknown: a wrong peak would make a wrong utilisation."""
    assert peak_flops_per_s(name, precision="float32") is None


def test_a_precision_that_a_device_lacks_has_no_figure():
    """A V100 has no bfloat16."""
    assert peak_flops_per_s("Tesla V100-SXM2-16GB", precision="bfloat16") is None


def test_each_entry_names_its_source_and_is_in_order():
    """Fewer digits are never slower, and each name is found by one entry alone."""
    for peak in PEAKS.values():
        assert "NVIDIA" in peak.source
        assert peak.float32 <= (peak.tf32 or peak.float32) <= (peak.bfloat16 or 1e9)
    names = [re.sub(r"[\[(](\w+)[^)\]]*[)\]]", r"\1", pattern) for pattern in PEAKS]
    assert all(sum(bool(re.fullmatch(pattern, name)) for pattern in PEAKS) == 1 for name in names)


def test_the_precision_of_products_is_what_runs():
    """On a CPU there is no tf32; mixed precision is what accelerate was set to."""
    cpu = torch.device("cpu")
    assert matmul_precision(cpu, mixed_precision="no") == "float32"
    assert matmul_precision(cpu, mixed_precision="bf16") == "bfloat16"
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert matmul_precision(torch.device("cuda", 0), mixed_precision="no") == "tf32"
        assert matmul_precision(cpu, mixed_precision="no") == "float32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
