"""Task functions on which no constant of the batch law was tuned, small enough for hundreds of trainings."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Subset, TensorDataset

from dptrain.tasks import Task
from dptrain.tasks.base import Batch
from dptrain.tasks.digits import digits
from dptrain.tasks.pysource import pysource
from dptrain.tasks.resolve import resolve_task

_NUM_HELD_OUT = 512
_COPIES = 16
_NOISE = 0.5
_BASELINE = 0.5
"""Expected reward that the policy gradient subtracts: half of the largest, so that a wrong action counts, too."""


def lstm_bytes() -> Task:
    """Return `pysource` with an LSTM of one layer of 64 and 16 bytes of context."""
    return _fewer_held_out(pysource(model="lstm", context=16, width=64, depth=1))


def gpt_bytes() -> Task:
    """Return `pysource` with a GPT of 3.3 M parameters and 64 bytes of context."""
    return _fewer_held_out(pysource(context=64, width=256, depth=4, heads=4))


def mnist1d_mlp() -> Task:
    """Return `mnist1d` with its MLP."""
    return resolve_task("mnist1d", options={"model": "mlp"})


def mnist1d_cnn() -> Task:
    """Return `mnist1d` with its convolutions."""
    return resolve_task("mnist1d", options={"model": "cnn"})


def denoiser() -> Task:
    """Predict the noise in a digit: 64 noisy pixels and the noise level in, 64 numbers out, levels drawn once."""
    task = digits()
    held_out, train = (
        _noisy(_tensors(data)[0], seed=seed) for seed, data in enumerate((task.eval_data, task.train_data))
    )
    model = nn.Sequential(nn.Linear(65, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64))
    return replace(task, name="denoiser", model=model, train_data=train, eval_data=held_out, loss=_noise_error)


def policy_gradient() -> Task:
    """Name a digit by an action that is drawn from the policy, and learn from the reward of that action alone.

    The draws are part of the samples, so that a run is a function of its seed. The loss has the value of the expected
    error rate and the gradient of REINFORCE with a constant baseline.
    """
    task = digits()
    held_out, train = (_drawn(_tensors(data), seed=seed) for seed, data in enumerate((task.eval_data, task.train_data)))
    return replace(task, name="policy-gradient", train_data=train, eval_data=held_out, loss=_policy_loss)


def _fewer_held_out(task: Task) -> Task:
    held_out = task.eval_sets[""]
    num_windows = len(held_out)  # type: ignore[arg-type]
    return replace(task, eval_data=Subset(held_out, range(0, num_windows, max(1, num_windows // _NUM_HELD_OUT))))


def _tensors(data: object) -> tuple[Tensor, ...]:
    assert isinstance(data, TensorDataset), "the digits are tensors"
    return data.tensors


def _noisy(pixels: Tensor, *, seed: int) -> TensorDataset:
    """Return (pixels with noise, level) and the noise, each image with several draws."""
    generator = torch.Generator().manual_seed(seed)
    copies = pixels.repeat(_COPIES, 1)
    levels = torch.rand(len(copies), 1, generator=generator)
    noise = torch.randn(copies.shape, generator=generator)
    return TensorDataset(torch.cat([copies + _NOISE * 2 * levels * noise, levels], dim=1), noise)


def _noise_error(model: nn.Module, batch: Batch) -> Tensor:
    noisy, noise = batch
    return functional.mse_loss(model(noisy), noise)


def _drawn(tensors: tuple[Tensor, ...], *, seed: int) -> TensorDataset:
    """Return pixels, classes and a uniform number for each draw of an action."""
    generator = torch.Generator().manual_seed(seed)
    pixels, classes = tensors[0].repeat(_COPIES, 1), tensors[1].repeat(_COPIES)
    return TensorDataset(pixels, classes, torch.rand(len(classes), generator=generator))


def _policy_loss(model: nn.Module, batch: Batch) -> Tensor:
    pixels, classes, uniform = batch
    log_policy = functional.log_softmax(model(pixels), dim=1)
    policy = log_policy.detach().exp()
    actions = (policy.cumsum(dim=1) < uniform[:, None]).sum(dim=1).clamp(max=policy.shape[1] - 1)
    reward = (actions == classes).to(policy.dtype)
    surrogate = -((reward - _BASELINE) * log_policy.gather(1, actions[:, None])[:, 0]).mean()
    expected_error = 1 - policy.gather(1, classes[:, None]).mean()
    loss: Tensor = expected_error + surrogate - surrogate.detach()
    return loss
