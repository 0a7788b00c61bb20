"""The copy that is written: equal to the bit when it was taken, and deaf to what training does afterwards."""

from __future__ import annotations

import torch

from dptrain.checkpoint.host_copy import HostCopy


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_a_copy_keeps_its_bits_while_the_originals_move_on():
    """Any dtype, NaN included, strides that are not plain, and tensors without elements."""
    original = {
        "model": {"w": torch.randn(3, 4), "turned": torch.randn(4, 3).T, "nan": torch.tensor([float("nan"), -0.0])},
        "optimizer": {"step": torch.tensor(3), "half": torch.randn(5).bfloat16(), "none": torch.empty(0, 2)},
    }
    expected = {name: {key: bits(tensor) for key, tensor in group.items()} for name, group in original.items()}
    copied = HostCopy().take(original)
    for group in original.values():
        for tensor in group.values():
            tensor.zero_()
    assert {name: {key: bits(tensor) for key, tensor in group.items()} for name, group in copied.items()} == expected
    assert all(tensor.is_contiguous() for group in copied.values() for tensor in group.values())


def test_memory_is_kept_while_shapes_stay():
    """The second copy goes where the first one was; only what has another shape or dtype gets new memory."""
    snapshot = HostCopy()
    tensors = {"model": {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)}}
    first = {key: tensor.data_ptr() for key, tensor in snapshot.take(tensors)["model"].items()}
    held = snapshot.take({"model": {"a": torch.full((4,), 2.0), "b": torch.ones(5), "c": torch.ones(4).double()}})
    assert held["model"]["a"].data_ptr() == first["a"]
    assert held["model"]["a"].tolist() == [2.0] * 4
    assert (held["model"]["b"].shape, held["model"]["c"].dtype) == ((5,), torch.float64)


def test_what_is_no_longer_there_is_forgotten():
    """An optimizer that lost its state does not have it saved again."""
    snapshot = HostCopy()
    snapshot.take({"model": {"a": torch.ones(1)}, "optimizer": {"m": torch.ones(1)}})
    assert snapshot.take({"model": {"b": torch.ones(1)}}) == {"model": {"b": torch.ones(1)}}


def test_parameters_are_copied_without_a_graph():
    """A tensor that requires gradients is a value like others."""
    copied = HostCopy().take({"model": {"w": torch.nn.Parameter(torch.ones(2))}})
    assert not copied["model"]["w"].requires_grad
