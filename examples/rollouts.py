"""GRPO-like training on a small reasoning task: how many rollouts a step is worth, and from prompts or within them?"""
# python -m examples.rollouts [--steps 300]

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import dptrain
from dptrain.noise.rollouts import PromptNorms, rollout_moments

NUM_DIGITS, LENGTH, GROUP = 4, 3, 8


class Policy(nn.Module):
    """Answers a prompt of digits with as many digits, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(LENGTH * NUM_DIGITS, 48), nn.Tanh(), nn.Linear(48, LENGTH * NUM_DIGITS))

    def forward(self, prompts: Tensor) -> Tensor:
        """Return log-probabilities, (rollouts, LENGTH, NUM_DIGITS)."""
        one_hot = nn.functional.one_hot(prompts, NUM_DIGITS).float().flatten(1)
        found: Tensor = self.net(one_hot).view(-1, LENGTH, NUM_DIGITS)
        return found.log_softmax(-1)


def reward(prompts: Tensor, answers: Tensor) -> Tensor:
    """Return the share of digits that are the prompt's, in reverse."""
    return (answers == prompts.flip(1)).float().mean(1)


def rollouts(policy: Policy, prompt: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sample answers to one prompt; return prompts, answers and group-relative advantages."""
    prompts = prompt.expand(count, -1)
    with torch.no_grad():
        chances = policy(prompts[:1]).exp()[0]
    answers = torch.multinomial(chances, count, replacement=True, generator=generator).T
    found = reward(prompts, answers)
    return prompts, answers, (found - found.mean()) / (found.std() + 0.1)


def loss_of(policy: nn.Module, prompts: Tensor, answers: Tensor, advantages: Tensor) -> Tensor:
    """Return the mean over rollouts of −advantage · log π."""
    chosen: Tensor = policy(prompts).gather(2, answers[:, :, None]).squeeze(2).sum(1)
    return -(advantages * chosen).mean()


def gradient(policy: Policy, *rollout: Tensor) -> Tensor:
    """Return one flat gradient, beside the training."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(policy, *rollout), list(policy.parameters()))])


def split_noise(policy: Policy, prompts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, float]:
    """Return the noise (within, between) prompts of one step, weighted by rollouts."""
    norms, means, sizes = [], [], []
    for rollout in prompts:
        size = len(rollout[0])
        halves = [[part[: size // 2] for part in rollout], [part[size // 2 :] for part in rollout]]
        means.append(gradient(policy, *rollout) * size)
        sizes.append(size)
        norms.append(
            PromptNorms(
                part_sq_norms=[float(gradient(policy, *half).square().sum()) for half in halves],
                part_sizes=[len(half[0]) for half in halves],
                sq_norm=float((means[-1] / size).square().sum()),
                weight=size,
            )
        )
    whole = torch.stack(means).sum(0) / sum(sizes)
    moments = rollout_moments(norms, large_sq_norm=float(whole.square().sum()))
    return moments.within, moments.between


def train(num_steps: int) -> tuple[dptrain.Meter, list[float], tuple[float, float]]:
    """Train; return the meter, the mean reward of each step, and the noise within and between prompts."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    meter = dptrain.attach(policy, every=1)
    rewards, within, between = [], 0.0, 0.0
    for _ in range(num_steps):
        # The number of rollouts varies from step to step and from prompt to prompt, as with a time limit.
        drawn = torch.randint(0, NUM_DIGITS, (4, LENGTH), generator=generator)
        counts = (GROUP + torch.randint(-4, 5, (4,), generator=generator)).tolist()
        prompts = [rollouts(policy, prompt, count, generator) for prompt, count in zip(drawn, counts, strict=True)]
        parts = split_noise(policy, prompts)
        within, between = within + parts[0] / num_steps, between + parts[1] / num_steps
        for rollout in prompts:
            share = len(rollout[0]) / sum(counts)
            meter.begin(num_samples=len(rollout[0]), weight=share)
            (loss_of(policy, *rollout) * share).backward()
        meter.step()
        optimizer.step()
        optimizer.zero_grad()
        rewards.append(float(torch.cat([reward(p, a) for p, a, _ in prompts]).mean()))
    meter.remove()
    return meter, rewards, (within, between)


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    meter, rewards, (within, between) = train(parser.parse_args().steps)
    print(f"reward {sum(rewards[:20]) / 20:.2f} → {sum(rewards[-20:]) / 20:.2f}")
    print(f"noise scale in rollouts of independent prompts: {meter.reading}")
    print(f"noise within prompts {within:.3g}, between prompts {between:.3g}, per rollout and per prompt")


if __name__ == "__main__":
    main()
