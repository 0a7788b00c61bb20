"""What devices can do at most, by their makers' data sheets; a device that is not listed has no figure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak speeds of one device, in TFLOP/s, dense (without structured sparsity), sums in float32.

    Attributes:
        source: the maker's document that says so. Where it gives sparse figures alone, the dense one is half of it.
        float32: in plain float32.
        tf32: float32 on tensor cores, with shortened factors; None where there is none.
        bfloat16: on tensor cores.
        float16: on tensor cores.
    """

    source: str
    float32: float
    tf32: float | None = None
    bfloat16: float | None = None
    float16: float | None = None


_A100 = Peak(source="NVIDIA A100 data sheet, 2021", float32=19.5, tf32=156, bfloat16=312, float16=312)
_HOPPER_SXM = {"float32": 67.0, "tf32": 494.7, "bfloat16": 989.4, "float16": 989.4}
_HOPPER_NVL = {"float32": 60.0, "tf32": 417.5, "bfloat16": 835.5, "float16": 835.5}

PEAKS: Mapping[str, Peak] = {
    r"Tesla V100-SXM2-(16|32)GB": Peak(source="NVIDIA V100 data sheet, 2020", float32=15.7, float16=125),
    r"Tesla V100-PCIE-(16|32)GB": Peak(source="NVIDIA V100 data sheet, 2020", float32=14, float16=112),
    r"Tesla V100S-PCIE-32GB": Peak(source="NVIDIA V100 data sheet, 2020", float32=16.4, float16=130),
    r"Tesla T4": Peak(source="NVIDIA T4 data sheet, 2019", float32=8.1, float16=65),
    r"NVIDIA A100-(SXM4|PCIE)-(40|80)GB": _A100,
    r"NVIDIA A100 80GB PCIe": _A100,
    r"NVIDIA H100 80GB HBM3": Peak(source="NVIDIA H100 architecture white paper, 2022 (SXM5)", **_HOPPER_SXM),
    r"NVIDIA H100 PCIe": Peak(
        source="NVIDIA H100 data sheet, 2022 (PCIe)", float32=51, tf32=378, bfloat16=756.5, float16=756.5
    ),
    r"NVIDIA H100 NVL": Peak(source="NVIDIA H100 data sheet, 2024 (NVL)", **_HOPPER_NVL),
    r"NVIDIA H200": Peak(source="NVIDIA H200 data sheet, 2024 (SXM)", **_HOPPER_SXM),
    r"NVIDIA H200 NVL": Peak(source="NVIDIA H200 data sheet, 2024 (NVL)", **_HOPPER_NVL),
    r"NVIDIA L4": Peak(source="NVIDIA L4 data sheet, 2023", float32=30.3, tf32=60, bfloat16=121, float16=121),
    r"NVIDIA L40S": Peak(
        source="NVIDIA L40S data sheet, 2023", float32=91.6, tf32=183, bfloat16=362.05, float16=362.05
    ),
    r"NVIDIA GeForce RTX 4090": Peak(
        source="NVIDIA Ada architecture white paper, appendix A", float32=82.6, tf32=82.6, bfloat16=165.2, float16=165.2
    ),
    r"NVIDIA B200": Peak(
        source="NVIDIA Blackwell technical brief, 2024 (HGX B200)", float32=80, tf32=1100, bfloat16=2250, float16=2250
    ),
}
"""By the whole name that CUDA gives a device: a laptop's variant, a slice of a GPU or a sibling is another device."""


def peak_flops_per_s(name: str | None, *, precision: str) -> float | None:
    """Return the peak speed of a device in FLOP/s, None where it is not known; never a guess.

    Args:
        name: as `torch.cuda.get_device_name` gives it; None for a CPU, for which no data sheet speaks.
        precision: a field of `Peak`.
    """
    if name is None:
        return None
    found = next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
    tflops = getattr(found, precision, None)
    return None if tflops is None else 1e12 * tflops


def matmul_precision(device: torch.device, *, mixed_precision: str) -> str:
    """Return the field of `Peak` that matrix products run at, with the switches of torch as they are now.

    Args:
        device: of the replica.
        mixed_precision: the setting `precision`.
    """
    if mixed_precision == "no":
        # Not allow_tf32, which raises where a user has set the newer switch.
        return "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
    return {"bf16": "bfloat16", "bf16_parameters": "bfloat16", "fp16": "float16"}[mixed_precision]
