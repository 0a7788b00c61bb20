"""Micro-batches on the device: all of their tensors, whatever they are kept in."""

from __future__ import annotations

from collections import UserDict

import torch

from dptrain.train.execution.device_copy import DeviceCopy


class Graph:
    """Has a method to move itself, as graphs and encodings have."""

    def __init__(self, nodes):
        self.nodes = nodes

    def to(self, device):
        return Graph(self.nodes.to(device))


def test_whatever_holds_tensors_is_moved():
    """Torch's own containers, mappings of others, and what moves itself; numbers and text stay."""
    batch = {
        "plain": [torch.rand(2), (torch.rand(3), 4)],
        "mapping": UserDict(ids=torch.arange(3), name="x"),
        "graph": Graph(torch.rand(5)),
    }
    moved = DeviceCopy(torch.device("meta"))(batch)  # a device that every build of torch has
    tensors = [moved["plain"][0], moved["plain"][1][0], moved["mapping"]["ids"], moved["graph"].nodes]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (moved["plain"][1][1], moved["mapping"]["name"]) == (4, "x")
    assert DeviceCopy(torch.device("cpu"))(batch) is batch
