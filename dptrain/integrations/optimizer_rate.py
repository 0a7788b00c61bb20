"""The factor on an optimizer's learning rate, in force while `optimizer.step` runs and at no other time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def scale_learning_rate(optimizer: Optimizer, factor: Callable[[], float]) -> Callable[[], None]:
    """Multiply the rate of every group by `factor()` while `optimizer.step` runs, and return what ends it.

    Outside of the step the groups hold the base rates, so that no factor multiplies the one before it and a
    scheduler, whether it rewrites the rates or multiplies them, never meets a scaled one.
    """
    base: list[Any] = []

    def scale(*_: object) -> None:
        restore()  # a step that raised has left its rates scaled
        base.extend(group["lr"] for group in optimizer.param_groups)
        present = factor()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * present

    def restore(*_: object) -> None:
        for group, rate in zip(optimizer.param_groups, base, strict=False):
            group["lr"] = rate
        base.clear()

    handles = [optimizer.register_step_pre_hook(scale), optimizer.register_step_post_hook(restore)]

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop
