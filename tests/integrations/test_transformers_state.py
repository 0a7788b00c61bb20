"""What a transformers callback takes over from a run before, and from a checkpoint, in a Trainer of one process."""

from __future__ import annotations

import json

import pytest

from dptrain.control.settings import ControlConfig
from dptrain.errors import CheckpointError
from tests.integrations.plain import Regression, Samples

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'dptrain[transformers]'")

from transformers import Trainer, TrainingArguments

from dptrain.integrations.transformers import BatchAdapterMixin, NoiseScaleMonitor

MICRO, STEPS = 4, 4


class AdaptiveTrainer(BatchAdapterMixin, Trainer):
    pass


def trainer_of(folder, *, kind=Trainer, monitors=(), rate=0.05, **options):
    return kind(
        model=Regression(),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=MICRO,
            optim="sgd",
            learning_rate=rate,
            save_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            train_sampling_strategy="sequential",
        ),
        train_dataset=Samples(16 * STEPS * MICRO),
        callbacks=list(monitors),
        **options,
    )


def record(callback):
    return callback.state()["attributes"]["record"]


def test_a_second_training_begins_anew(tmp_path):
    """With a learning rate of 0 the second one measures what the first did, and not both together."""
    monitor = NoiseScaleMonitor(every=1)
    trainer = trainer_of(tmp_path, monitors=[monitor], rate=0.0)
    trainer.train()
    first = record(monitor)
    trainer.train()
    assert record(monitor) == first


def test_a_second_training_begins_with_the_first_window(tmp_path):
    """The batch of the mixin, its position and its decisions are those of a run of their own."""
    control = ControlConfig(law="schedule", schedule="0:8 16:32")
    trainer = trainer_of(tmp_path, kind=AdaptiveTrainer, rate=0.0, control=control, rule="linear")
    trainer.train()
    first = record(trainer._callback)
    assert first["adapter"]["window"]["accumulation_steps"] > 2
    trainer.train()
    assert record(trainer._callback) == first


def test_several_monitors_are_told_apart(tmp_path):
    """Each goes on from its own entry of the checkpoint, which holds two for each at most, however late it is."""
    settings = [{"every": 1}, {"every": 1, "groups": "module"}, {"every": 2}]
    whole = [NoiseScaleMonitor(**one) for one in settings]
    trainer_of(tmp_path, monitors=whole).train()
    saved = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    entries = saved["stateful_callbacks"]["NoiseScaleMonitor"]
    assert [entry["args"]["every"] for entry in entries] == [1, 1, 2] * 2
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = [NoiseScaleMonitor(**one) for one in settings]
    trainer_of(tmp_path, monitors=resumed).train(resume_from_checkpoint=checkpoint)
    assert [record(one) for one in resumed] == [record(one) for one in whole]
    assert record(whole[0]) != record(whole[2])
    others = [NoiseScaleMonitor(every=3), NoiseScaleMonitor(every=1)]
    with pytest.raises(CheckpointError, match="none with the arguments of this one"):
        trainer_of(tmp_path, monitors=others).train(resume_from_checkpoint=checkpoint)


def test_a_monitor_that_joins_a_resumed_run_begins_anew(tmp_path):
    """The checkpoint of a run without monitors has no entry of theirs; both measure from there on."""
    trainer_of(tmp_path).train()
    monitors = [NoiseScaleMonitor(every=1), NoiseScaleMonitor(every=1, level=0.9)]
    trainer_of(tmp_path, monitors=monitors).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert record(monitors[0]) == record(monitors[1]) is not None


def test_a_run_resumed_on_half_of_the_replicas_begins_at_its_sample(tmp_path):
    """Two steps of two replicas with two micro-batches each are eight micro-steps of one replica, in steps of four."""
    control = ControlConfig(law="constant")
    trainer_of(tmp_path, kind=AdaptiveTrainer, control=control).train()
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    adapter = state["stateful_callbacks"]["WindowCallback"]["attributes"]["record"]["adapter"]
    adapter["quantum"] *= 2  # as two replicas would have left it
    adapter["first_step"]["world_size"] *= 2
    path.write_text(json.dumps(state))
    resumed = trainer_of(tmp_path, kind=AdaptiveTrainer, control=control)
    resumed.train(resume_from_checkpoint=str(path.parent))
    assert resumed.adapter.accumulation_steps == 4
    assert resumed.micro_steps_seen == 8 + (STEPS - 2) * 4
