"""Small checkpoints whose content follows from their step, for tests of files and of the faults that befall them."""

from __future__ import annotations

import torch

from dptrain.checkpoint.store import save_checkpoint

STATE = {"cursor": 3, "loss": 0.1, "betas": (0.9, float("inf"))}


def content(step):
    """The tensors of a step, by file."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(7, 3, generator=generator), "n": torch.tensor(step)},
        "optimizer": {"exp_avg/w": torch.randn(7, 3, generator=generator)},
    }


def save(folder, step, *, keep=3):
    """Commit the checkpoint of a step."""
    return save_checkpoint(folder, step=step, tensors=content(step), state={**STATE, "step": step}, keep=keep)


def assert_holds(checkpoint, step):
    """It is that of the step, bit for bit."""
    assert checkpoint.step == step
    assert checkpoint.state == {**STATE, "step": step}
    for name, group in content(step).items():
        assert_equal_bits(checkpoint.tensors(name), group)


def assert_equal_bits(found, expected):
    """Equal names, dtypes, shapes and bytes."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        assert found[key].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), key


def names(folder):
    """What lies in a folder, by name."""
    return sorted(path.name for path in folder.iterdir())
