"""What devices can do at most, by their makers' data sheets; a device that is not listed has no figure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

import torch

from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """What one device can do at most. Speeds are in TFLOP/s, dense (without structured sparsity), sums in float32.

    Attributes:
        source: the maker's document that says so. Where it gives sparse figures alone, the dense one is half of it.
        cuda_name: pattern of the whole name that CUDA gives it: a laptop's variant, a slice of a GPU or a sibling is
            another device.
        float32: in plain float32.
        tf32: float32 on tensor cores, with shortened factors; None where there is none.
        bfloat16: on tensor cores.
        float16: on tensor cores.
        memory_gb: of the device, in 10⁹ bytes as data sheets count them.
        memory_gb_per_s: bandwidth of that memory.
        link_gb_per_s: from one device to others of its host, in one direction: NVLink where all of a host have it,
            else the PCIe slot. Data sheets print the sum of both directions.
    """

    source: str
    cuda_name: str
    float32: float
    tf32: float | None = None
    bfloat16: float | None = None
    float16: float | None = None
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float

    def flops_per_s(self, precision: str) -> float | None:
        """Return the peak in FLOP/s at a precision, a field of this class; None where the device has none such."""
        tflops: float | None = getattr(self, precision)
        return None if tflops is None else 1e12 * tflops


_V100 = {"source": "NVIDIA V100 data sheet, 2020", "memory_gb_per_s": 900.0}
_A100 = {"source": "NVIDIA A100 data sheet, 2021", "float32": 19.5, "tf32": 156.0, "bfloat16": 312.0, "float16": 312.0}
_HOPPER_SXM = {"float32": 67.0, "tf32": 494.7, "bfloat16": 989.4, "float16": 989.4, "link_gb_per_s": 450.0}
# NVLink joins pairs or fours of these cards, not all of a host.
_HOPPER_NVL = {"float32": 60.0, "tf32": 417.5, "bfloat16": 835.5, "float16": 835.5, "link_gb_per_s": 64.0}


def _spec(*parts: Mapping[str, object], **fields: object) -> DeviceSpec:
    merged: dict[str, object] = {}
    for part in (*parts, fields):
        merged |= part
    return DeviceSpec(**merged)  # type: ignore[arg-type]


DEVICES: Mapping[str, DeviceSpec] = MappingProxyType(
    {
        "V100": _spec(
            _V100, cuda_name=r"Tesla V100-SXM2-16GB", float32=15.7, float16=125, memory_gb=16, link_gb_per_s=150
        ),
        "V100-32GB": _spec(
            _V100, cuda_name=r"Tesla V100-SXM2-32GB", float32=15.7, float16=125, memory_gb=32, link_gb_per_s=150
        ),
        "V100-PCIe": _spec(
            _V100, cuda_name=r"Tesla V100-PCIE-16GB", float32=14, float16=112, memory_gb=16, link_gb_per_s=16
        ),
        "V100-PCIe-32GB": _spec(
            _V100, cuda_name=r"Tesla V100-PCIE-32GB", float32=14, float16=112, memory_gb=32, link_gb_per_s=16
        ),
        "V100S": _spec(
            _V100,
            cuda_name=r"Tesla V100S-PCIE-32GB",
            float32=16.4,
            float16=130,
            memory_gb=32,
            memory_gb_per_s=1134,
            link_gb_per_s=16,
        ),
        "T4": _spec(
            source="NVIDIA T4 data sheet, 2019",
            cuda_name=r"Tesla T4",
            float32=8.1,
            float16=65,
            memory_gb=16,
            memory_gb_per_s=300,
            link_gb_per_s=16,
        ),
        "A10": _spec(
            source="NVIDIA A10 data sheet, 2021",
            cuda_name=r"NVIDIA A10",
            float32=31.2,
            tf32=62.5,
            bfloat16=125,
            float16=125,
            memory_gb=24,
            memory_gb_per_s=600,
            link_gb_per_s=32,
        ),
        "A100": _spec(_A100, cuda_name=r"NVIDIA A100-SXM4-80GB", memory_gb=80, memory_gb_per_s=2039, link_gb_per_s=300),
        "A100-PCIe": _spec(
            _A100,
            cuda_name=r"NVIDIA A100(-PCIE-80GB| 80GB PCIe)",
            memory_gb=80,
            memory_gb_per_s=1935,
            link_gb_per_s=32,
        ),
        "A100-40GB": _spec(
            _A100, cuda_name=r"NVIDIA A100-SXM4-40GB", memory_gb=40, memory_gb_per_s=1555, link_gb_per_s=300
        ),
        "A100-PCIe-40GB": _spec(
            _A100, cuda_name=r"NVIDIA A100-PCIE-40GB", memory_gb=40, memory_gb_per_s=1555, link_gb_per_s=32
        ),
        "H100": _spec(
            _HOPPER_SXM,
            source="NVIDIA H100 architecture white paper, 2022 (SXM5)",
            cuda_name=r"NVIDIA H100 80GB HBM3",
            memory_gb=80,
            memory_gb_per_s=3350,
        ),
        "H100-PCIe": _spec(
            source="NVIDIA H100 data sheet, 2022 (PCIe)",
            cuda_name=r"NVIDIA H100 PCIe",
            float32=51,
            tf32=378,
            bfloat16=756.5,
            float16=756.5,
            memory_gb=80,
            memory_gb_per_s=2000,
            link_gb_per_s=64,
        ),
        "H100-NVL": _spec(
            _HOPPER_NVL,
            source="NVIDIA H100 data sheet, 2024 (NVL)",
            cuda_name=r"NVIDIA H100 NVL",
            memory_gb=94,
            memory_gb_per_s=3900,
        ),
        "H200": _spec(
            _HOPPER_SXM,
            source="NVIDIA H200 data sheet, 2024 (SXM)",
            cuda_name=r"NVIDIA H200",
            memory_gb=141,
            memory_gb_per_s=4800,
        ),
        "H200-NVL": _spec(
            _HOPPER_NVL,
            source="NVIDIA H200 data sheet, 2024 (NVL)",
            cuda_name=r"NVIDIA H200 NVL",
            memory_gb=141,
            memory_gb_per_s=4800,
        ),
        "L4": _spec(
            source="NVIDIA L4 data sheet, 2023",
            cuda_name=r"NVIDIA L4",
            float32=30.3,
            tf32=60,
            bfloat16=121,
            float16=121,
            memory_gb=24,
            memory_gb_per_s=300,
            link_gb_per_s=32,
        ),
        "L40S": _spec(
            source="NVIDIA L40S data sheet, 2023",
            cuda_name=r"NVIDIA L40S",
            float32=91.6,
            tf32=183,
            bfloat16=362.05,
            float16=362.05,
            memory_gb=48,
            memory_gb_per_s=864,
            link_gb_per_s=32,
        ),
        "RTX4090": _spec(
            source="NVIDIA Ada architecture white paper, appendix A",
            cuda_name=r"NVIDIA GeForce RTX 4090",
            float32=82.6,
            tf32=82.6,
            bfloat16=165.2,
            float16=165.2,
            memory_gb=24,
            memory_gb_per_s=1008,
            link_gb_per_s=32,
        ),
        "B200": _spec(
            source="NVIDIA Blackwell technical brief, 2024 (HGX B200)",
            cuda_name=r"NVIDIA B200",
            float32=80,
            tf32=1100,
            bfloat16=2250,
            float16=2250,
            memory_gb=180,
            memory_gb_per_s=8000,
            link_gb_per_s=900,
        ),
    }
)
"""By the short name that `dptrain plan --device` takes. This is the only table of devices."""


def device_named(text: str) -> tuple[str, DeviceSpec]:
    """Return a device by its short name, in any case and with or without dashes, with the name as it is listed.

    Raises:
        ConfigError: where it is not listed, with the nearest name and the list.
    """
    plain = {_plain(name): name for name in DEVICES}
    name = plain.get(_plain(text)) or device_of(text)
    if name is None:
        near = get_close_matches(_plain(text), plain, n=1)
        meant = f"; did you mean {plain[near[0]]}?" if near else ""
        raise ConfigError(f"no device {text!r} is listed{meant} (devices: {', '.join(DEVICES)})")
    return name, DEVICES[name]


def device_of(cuda_name: str | None) -> str | None:
    """Return the short name of a device that CUDA calls so; None where it is not listed, and for a CPU."""
    if cuda_name is None:
        return None
    return next((name for name, spec in DEVICES.items() if re.fullmatch(spec.cuda_name, cuda_name)), None)


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def peak_flops_per_s(name: str | None, *, precision: str) -> float | None:
    """Return the peak speed of a device in FLOP/s, None where it is not known; never a guess.

    Args:
        name: as `torch.cuda.get_device_name` gives it; None for a CPU, for which no data sheet speaks.
        precision: a field of `DeviceSpec`.
    """
    found = device_of(name)
    return None if found is None else DEVICES[found].flops_per_s(precision)


def matmul_precision(device: torch.device, *, mixed_precision: str) -> str:
    """Return the field of `DeviceSpec` that matrix products run at, with the switches of torch as they are now.

    Args:
        device: of the replica.
        mixed_precision: the setting `precision`.
    """
    if mixed_precision == "no":
        # Not allow_tf32, which raises where a user has set the newer switch.
        return "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"
    # MFU under fp8 is by convention that of bfloat16, in which all but some layers compute.
    return "float16" if mixed_precision == "fp16" else "bfloat16"
