"""Problems whose noise is known: their truths agree with one another, and copies of them do not disturb each other."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.problems import PROBLEMS, Mixture, digits_with_replacement, linear, quadratic, variances


@pytest.mark.parametrize("make_problem", [quadratic, linear, variances, digits_with_replacement])
def test_the_truth_in_every_element_adds_up(make_problem):
    """With all elements weighed alike it is the truth of the problem, and it scales as squares do."""
    problem = make_problem()
    elements = problem.elements()
    scale = torch.ones_like(elements.mean)
    for factor in (1.0, 3.0):
        answer = elements.answer(scale=factor * scale)
        assert answer.noise_trace == pytest.approx(factor**2 * problem.truth.noise_trace, rel=1e-5)
        assert answer.grad_sq_norm == pytest.approx(factor**2 * problem.truth.grad_sq_norm, rel=1e-5)
    half = elements.answer(scale=scale * (torch.arange(len(scale)) < len(scale) // 2))
    assert 0 < half.noise_trace < problem.truth.noise_trace


def test_each_copy_has_the_gradient_of_a_plain_model():
    """In a mixture of all problems every copy gets what its own samples give the model alone."""
    problems = [make_problem() for make_problem in PROBLEMS]
    mixture = Mixture(problems, num_copies=2)
    generator = torch.Generator().manual_seed(3)
    samples = [problem.draw(generator, (2, 6)).transpose(0, 1) for problem in problems]
    mixture(*samples).mean().backward()
    for problem, copies, seen in zip(problems, mixture.copies(), samples, strict=True):
        for number, own in enumerate(copies):
            alone = torch.autograd.grad(problem.model(seen[:, number]).mean(), list(problem.model.parameters()))
            for found, expected in zip(own.parameters(), alone, strict=True):
                torch.testing.assert_close(found.grad, expected, rtol=1e-4, atol=1e-6, msg=problem.name)
