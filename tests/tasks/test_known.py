"""Known answers: closed forms against figures, against samples, and against every sample's gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dptrain.errors import ConfigError, TaskError
from dptrain.tasks import KnownAnswer, check_task, digits, exact_noise, known_answer, linear, quadratic
from dptrain.tasks.known import GaussianSamples


def _gradients(task):
    """Gradient of every training sample, in float64, by the formula of the problem."""
    samples = task.train_data.draw(torch.arange(len(task.train_data))).double()
    model = task.model
    return samples if task.name == "linear" else model.curvature.double() * (model.theta.detach().double() - samples)


def test_quadratic_has_its_published_figures():
    """At the start tr(Σ) = 18.79, |G|² = 18.09, and their ratio is 1.03870."""
    answer = known_answer(quadratic())
    assert answer.noise_trace == pytest.approx(18.79, rel=1e-6)
    assert answer.grad_sq_norm == pytest.approx(18.09, rel=1e-6)
    assert answer.simple_noise_scale == pytest.approx(1.03870, rel=1e-5)


def test_quadratic_answer_follows_the_parameters():
    """Twice as far from the minimum |G|² is four times as large, and tr(Σ) is the same."""
    task = quadratic()
    near = known_answer(task)
    with torch.no_grad():
        task.model.theta.mul_(2)
    far = known_answer(task)
    assert far.grad_sq_norm == pytest.approx(4 * near.grad_sq_norm)
    assert far.noise_trace == near.noise_trace


def test_linear_answer_is_its_options():
    """tr(Σ) is the dimension and |G|² what was asked for, wherever the weights are."""
    task = linear(dimension=7, grad_sq_norm=3.5)
    with torch.no_grad():
        task.model.weight.add_(5.0)
    assert known_answer(task) == KnownAnswer(grad_sq_norm=pytest.approx(3.5), noise_trace=7.0)


@pytest.mark.parametrize("build", [quadratic, linear])
def test_many_samples_approach_the_closed_form(build):
    """Gradients of 50,000 samples have the mean and covariance of the closed form, within five standard errors."""
    count = 50_000
    task = build(num_samples=count)
    gradients = _gradients(task)
    answer = known_answer(task)
    trace = gradients.var(0).sum().item()
    sq_norm = gradients.mean(0).square().sum().item() - trace / count
    spread = gradients.var(0).square().sum().item()
    assert trace == pytest.approx(answer.noise_trace, abs=5 * math.sqrt(2 * spread / count))
    slope = 2 * math.sqrt(answer.grad_sq_norm) * gradients.std(0).max().item()
    assert sq_norm == pytest.approx(answer.grad_sq_norm, abs=5 * slope / math.sqrt(count))


@pytest.mark.parametrize("build", [quadratic, linear])
def test_exact_noise_agrees_with_the_closed_form_of_the_data_set(build):
    """Over a finite set, exact_noise is the closed form with the set's own mean and covariance in it."""
    task = build(num_samples=300)
    gradients = _gradients(task)
    answer = exact_noise(task.model, task.loss, task.train_data)
    assert answer.noise_trace == pytest.approx(gradients.var(0).sum().item(), rel=1e-5)
    assert answer.grad_sq_norm == pytest.approx(gradients.mean(0).square().sum().item(), rel=1e-5)


def test_exact_noise_of_digits_agrees_with_torch_func():
    """On the digits MLP the loop over samples equals vectorised per-sample gradients of torch.func."""
    torch.manual_seed(0)
    task = digits()
    pixels, classes = (tensor[:64] for tensor in task.train_data.tensors)
    parameters = dict(task.model.named_parameters())

    def sample_loss(values, pixel, label):
        logits = torch.func.functional_call(task.model, values, (pixel[None],))
        return nn.functional.cross_entropy(logits, label[None])

    per_sample = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0))(parameters, pixels, classes)
    gradients = torch.cat([gradient.flatten(1) for gradient in per_sample.values()], dim=1).double()
    answer = exact_noise(task.model, task.loss, [task.train_data[index] for index in range(64)])
    assert answer.noise_trace == pytest.approx(gradients.var(0).sum().item(), rel=1e-5)
    assert answer.grad_sq_norm == pytest.approx(gradients.mean(0).square().sum().item(), rel=1e-5)


def test_batches_without_replacement_find_the_unbiased_trace():
    """Over all pairs in a set of D, half the squared difference averages to tr(Σ), the product to |G|² − tr(Σ)/D."""
    task = quadratic(num_samples=12)
    answer = exact_noise(task.model, task.loss, task.train_data)
    gradients = _gradients(task)
    pairs = [(gradients[i], gradients[j]) for i in range(12) for j in range(i)]
    trace = sum(float((one - other).square().sum()) / 2 for one, other in pairs) / len(pairs)
    product = sum(float(one @ other) for one, other in pairs) / len(pairs)
    assert trace == pytest.approx(answer.noise_trace, rel=1e-5)
    assert product == pytest.approx(answer.grad_sq_norm - answer.noise_trace / 12, rel=1e-4)


def test_exact_noise_counts_unused_parameters_as_zero_and_leaves_gradients_alone():
    """A parameter that the loss does not reach adds nothing, and no .grad is touched."""
    task = linear(dimension=3, num_samples=10)
    alone = exact_noise(task.model, task.loss, task.train_data)
    task.model.unused = nn.Parameter(torch.ones(2))
    assert exact_noise(task.model, task.loss, task.train_data) == alone
    assert task.model.weight.grad is None


def test_one_sample_has_no_covariance():
    """exact_noise refuses a single sample."""
    task = quadratic()
    with pytest.raises(TaskError, match="at least two samples, got 1"):
        exact_noise(task.model, task.loss, [task.train_data[0]])


def test_sample_is_a_function_of_seed_and_index():
    """The same index gives the same sample alone, in any company and in a new data set; another seed gives another."""
    data = quadratic(seed=3).train_data
    together = data.draw(torch.tensor([5, 1_000_000, 0]))
    assert torch.equal(data[1_000_000], together[1])
    assert torch.equal(torch.stack(data.__getitems__([0, 5])), together[[2, 0]])
    assert torch.equal(quadratic(seed=3, num_samples=6).train_data[5], together[0])
    assert not torch.equal(quadratic(seed=4).train_data[5], together[0])
    assert not torch.equal(quadratic(seed=3).eval_data[5], together[0])


def test_samples_are_independent_and_normal():
    """Neighbours, components and seeds are uncorrelated, and the quantiles are those of the normal law."""
    count = 100_000
    first, second = (
        GaussianSamples(mean=torch.zeros(2), std=torch.ones(2), num_samples=count, seed=seed).draw(torch.arange(count))
        for seed in (0, 1)
    )
    assert len(first.unique(dim=0)) == count
    columns = torch.stack((first[:-1, 0], first[1:, 0], first[:-1, 1], second[:-1, 0], second[:-1, 1])).double()
    deviation = (torch.corrcoef(columns) - torch.eye(5)).abs().max().item()
    assert deviation < 5 / math.sqrt(count)
    for z in (-2.0, -1.0, 0.0, 1.0, 2.0):
        share = (first < z).double().mean().item()
        expected = torch.special.ndtr(torch.tensor(z, dtype=torch.float64)).item()
        assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / (2 * count)))


def test_samples_end_at_the_length():
    """An index outside the data set is refused, so that a loop over it ends."""
    data = quadratic(num_samples=5).train_data
    assert len(list(data)) == len(data) == 5
    with pytest.raises(IndexError, match="0 … 4"):
        data[5]


def test_noise_scale_without_signal_is_infinite():
    """Where the mean gradient vanishes the ratio is infinite, not an error."""
    assert known_answer(linear(grad_sq_norm=0.0)).simple_noise_scale == math.inf


@pytest.mark.parametrize("build", [quadratic, linear])
def test_known_tasks_can_be_trained(build):
    """Both pass the check that every task passes before training."""
    check_task(build())


def test_other_tasks_have_no_closed_form():
    """known_answer says so for a task whose answer only exact_noise knows."""
    with pytest.raises(TaskError, match="exact_noise"):
        known_answer(digits())


@pytest.mark.parametrize(
    ("build", "options"),
    [(quadratic, {"num_samples": 1}), (linear, {"dimension": 0}), (linear, {"grad_sq_norm": -1.0})],
)
def test_impossible_problems_are_refused(build, options):
    """A size below its bound gives one sentence with the value."""
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        build(**options)
