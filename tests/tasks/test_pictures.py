"""The pictures task: what it refuses, and what it reads from tiny files of each format through the real torchvision."""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from scipy.io import savemat

from dptrain.errors import ConfigError
from dptrain.tasks import check_task, pictures, resolve_task

NUM_TRAIN, NUM_TEST = 12, 5


@pytest.fixture(scope="module")
def datasets():
    """The real thing; beside a CPU build of torch its operators are missing, none of which a data set uses."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    library = torch.library.Library("torchvision", "FRAGMENT")
    while True:
        try:
            return importlib.import_module("torchvision.datasets")
        except RuntimeError as error:
            name = str(error).removeprefix("operator torchvision::").split()[0]
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")


def drawn(number, *shape):
    generator = np.random.default_rng(number)
    return generator.integers(0, 256, (number, *shape), dtype=np.uint8), generator.integers(0, 10, number)


def make_mnist(root, _datasets, _patch):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    made = {}
    for stem, number in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        pixels, classes = made[stem] = drawn(number, 28, 28)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, number, 28, 28) + pixels.tobytes())
        labels = struct.pack(">2i", 2049, number) + classes.astype(np.uint8).tobytes()
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    return made["train"][0][:, None], made["train"][1]


def make_svhn(root, datasets, patch):
    listed = {}
    for split, number in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        pixels, classes = drawn(number, 3, 32, 32)
        path = root / f"{split}_32x32.mat"
        savemat(path, {"X": pixels.transpose(2, 3, 1, 0), "y": np.where(classes == 0, 10, classes)[:, None]})
        listed[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]  # noqa: S324 - torchvision's own
    patch.setattr(datasets.SVHN, "split_list", listed)
    return drawn(NUM_TRAIN, 3, 32, 32)


def make_cifar10(root, datasets, patch):
    folder = root / "cifar-10-batches-py"
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]  # noqa: S324 - torchvision's own

    lists = {}
    for name, number in (("train_list", NUM_TRAIN), ("test_list", NUM_TEST)):
        pixels, classes = drawn(number, 3, 32, 32)
        lists[name] = [write(name, {"data": pixels.reshape(number, -1), "labels": classes.tolist()})]
        patch.setattr(datasets.CIFAR10, name, lists[name])
    meta, digest = write("batches.meta", {"label_names": list("0123456789")})
    patch.setattr(datasets.CIFAR10, "meta", {"filename": meta, "key": "label_names", "md5": digest})
    return drawn(NUM_TRAIN, 3, 32, 32)


MAKERS = {"mnist": make_mnist, "svhn": make_svhn, "cifar10": make_cifar10}


@pytest.mark.parametrize("data", MAKERS)
def test_it_reads_what_torchvision_has_stored(tmp_path, monkeypatch, datasets, data):
    """Pixels and classes are those of the files, colours first; the test set is held out; the task can be trained."""
    pixels, classes = MAKERS[data](tmp_path, datasets, monkeypatch)
    task = resolve_task("pictures", options={"data": data, "root": str(tmp_path), "width": 4})
    check_task(task)
    read = task.train_data.tensors
    assert (read[0].dtype, read[1].dtype) == (torch.uint8, torch.int64)
    assert torch.equal(read[0], torch.as_tensor(pixels))
    assert read[1].tolist() == classes.tolist()
    assert (len(task.train_data), len(task.eval_data)) == (NUM_TRAIN, NUM_TEST)


@pytest.mark.parametrize("data", MAKERS)
def test_data_that_are_not_there_are_not_fetched(tmp_path, datasets, data):
    """An empty folder is refused with what to do, and stays empty."""
    assert datasets
    with pytest.raises(ConfigError, match=f"{data} cannot be read from .*store it there with torchvision first"):
        pictures(data=data, root=str(tmp_path))
    assert not list(tmp_path.rglob("*.*"))


def test_what_is_no_task_is_refused(tmp_path, monkeypatch):
    """Other data, no channels, and a machine without torchvision: a sentence each."""
    with pytest.raises(ConfigError, match="'mnist', 'svhn', 'cifar10', got 'imagenet'"):
        pictures(data="imagenet", root=str(tmp_path))
    with pytest.raises(ConfigError, match="width must be at least 1"):
        pictures(data="mnist", root=str(tmp_path), width=0)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ConfigError, match=r"needs torchvision.*install the release that goes with torch"):
        pictures(data="mnist", root=str(tmp_path))
