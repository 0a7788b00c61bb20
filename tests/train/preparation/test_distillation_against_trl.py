"""The loss of distillation against that of `trl`, an implementation by others, where it is installed."""

from __future__ import annotations

import math

import pytest
import torch

from dptrain.train.preparation.distillation import divergence

SAMPLES, LENGTH, WIDTH, VOCABULARY = 3, 5, 16, 11


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
