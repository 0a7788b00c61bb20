"""The noise of policy gradients, in two parts: between prompts, and within a prompt between its rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dptrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PromptNorms:
    """The squared norms of one prompt's gradient in one step.

    Attributes:
        part_sq_norms: ‖g_pk‖² of the mean gradient of each part of its rollouts, at least two.
        part_sizes: rollouts in each part.
        sq_norm: ‖g_p‖² of the mean over all of them.
        weight: w_p, of the prompt in the step's gradient Σ w_p·g_p; only ratios matter.
    """

    part_sq_norms: Sequence[float]
    part_sizes: Sequence[float]
    sq_norm: float
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class RolloutMoments:
    """One step's unbiased, signed estimates.

    Attributes:
        within: trace of the covariance of a rollout's gradient about its prompt's mean.
        between: trace of the covariance of the prompts' mean gradients.
        grad_sq_norm: |G|², squared norm of the gradient over all prompts and rollouts.
        num_rollouts: of the step.
    """

    within: float
    between: float
    grad_sq_norm: float
    num_rollouts: float

    def prompt_trace(self, rollouts_per_prompt: float) -> float:
        """Return tr(Σ) where a sample is a prompt with so many rollouts: between + within/n."""
        return self.between + self.within / rollouts_per_prompt


def rollout_moments(prompts: Sequence[PromptNorms], *, large_sq_norm: float) -> RolloutMoments:
    """Split the noise of one step's policy gradient.

    More rollouts of the same prompts lower only the part within, so the two parts say whether a larger batch should
    have more prompts or more rollouts of each. With s_p the estimate within prompt p of n_p rollouts, both are solved
    from E Σ w_p‖g_p‖² − E‖g‖² = Σ (w_p − w_p²)(between + s_p/n_p), for any sizes and weights.

    Args:
        prompts: at least two, with weights above 0.
        large_sq_norm: ‖Σ w_p g_p‖², the weights made to add up to one.

    Raises:
        ConfigError: for fewer than two prompts, or a prompt with fewer than two parts.
    """
    if len(prompts) < 2 or any(len(p.part_sizes) < 2 for p in prompts):  # noqa: PLR2004 - a difference needs two
        raise ConfigError(
            "the noise within and between prompts needs two prompts, and two parts of each one's rollouts"
        )
    total = sum(p.weight for p in prompts)
    weights = [p.weight / total for p in prompts]
    sizes = [float(sum(p.part_sizes)) for p in prompts]
    noise = [_within(p, size) for p, size in zip(prompts, sizes, strict=True)]
    small = sum(w * p.sq_norm for w, p in zip(weights, prompts, strict=True))
    explained = sum((w - w * w) * s / n for w, s, n in zip(weights, noise, sizes, strict=True))
    between = (small - large_sq_norm - explained) / (1 - sum(w * w for w in weights))
    return RolloutMoments(
        within=sum(w * s for w, s in zip(weights, noise, strict=True)),
        between=between,
        grad_sq_norm=large_sq_norm
        - sum(w * w * (between + s / n) for w, s, n in zip(weights, noise, sizes, strict=True)),
        num_rollouts=sum(sizes),
    )


def _within(prompt: PromptNorms, size: float) -> float:
    """Return the estimate of tr(Cov) of one prompt's rollouts: formula F3, whose c1 − c2 is (K − 1)/n here."""
    small = sum(b / size * s for b, s in zip(prompt.part_sizes, prompt.part_sq_norms, strict=True))
    return (small - prompt.sq_norm) * size / (len(prompt.part_sizes) - 1)
