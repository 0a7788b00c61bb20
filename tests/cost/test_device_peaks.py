"""Peak speeds of devices: known ones by their whole name, unknown ones not at all."""

from __future__ import annotations

import re

import pytest
import torch

from dptrain.cost.device_peaks import DEVICES, device_named, device_of, matmul_precision, peak_flops_per_s
from dptrain.errors import ConfigError


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
    """Fewer digits are never slower, and each name that CUDA gives is found by one entry alone."""
    for spec in DEVICES.values():
        assert "NVIDIA" in spec.source
        assert spec.float32 <= (spec.tf32 or spec.float32) <= (spec.bfloat16 or 1e9)
        assert min(spec.memory_gb, spec.memory_gb_per_s, spec.link_gb_per_s) > 0
        assert spec.link_gb_per_s < spec.memory_gb_per_s
    names = [re.sub(r"\(([^|)]*)[^)]*\)", r"\1", spec.cuda_name) for spec in DEVICES.values()]
    assert all(sum(bool(re.fullmatch(spec.cuda_name, name)) for spec in DEVICES.values()) == 1 for name in names)


@pytest.mark.parametrize(
    ("text", "name", "memory_gb", "memory_gb_per_s"),
    [
        ("H100", "H100", 80, 3350),
        ("h100-pcie", "H100-PCIe", 80, 2000),
        ("NVIDIA H200", "H200", 141, 4800),
        ("a100 40gb", "A100-40GB", 40, 1555),
        ("rtx 4090", "RTX4090", 24, 1008),
        ("l4", "L4", 24, 300),
    ],
)
def test_a_device_is_found_by_the_name_that_people_write(text, name, memory_gb, memory_gb_per_s):
    """In any case, with or without dashes, or as CUDA calls it; memory and its bandwidth are of the data sheet."""
    found, spec = device_named(text)
    assert (found, spec.memory_gb, spec.memory_gb_per_s) == (name, memory_gb, memory_gb_per_s)
    assert device_of(text) in (None, name)


def test_an_unknown_name_is_refused_with_the_nearest_and_the_list():
    """Which a slip of the keyboard needs."""
    with pytest.raises(ConfigError, match=r"no device 'H10O' is listed; did you mean H100.*devices: V100, .*L40S"):
        device_named("H10O")


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
