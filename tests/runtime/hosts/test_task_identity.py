"""What tells a task from another of the same name, when a run goes on: refused, noted, or nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from dptrain.data import SampleStream
from dptrain.errors import ConfigError
from dptrain.runtime.hosts.task_identity import TaskIdentity
from tests.runs import noisy

POSITION = 40


def identity_of(task):
    return TaskIdentity(task, stream=SampleStream(len(task.train_data), seed=0))


def resumed(before, after):
    """Go on with `after` from a checkpoint of `before`; return what is noted."""
    saved = {"data": identity_of(before).state(position=POSITION)}
    identity = identity_of(after)
    identity.check(saved, position=POSITION, path=Path("step-7"))
    return list(identity.changes(saved))


def test_other_sample_weights_are_refused():
    """On resume, and among replicas: the same samples would be drawn in another order, or as often as others."""
    weights = torch.ones(len(noisy().train_data))
    even, odd = (
        TaskIdentity(replace(noisy(), sample_weights=w), stream=replace(noisy(), sample_weights=w).order(seed=0))
        for w in (weights, weights + torch.linspace(0, 0.2, len(weights)))
    )
    name = "the order of samples, such as by sample_weights"
    assert even.subjects()[name] != odd.subjects()[name]
    with pytest.raises(ConfigError, match=r"another order than when step-7 was saved.*sample_weights"):
        odd.check({"data": even.state(position=POSITION)}, position=POSITION, path=Path("step-7"))


FACTOR = {"value": 1.0}
"""A setting that stands in no file of a task."""


def scaled_mean(model, batch):
    """Return what the factor makes of the loss."""
    return FACTOR["value"] * model(batch[0]).square().mean()


def test_a_loss_that_computes_something_else_is_noted(monkeypatch):
    """Also where no file of the task has changed; from another untrained model nothing can be compared."""

    def built(seed):
        torch.manual_seed(seed)
        return replace(noisy(), model=torch.nn.Linear(4, 1), loss=scaled_mean)

    before, again, elsewhere = built(1), built(1), built(2)
    assert resumed(before, again) == []
    saved = {"data": identity_of(before).state(position=POSITION)}
    monkeypatch.setitem(FACTOR, "value", 3.0)
    (note,) = identity_of(again).changes(saved)
    assert "another loss than when the checkpoint was saved" in note
    assert list(identity_of(elsewhere).changes(saved)) == []


def labelled(labels):
    return TensorDataset(torch.arange(len(labels)), torch.tensor(labels))


def test_the_same_task_goes_on_without_a_word():
    """Nothing is refused and nothing is noted."""
    assert resumed(noisy(), noisy()) == []


@pytest.mark.parametrize("kept", [8, 500, 900])
def test_other_labels_are_refused(kept):
    """992 of 1,000 are replaced, or half of them, or one in ten: the places that are looked at are drawn."""
    spread = {round(i * 999 / 7) for i in range(8)}
    new = [label if index in spread or index < kept - 8 else 1 for index, label in enumerate([0] * 1000)]
    with pytest.raises(ConfigError, match="the data set is another one than when step-7 was saved"):
        resumed(replace(noisy(), train_data=labelled([0] * 1000)), replace(noisy(), train_data=labelled(new)))


def test_another_collation_is_refused():
    """The samples are the same, and what is made of them is not."""

    def doubled(samples):
        return 2 * torch.stack([features for features, *_ in samples])

    def tripled(samples):
        return 3 * torch.stack([features for features, *_ in samples])

    with pytest.raises(ConfigError, match=r"what collate makes of them.*--model.weights step-7 --run-dir NEW"):
        resumed(replace(noisy(), collate=doubled), replace(noisy(), collate=tripled))


def test_other_held_out_data_is_noted():
    """It changes no step, and makes losses that do not compare."""
    (note,) = resumed(noisy(), replace(noisy(), eval_data=labelled([0] * 9)))
    assert "the held-out data has changed" in note


SOURCE = """
import torch

def loss(model, batch):
    return {sign}((model(batch[0]) - batch[1]) ** 2).mean()
"""


def loss_in(path, sign):
    path.parent.mkdir(exist_ok=True)
    path.write_text(SOURCE.format(sign=sign))
    spec = importlib.util.spec_from_file_location("losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.loss


def test_an_edited_loss_is_noted_by_its_file(tmp_path):
    """Its sign is flipped, in a file of the same name: no sample and no parameter tells of that."""
    before = replace(noisy(), loss=loss_in(tmp_path / "a" / "losses.py", ""))
    saved = {"data": identity_of(before).state(position=POSITION)}
    after = identity_of(replace(noisy(), loss=loss_in(tmp_path / "b" / "losses.py", "-")))
    after.check(saved, position=POSITION, path=Path("step-7"))
    (note,) = after.changes(saved)
    assert note.startswith("the source of the task has changed since the checkpoint (losses.py)")


def test_a_checkpoint_of_an_older_version_is_accepted_with_a_note():
    """It holds one digest of other samples, with which there is nothing to compare."""
    identity = identity_of(noisy())
    saved = {"data": "0123456789abcdef"}
    identity.check(saved, position=POSITION, path=Path("step-7"))
    (note,) = identity.changes(saved)
    assert "from an older dptrain" in note
