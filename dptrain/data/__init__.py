"""The order of samples, a function of position alone, and the loader that delivers them."""

from dptrain.data.loader import MicroBatch, MicroBatchLoader
from dptrain.data.permutation import KeyedPermutation
from dptrain.data.source import SlotSource
from dptrain.data.stream import SampleStream
from dptrain.data.window import (
    Slot,
    accumulation_steps,
    choose_micro_batch_size,
    is_full,
    micro_batch_sizes,
    slots,
)

__all__ = [
    "KeyedPermutation",
    "MicroBatch",
    "MicroBatchLoader",
    "SampleStream",
    "Slot",
    "SlotSource",
    "accumulation_steps",
    "choose_micro_batch_size",
    "is_full",
    "micro_batch_sizes",
    "slots",
]
