"""What a sample is, and what a micro-batch weighs, in a transformers Trainer whose rows are no samples."""

from __future__ import annotations

import pytest
import torch

from dptrain.errors import ConfigError, ObservationError
from tests.integrations.test_transformers import language_model

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'dptrain[transformers]'")

from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, default_data_collator

from dptrain.integrations.transformers import BatchAdapterMixin, NoiseScaleMonitor

MICRO, LENGTH, STEPS = 4, 5, 4


class Sentences(torch.utils.data.Dataset):
    """Sentences of one length, so that packed and stacked they have the same mean gradient."""

    def __len__(self):
        return 2 * STEPS * MICRO

    def __getitem__(self, index):
        tokens = torch.randint(0, 13, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens.where(torch.arange(LENGTH) > 0, -100)}


class Packed(Sentences):
    """Two sentences to a sample, as SFT packs them."""

    def __getitem__(self, index):
        row = packs([super().__getitem__(2 * index), super().__getitem__(2 * index + 1)])
        return {name: value[0] for name, value in row.items()}

    def __len__(self):
        return super().__len__() // 2


class AdaptiveTrainer(BatchAdapterMixin, Trainer):
    pass


def pairs(samples):
    """Stack two rows for each sample, as collators of preferences do."""
    stacked = default_data_collator(samples)
    return {name: torch.cat([rows, rows.flip(0)]) for name, rows in stacked.items()}


def packs(samples):
    """Put two sequences in each row, with positions that begin anew."""
    stacked = default_data_collator(samples)
    positions = torch.arange(LENGTH).repeat(len(samples) // 2, 2)
    return {**{name: rows.view(-1, 2 * LENGTH) for name, rows in stacked.items()}, "position_ids": positions}


def without_hints(samples):
    """Flatten without anything that keeps the sequences apart."""
    return {name: rows[:, :2].reshape(1, -1) for name, rows in default_data_collator(samples).items()}


def train(folder, *, collator=None, kind=Trainer, monitor=None, data=None, arguments=None, **options):
    monitor = None if kind is AdaptiveTrainer else monitor or NoiseScaleMonitor(every=1)
    settings = {"max_steps": STEPS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": MICRO}
    trainer = kind(
        model=language_model(),
        args=TrainingArguments(
            **{**settings, **(arguments or {})},
            output_dir=str(folder),
            optim="sgd",
            learning_rate=0.01,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            train_sampling_strategy="sequential",
        ),
        train_dataset=data or Sentences(),
        data_collator=collator,
        callbacks=[] if monitor is None else [monitor],
        **options,
    )
    trainer.train()
    return monitor or trainer._callback


def pair(monitor):
    metrics = monitor.as_metrics()
    return metrics["noise_scale/trace"], metrics["noise_scale/grad_sq"]


@pytest.mark.parametrize(
    "collator",
    [
        DataCollatorWithFlattening(),
        DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True),
        packs,
    ],
    ids=["positions", "ends and numbers", "two in a row"],
)
def test_packed_sequences_are_counted_one_by_one(tmp_path, collator):
    """The pair is that of the same sequences in rows of their own."""
    assert pair(train(tmp_path, collator=collator)) == pytest.approx(pair(train(tmp_path)), rel=1e-4)


@pytest.mark.parametrize("kind", [Trainer, AdaptiveTrainer])
@pytest.mark.parametrize(("collator", "rows"), [(pairs, 2 * MICRO), (without_hints, 1)])
def test_rows_that_are_no_samples_are_refused(tmp_path, kind, collator, rows):
    """Pairs have twice the rows of the data loader's samples, and flattened ones a single row that says nothing."""
    with pytest.raises(ObservationError, match=f"{rows} rows where the data loader gives {MICRO} samples.*such as 4"):
        train(tmp_path, kind=kind, collator=collator)


def test_given_samples_are_believed(tmp_path):
    """With `micro_batch_size` a pair of rows is one sample: tr(Σ) per sample is half of that per row."""
    given = pair(train(tmp_path, collator=pairs, monitor=NoiseScaleMonitor(every=1, micro_batch_size=MICRO)))
    twice = pair(train(tmp_path, collator=pairs, monitor=NoiseScaleMonitor(every=1, micro_batch_size=2 * MICRO)))
    assert given[0] == pytest.approx(twice[0] / 2)
    assert given[1] == pytest.approx(twice[1])


def test_a_short_first_batch_is_an_epochs_last(tmp_path):
    """A data set of fewer samples than one batch is no reason for an error."""
    arguments = {"per_device_train_batch_size": 3 * STEPS * MICRO, "gradient_accumulation_steps": 1, "max_steps": 1}
    assert train(tmp_path, arguments=arguments).meter.steps_dropped == 1  # one small batch alone says nothing


def test_batch_and_noise_scale_are_counted_in_the_same_samples(tmp_path):
    """The law compares the two: packs whose sequences are counted, or another number by hand, are refused."""
    arguments = {"per_device_train_batch_size": 1}
    packed = Packed()
    with pytest.raises(ObservationError, match=r"2 sequences, packed into 1 samples.*'micro_batch_size': 1"):
        train(tmp_path, kind=AdaptiveTrainer, data=packed, arguments=arguments)
    with pytest.raises(ConfigError, match="micro_batch_size=2"):
        train(tmp_path, kind=AdaptiveTrainer, data=packed, arguments=arguments, noise={"micro_batch_size": 2})
    callback = train(tmp_path, kind=AdaptiveTrainer, data=packed, arguments=arguments, noise={"micro_batch_size": 1})
    assert callback.as_metrics()["progress/samples"] == 2 * STEPS


def token_mean(outputs, labels, num_items_in_batch=None):
    """The loss of transformers' own documentation for `compute_loss_func`."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_a_loss_function_of_the_users_own_weighs_micro_batches_equally(tmp_path):
    """With as many tokens in each the pair is that of the model's own loss; that they are not counted is said once."""
    with pytest.warns(UserWarning, match="taken to weigh the same") as warned:
        own = pair(train(tmp_path, compute_loss_func=token_mean))
    assert len([one for one in warned if "weigh the same" in str(one.message)]) == 1
    assert own == pytest.approx(pair(train(tmp_path)), rel=1e-4)


def test_label_smoothing_is_refused_with_its_remedy(tmp_path):
    """It normalises by tokens outside of the model, and the setting that does so is named."""
    with pytest.raises(ObservationError, match="label_smoothing_factor=0"):
        train(tmp_path, arguments={"label_smoothing_factor": 0.1})
