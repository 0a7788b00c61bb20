"""The callback and the mixin in the transformers Trainer itself, on two real replicas under DDP."""

from __future__ import annotations

import pytest
import torch

from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError, ObservationError
from tests.integrations.plain import Regression, Samples, follows_sgd, measured_by_hand, parameters_of, recorded
from tests.replicas import run_replicas

MICRO, RATE, LENGTH, CLIP = 4, 0.05, 10, 0.5

# 8 samples are a micro-batch on each rank of 13 an epoch; the window changes by a factor of 2 at most.
SCHEDULE = "0:16 32:32 80:64 160:8"
TAKEN = [2, 2, 2, 4, 3, 8, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
PLANNED = [2, 2, 2, 4, 4, 8, 8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def language_model():
    """A real causal language model of 900 parameters; its loss is normalised by the tokens of all replicas."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(5)
    # A class whose loss shifts the labels though its `loss_type` does not say so: the Trainer counts one too many.
    sizes = {
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 13,
        "n_positions": LENGTH,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


class Sentences(torch.utils.data.Dataset):
    """Sentences of very different length, padded with -100 in the labels."""

    def __len__(self):
        return 12 * MICRO

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, 13, (LENGTH,), generator=generator)
        return {"input_ids": tokens, "labels": tokens.where(torch.arange(LENGTH) < 2 + index % 8, -100)}


def num_tokens(inputs):
    """Tokens that a causal model predicts: all labels but the first that are not masked."""
    return sum(label != -100 for sentence in inputs["labels"] for label in sentence[1:])


def train(folder, *, model=None, data=None, callbacks=(), adaptive=None, in_front=None, checkpoint=None, **arguments):
    """Train and return what the model saw and what was logged."""
    from transformers import Trainer, TrainingArguments

    from dptrain.integrations.transformers import BatchAdapterMixin

    class AdaptiveTrainer(BatchAdapterMixin, Trainer):
        pass

    model = model or Regression()
    records = recorded(model)
    settings = {"num_train_epochs": 2, "logging_steps": 3, "save_strategy": "no", "lr_scheduler_type": "constant"}
    args = TrainingArguments(
        **{**settings, **arguments},
        output_dir=folder,
        per_device_train_batch_size=MICRO,
        learning_rate=RATE,
        optim="sgd",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    kind, options = (AdaptiveTrainer, adaptive) if adaptive else (Trainer, {})
    trainer = kind(
        model=model, args=args, train_dataset=data or Samples(13 * MICRO * 2), callbacks=[*callbacks], **options
    )
    if in_front is not None:
        in_front.add_to(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    callback = trainer._callback if adaptive else in_front or next(iter(callbacks), None)
    return {
        "records": records,
        "parameters": parameters_of(model),
        "metrics": callback and callback.as_metrics(),
        "record": callback and callback.state()["attributes"]["record"],
        "log": trainer.state.log_history,
        "global_step": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "epoch": trainer.state.epoch,
        "schedule_steps": trainer.lr_scheduler.last_epoch,
        "hooks": sum(len(p._backward_hooks or {}) for p in model.parameters()) + len(model._forward_hooks),
    }


def law(**options):
    return {"control": ControlConfig(law="schedule", schedule=SCHEDULE), "rule": "linear", **options}


def reporter():
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def __init__(self):
            self.rows = []

        def on_log(self, *_, **kwargs):
            self.rows.append(dict(kwargs["logs"]))

    return Reporter()


def one_after_another(rank, world_size, folder):
    from dptrain.integrations.transformers import NoiseScaleMonitor

    report = reporter()
    accumulated = {"gradient_accumulation_steps": 3, "max_grad_norm": CLIP}
    tokens = {"model": language_model(), "data": Sentences(), "gradient_accumulation_steps": 2}
    adaptive = {"adaptive": law(), "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    saved = {**adaptive, "save_strategy": "steps", "save_steps": 5, "num_train_epochs": 3}
    return {
        "bare": train(folder, **accumulated),
        "measured": train(folder, callbacks=[report], in_front=NoiseScaleMonitor(every=1), **accumulated),
        "reported": report.rows,
        "sparse": train(folder, callbacks=[NoiseScaleMonitor(every=2)], **accumulated),
        "tokens": train(folder, callbacks=[NoiseScaleMonitor(every=1)], **tokens),
        "whole": train(f"{folder}/run", **saved),
        "resumed": train(f"{folder}/run", checkpoint=f"{folder}/run/checkpoint-5", **saved),
        "updates": train(folder, **adaptive, max_steps=9),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'dptrain[transformers]'")
    return run_replicas(one_after_another, world_size=2, args=(str(tmp_path_factory.mktemp("transformers")),))


def by_hand(runs, name, *, model=None, **options):
    return measured_by_hand(model or Regression(), [run[name]["records"] for run in runs], **options)


def pair(run):
    return run["metrics"]["noise_scale/trace"], run["metrics"]["noise_scale/grad_sq"]


@pytest.mark.parametrize("name", ["measured", "whole", "updates"])
def test_the_pair_is_that_of_plain_gradients(runs, name):
    """Clipped at every step, with short last windows and with a changing batch: as by hand, the same on both ranks."""
    expected, steps = by_hand(runs, name)
    assert name != "measured" or all(torch.tensor(mean).norm() > CLIP for _, _, mean in steps)
    assert pair(runs[0][name]) == pytest.approx(expected, rel=1e-4)
    assert runs[0][name]["metrics"] == runs[1][name]["metrics"]


def test_micro_batches_are_weighted_by_their_tokens(runs):
    """A causal model with masked labels: the pair is that of mean gradients over tokens, weighted by the tokens."""
    expected, _ = by_hand(runs, "tokens", model=language_model(), weight=num_tokens)
    equal, _ = by_hand(runs, "tokens", model=language_model())
    assert pair(runs[0]["tokens"]) == pytest.approx(expected, rel=1e-3)
    assert pair(runs[0]["tokens"]) != pytest.approx(equal, rel=1e-2)


def test_steps_between_measured_ones_cost_nothing_and_count_for_nothing(runs):
    """With every=2 the pair is that of every other step, and training is the same to the bit."""
    expected, _ = by_hand(runs, "sparse", every=2)
    assert pair(runs[0]["sparse"]) == pytest.approx(expected, rel=1e-4)
    assert runs[0]["sparse"]["parameters"] == runs[0]["bare"]["parameters"]


def test_training_is_bit_identical_with_and_without_the_callback(runs):
    """Measuring changes no parameter in any bit, and leaves no hook behind."""
    assert runs[0]["bare"]["parameters"] == runs[0]["measured"]["parameters"]
    assert runs[0]["measured"]["hooks"] == 0


def test_the_trainers_reporters_get_flat_floats(runs):
    """The keys `noise_scale/…` are in the Trainer's history, and in the rows of a reporter that comes after."""
    rows = [row for row in runs[0]["measured"]["log"] if "loss" in row]
    assert rows
    assert all({"noise_scale/trace", "noise_scale/grad_sq"} <= set(row) for row in rows)
    assert [row for row in runs[0]["reported"] if "noise_scale/trace" in row]


def test_the_window_follows_the_decisions(runs):
    """Each window is as long as the schedule says at the position before it; only an epoch's end cuts one short."""
    _, steps = by_hand(runs, "whole")
    assert [micro_steps for _, micro_steps, _ in steps] == [[size, size] for size in TAKEN]


@pytest.mark.parametrize("name", ["whole", "updates"])
def test_every_update_after_a_change_uses_synchronised_gradients(runs, name):
    """Each goes base rate × B/B0 down the mean over both ranks, whose parameters stay the same bits."""
    _, steps = by_hand(runs, name)
    assert len({tuple(micro_steps) for _, micro_steps, _ in steps}) > 3
    rate = RATE / PLANNED[0]
    assert follows_sgd(steps, rate=lambda step: rate * PLANNED[step], last=runs[0][name]["parameters"])


def test_epochs_and_updates_end_where_they_should(runs):
    """Three epochs are 39 micro-batches and as many ticks of the schedule; nine updates are nine, over more epochs."""
    whole, updates = runs[0]["whole"], runs[0]["updates"]
    assert (whole["global_step"], whole["max_steps"], whole["epoch"]) == (len(TAKEN), len(TAKEN), 3.0)
    assert whole["schedule_steps"] == sum(TAKEN)
    assert (updates["global_step"], updates["schedule_steps"]) == (9, 9)
    assert updates["epoch"] == pytest.approx(sum(TAKEN[:9]) / 13)


def test_a_checkpoint_in_mid_run_carries_meter_batch_and_position(runs):
    """Gone on with from its fifth update, the run ends in the bits of the whole one."""
    assert runs[0]["resumed"]["parameters"] == runs[0]["whole"]["parameters"]
    assert runs[0]["resumed"]["record"] == runs[0]["whole"]["record"]


def test_refuses_what_it_cannot_see(tmp_path):
    """Several devices in one process, sharded parameters and a stolen callback are refused with the reason."""
    pytest.importorskip("transformers")
    from transformers import TrainingArguments

    from dptrain.integrations.transformers.callback import _refuse

    args = TrainingArguments(output_dir=tmp_path, use_cpu=True)
    _refuse(args, Regression())
    args._n_gpu = 2
    with pytest.raises(ObservationError, match="DataParallel"):
        _refuse(args, Regression())
    args._n_gpu, model = 0, Regression()
    next(model.parameters()).device_mesh = "a mesh"
    with pytest.raises(ObservationError, match="shards"):
        _refuse(args, model)
    with pytest.raises(ConfigError, match="restore_callback_states"):
        train(str(tmp_path), adaptive=law(), restore_callback_states_from_checkpoint=True)
