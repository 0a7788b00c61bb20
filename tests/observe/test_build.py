"""What a meter is put together from: communication hooks are known also inside of others."""

from __future__ import annotations

import functools

import pytest
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from dptrain.observe.build import _with_those_inside

INNER = powerSGD_hook.powerSGD_hook


@pytest.mark.parametrize(
    "hook",
    [
        INNER,
        functools.partial(INNER),
        default_hooks.bf16_compress_wrapper(INNER),
        functools.partial(default_hooks.fp16_compress_wrapper(functools.partial(INNER))),
    ],
    ids=["alone", "partial", "wrapper", "partial of a wrapper of a partial"],
)
def test_a_communication_hook_is_found_inside_of_wrappers(hook):
    """PowerSGD loses information in whatever it stands."""
    assert INNER in _with_those_inside(hook)
