"""The language models and batches that the parts of the GPU day train; sizes by device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from dptrain.models.gpt import SIZES, Gpt, GptConfig
from dptrain.tasks import Suggestion, Task

Tokens = NDArray[Any]
"""Token values of a whole file."""

TINY = GptConfig(vocab_size=256, context=32, width=64, depth=2, heads=2)
"""Stands in for every size on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and a step.

    Attributes:
        name: of the model.
        config: its shape.
        micro_batch_size: samples in a pass.
        accumulation_steps: passes in a step.
    """

    name: str
    config: GptConfig
    micro_batch_size: int
    accumulation_steps: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.micro_batch_size * self.accumulation_steps * self.config.context


def sizes(*, on_gpu: bool) -> dict[str, Size]:
    """Return the sizes to train by name."""
    if not on_gpu:
        return {"tiny": Size(name="tiny", config=TINY, micro_batch_size=2, accumulation_steps=2)}
    passes = {"124m": (32, 4), "350m": (16, 4), "1.5b": (4, 4)}
    return {
        name: Size(name=name, config=SIZES[name], micro_batch_size=micro, accumulation_steps=steps)
        for name, (micro, steps) in passes.items()
    }


class Windows(Dataset[Tensor]):
    """Windows of a token file through a memory map, as (context + 1) tokens; reads whole micro-batches at once.

    Args:
        tokens: the file's.
        context: tokens that are predicted.
    """

    def __init__(self, tokens: Tokens, *, context: int) -> None:
        self._tokens = tokens
        self._context = context

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._context

    def __getitem__(self, index: int) -> Tensor:
        return self.read_batch(np.array([index]))[0]

    def read_batch(self, indices: Tokens) -> Tensor:
        """Return windows, shape (samples, context + 1)."""
        rows = [self._tokens[i * self._context : (i + 1) * self._context + 1] for i in indices.tolist()]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def made_tokens(*, vocab_size: int, num_tokens: int) -> Tokens:
    """Return tokens of a noisy walk, of which a model can learn something: no data set travels with this script."""
    generator = np.random.default_rng(0)
    steps = generator.integers(0, 7, size=num_tokens) * generator.integers(0, 5, size=num_tokens)
    return (np.cumsum(steps) % vocab_size).astype(np.uint16)


def byte_tokens(root: Path) -> Tokens:
    """Return the bytes of the Python files below a folder, one after the other."""
    texts = [path.read_bytes() for path in sorted(root.rglob("*.py"))[:4000]]
    return np.frombuffer(b"".join(texts), dtype=np.uint8).astype(np.uint16)


def next_token_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy per token, in nats."""
    logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def task_of(size: Size, data: Dataset[Tensor], *, eval_data: Dataset[Tensor] | None = None) -> Callable[[], Task]:
    """Return the function that builds a task of the size."""

    def build() -> Task:
        batch = size.micro_batch_size * size.accumulation_steps
        return Task(
            name=f"gpt-{size.name}",
            model=Gpt(size.config),
            train_data=data,
            eval_data=eval_data,
            loss=next_token_loss,
            suggestion=Suggestion(
                learning_rate=6e-4,
                global_batch_size=batch,
                micro_batch_size=size.micro_batch_size,
                max_samples=1_000_000,
                eval_every_samples=1_000_000,
            ),
        )

    return build
