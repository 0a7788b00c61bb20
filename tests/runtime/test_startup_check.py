"""What replicas compare before they start: equal things pass, and a data set has one fingerprint."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from dptrain.errors import ConfigError
from dptrain.runtime.startup_check import check_agreement, check_device, data_fingerprint
from dptrain.train import ExecutionConfig, TrainConfig


class Augmented(Dataset):
    """Samples with noise of their own, in a mapping with a text."""

    def __init__(self, *, length=20, changed=None):
        self.features = torch.arange(length, dtype=torch.float32)
        if changed is not None:
            self.features[changed] += 1

    def __len__(self):
        return len(self.features)

    def __getitem__(self, index):
        return {"x": self.features[index] + torch.rand(()), "name": f"sample {index}", "path": object()}


def test_the_fingerprint_is_that_of_the_data():
    """It does not depend on random numbers drawn before or in the samples; it does on length, values and dtype."""
    first = data_fingerprint(Augmented(), seed=0)
    torch.rand(5)
    assert data_fingerprint(Augmented(), seed=0) == first
    assert data_fingerprint(Augmented(length=21), seed=0) != first
    assert data_fingerprint(Augmented(changed=19), seed=0) != first
    one, other = (TensorDataset(torch.zeros(9, dtype=dtype)) for dtype in (torch.float32, torch.int32))
    assert data_fingerprint(one, seed=0) != data_fingerprint(other, seed=0)


def test_the_fingerprint_reads_a_handful_of_samples():
    """Eight, however long the data set is."""
    read = []

    class Long(Dataset):
        def __len__(self):
            return 10**12

        def __getitem__(self, index):
            read.append(index)
            return index

    data_fingerprint(Long(), seed=0)
    assert len(set(read)) == 8
    assert (min(read), max(read)) == (0, 10**12 - 1)


def test_one_process_agrees_with_itself():
    """Without a process group nothing is compared."""
    check_agreement({"the settings": 1}, device=torch.device("cpu"))


def test_replicas_share_a_gpu_only_where_that_is_asked_for(monkeypatch):
    """Two replicas on one GPU are refused, with the setting that allows it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"execution\.share_devices"):
        check_device(TrainConfig())
    check_device(TrainConfig(execution=ExecutionConfig(share_devices=True)))
