"""The loss of distillation against that of `trl`, an implementation by others, where it is installed."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dptrain.train.preparation.distillation import DistilledLoss, divergence
from tests.tasks.made_data import make_tokenizer

SAMPLES, LENGTH, WIDTH, VOCABULARY = 3, 5, 16, 11
WRITTEN = 6
"""Tokens that a student writes after a prompt."""


@pytest.fixture(scope="module")
def trl():
    """The modules of `trl` that hold the losses of its two trainers."""
    reason = "trl is not installed (pip install trl), so there is nothing to compare the distillation loss with"
    pytest.importorskip("trl", reason=reason)
    from trl.experimental.gkd import gkd_trainer
    from trl.trainer import distillation_trainer

    return distillation_trainer, gkd_trainer


def make_case():
    """Return hidden states and output layers of a model and of its teacher, which is less sure; float32, seeded."""
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator) for _ in range(2)]
    heads = [scale * torch.randn(VOCABULARY, WIDTH, generator=generator) for scale in (1.0, 0.3)]
    return hidden, heads


def with_gradient(loss_of):
    """Return the loss and its gradient with respect to the model's output layer."""
    (own, taught), (head, teacher_head) = make_case()
    head.requires_grad_()
    loss = loss_of(own, taught, head, teacher_head)
    loss.backward()
    return loss.item(), head.grad


def ours(temperature):
    return with_gradient(
        lambda own, taught, head, teacher_head: divergence(
            own @ head.T, taught @ teacher_head.T, temperature=temperature
        )
    )


def assert_equal(found, expected, *, factor):
    """Assert that loss and gradient are `factor` times the others, to 1e-5 of their size."""
    assert found[0] == pytest.approx(factor * expected[0], rel=1e-5)
    torch.testing.assert_close(found[1], factor * expected[1], rtol=1e-5, atol=1e-5 * found[1].abs().max().item())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_divergence_is_that_of_trls_distillation_trainer(trl, temperature):
    """At beta = 0, KL(teacher ‖ model), loss and gradient are T² times those of the loss of `DistillationTrainer`."""
    trainer, _ = trl

    def loss_of(own, taught, head, teacher_head):
        mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
        return trainer._chunked_divergence_loss(
            own, taught, head, teacher_head, completion_mask=mask, beta=0.0, temperature=temperature
        )[0]

    assert_equal(ours(temperature), with_gradient(loss_of), factor=temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_divergence_is_that_of_trls_gkd_trainer(trl, temperature):
    """At beta = 0 and batchmean over labels that are all kept, they are T² times those of `generalized_jsd_loss`."""
    _, trainer = trl

    def loss_of(own, taught, head, teacher_head):
        labels = torch.zeros(SAMPLES, LENGTH, dtype=torch.long)
        return trainer.GKDTrainer.generalized_jsd_loss(
            own @ head.T, taught @ teacher_head.T, labels=labels, beta=0.0, temperature=temperature
        )

    assert_equal(ours(temperature), with_gradient(loss_of), factor=temperature**2)


def test_the_defaults_of_trl_are_another_loss(trl):
    """At beta = 1, the default of `DistillationTrainer`, the divergence is KL(model ‖ teacher), which is not ours."""
    trainer, _ = trl

    def loss_of(own, taught, head, teacher_head):
        mask = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
        return trainer._chunked_divergence_loss(
            own, taught, head, teacher_head, completion_mask=mask, beta=1.0, temperature=1.0
        )[0]

    reverse, _ = with_gradient(loss_of)
    assert math.isfinite(reverse)
    assert reverse != pytest.approx(ours(1.0)[0], rel=0.05)
    swapped = with_gradient(
        lambda own, taught, head, teacher_head: divergence(taught @ teacher_head.T, own @ head.T, temperature=1.0)
    )[0]
    assert reverse == pytest.approx(swapped, rel=1e-5)


class Completions(nn.Module):
    """A model of transformers that predicts the last places alone: those that a student wrote after a prompt."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask).logits[:, -WRITTEN - 1 : -1]


def cross_entropy(model, batch):
    """The task's loss: how well a model predicts the tokens that are there."""
    ids, mask = batch
    logits = model(ids, mask)
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, -WRITTEN:])


def student_and_teacher(vocabulary):
    """Return two language models of one vocabulary, the teacher the wider one; without dropout, seeded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = {"vocab_size": vocabulary, "n_positions": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    # Weights ten times as large as usual: two models that know nothing would predict the same.
    return [
        GPT2LMHeadModel(GPT2Config(**shape, **still, n_embd=width, eos_token_id=0, initializer_range=0.2))
        for width in (8, 16)
    ]


def one_step_of_trl(student, teacher, tokenizer, *, temperature, folder):
    """Take one step of 2 × 2 samples that the student writes; return its loss, the gradient, ids and mask."""
    import datasets
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    gradient = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *_, model, **__):
            gradient.update({name: p.grad.clone() for name, p in model.named_parameters()})

    config = DistillationConfig(
        output_dir=str(folder),
        beta=0.0,
        temperature=temperature,
        max_completion_length=WRITTEN,
        generation_kwargs={"min_new_tokens": WRITTEN},  # equally long, as samples are here
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,  # no clipping
        learning_rate=0.1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a b", "a b c d", "b c", "a"]}),
        processing_class=tokenizer,
        callbacks=[Keep()],
    )
    loss = trainer.train().training_loss
    batches = trainer._buffered_inputs  # what the step was taken on
    assert [len(batch["completion_ids"]) for batch in batches] == [2, 2]
    assert all(batch["completion_mask"].all() for batch in batches)
    parts = ("prompt", "completion")
    ids, mask = (
        torch.cat([torch.cat([batch[f"{part}_{kind}"] for part in parts], dim=1) for batch in batches])
        for kind in ("ids", "mask")
    )
    return loss, gradient, ids, mask


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_step_of_trls_trainer_has_loss_and_gradient_of_ours(trl, tmp_path, temperature):
    """`DistillationTrainer` itself, in two micro-batches of two; ours has the four samples in one."""
    from transformers import PreTrainedTokenizerFast

    end = "<end>"
    raw = make_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, pad_token=end)
    student, teacher = student_and_teacher(len(tokenizer))
    before = copy.deepcopy(student).train()
    theirs, gradient, ids, mask = one_step_of_trl(
        student, teacher, tokenizer, temperature=temperature, folder=tmp_path / "run"
    )
    assert not mask.all(), "prompts of different lengths should be padded"
    loss = DistilledLoss(cross_entropy, Completions(teacher), temperature=temperature, weight=1.0)
    ours = loss(Completions(before), (ids, mask))
    ours.backward()
    assert theirs > 0.01
    assert ours.item() == pytest.approx(temperature**2 * theirs, rel=1e-5)
    found = {name: p.grad for name, p in before.named_parameters()}
    largest = max(part.abs().max().item() for part in found.values())
    expected = {name: temperature**2 * part for name, part in gradient.items()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * largest)
    moved = [(p - q).abs().max() for p, q in zip(student.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 0.01, "the trainer should have taken its step"
