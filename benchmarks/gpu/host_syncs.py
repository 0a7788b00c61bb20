"""How often the host waits for the device within a stretch of code: CUDA's own count, or our own check on a CPU."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LATE = ("reduction.py",)
"""Files whose reads of a tensor are of one that was brought to the host aside, and waited for by its own event."""
_READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__}
_COPIES = {Tensor.cpu, torch.nonzero, Tensor.nonzero, torch.masked_select}


class _Counted(TorchFunctionMode):
    """Notes calls that would wait on a GPU: reads of values, and tensors made of host numbers for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - as torch calls it
        kwargs = dict(kwargs or {})
        makes = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        makes = makes and not isinstance(args[0], Tensor)  # of a tensor it is a copy on the device
        if func in _READS or func in _COPIES or makes:
            self._note(func)
        return func(*args, **kwargs)

    def _note(self, func: Callable[..., Any]) -> None:
        frames = traceback.extract_stack()[:-2]
        place = next((frame for frame in reversed(frames) if "/torch/" not in frame.filename), frames[-1])
        if not place.filename.endswith(_LATE):
            self.places.append(f"{place.filename}:{place.lineno} {getattr(func, '__name__', func)}")


@contextmanager
def counted() -> Iterator[list[str]]:
    """Yield a list of the places where the host waited, complete after the context has ended."""
    places: list[str] = []
    if not torch.cuda.is_available():
        mode = _Counted()
        with mode:
            yield places
        places += mode.places
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    sys.stdout.flush()
