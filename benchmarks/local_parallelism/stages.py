"""Two processes, each with half of a GPT: trained in pipeline stages by 1F1B, or as local blocks; timed in turns."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dptrain.models.gpt import Gpt, GptConfig, LocalHead

SHAPE: dict[str, Any] = {"context": 64, "width": 128, "depth": 4}
BESIDE_DEVICES: dict[str, Any] = {"context": 16, "width": 16, "depth": 2, "vocab_size": 256}
"""So small that the host's own work does not hide the times of the devices."""
MICRO_BATCH = 8
RATE = 0.2
_AHEAD = 4
"""Micro-batches that the first local block may be ahead by, as the memory of a device would bound it."""


def whole_model(*, local: bool, pass_s: float = 0.0) -> Gpt:
    """Return the model that both processes begin with."""
    torch.manual_seed(0)
    model = Gpt(GptConfig(**(BESIDE_DEVICES if pass_s else SHAPE), local_blocks=2 if local else 1))
    for parameter in model.parameters():  # blocks begin as the identity, where a gradient of zero would agree with any
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def half(model: Gpt, number: int) -> Gpt:
    """Return one half: tokens → stream, or stream → logits, with the parameters of the whole."""
    middle = len(model.blocks) // 2
    # A model of its own whose missing ends pass on what they get, so that both halves run the code of the whole.
    stage = Gpt(replace(model.config, depth=middle, local_blocks=1))
    stage.blocks = nn.ModuleList(list(model.blocks)[number * middle :][:middle])
    stage.embedding = model.embedding if number == 0 else nn.Identity()  # type: ignore[assignment]
    stage.norm = model.norm if number == 1 else nn.Identity()  # type: ignore[assignment]
    stage.output = model.output if number == 1 else nn.Identity()  # type: ignore[assignment]
    return stage


class _Device(torch.autograd.Function):
    """Takes the time that a device would: `seconds` for a forward pass, twice that backward; the core is free."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, seconds: float) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.seconds = seconds
        time.sleep(seconds)
        return stream.view_as(stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ANN401 - as torch declares it
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


class _Stage(nn.Module):
    """A half of the model on a device of its own.

    Args:
        layers: of the half.
        pass_s: seconds of its forward pass on the device; 0 computes on this core alone.
    """

    def __init__(self, layers: nn.Module, *, pass_s: float) -> None:
        super().__init__()
        self.layers = layers
        self._pass_s = pass_s

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the half returns."""
        found: Tensor = self.layers(tokens)
        return _Device.apply(found, self._pass_s) if self._pass_s else found  # type: ignore[no-untyped-call]


def windows(step: int, num_micro_batches: int, *, context: int) -> Tensor:
    """Return the samples of a step, shape (samples, context + 1)."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (num_micro_batches * MICRO_BATCH, context + 1), generator=generator)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over the tokens of a micro-batch."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Pipeline:
    """Both halves by 1F1B: a micro-batch goes forward through both and back, and a step ends when all have.

    Args:
        rank: which half.
        num_micro_batches: in a step.
        pass_s: seconds of a stage's forward pass on its device.
    """

    def __init__(self, rank: int, num_micro_batches: int, *, pass_s: float = 0.0) -> None:
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B

        self._rank, self._number = rank, num_micro_batches
        model = whole_model(local=False, pass_s=pass_s)
        self._context = model.config.context
        self.module: nn.Module = _Stage(half(model, rank), pass_s=pass_s)
        stage = PipelineStage(self.module, rank, 2, torch.device("cpu"))
        self._schedule = Schedule1F1B(stage, n_microbatches=num_micro_batches, loss_fn=cross_entropy)
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=RATE)

    def steps(self, first: int, count: int) -> None:
        """Take some steps."""
        for step in range(first, first + count):
            samples = windows(step, self._number, context=self._context)
            if self._rank == 0:
                self._schedule.step(samples[:, :-1])
            else:
                self._schedule.step(target=samples[:, 1:])
            self._optimizer.step()
            self._optimizer.zero_grad()


class LocalBlocks:
    """Both halves by a loss of their own: the first hands its stream on, and nothing comes back.

    Args:
        rank: which half.
        num_micro_batches: in a step.
        pass_s: seconds of a stage's forward pass on its device.
    """

    def __init__(self, rank: int, num_micro_batches: int, *, pass_s: float = 0.0) -> None:
        self._rank, self._number = rank, num_micro_batches
        model = whole_model(local=True, pass_s=pass_s)
        self._config = model.config
        self._trunk = _Stage(half(model, rank), pass_s=pass_s)
        heads: list[LocalHead] = [head for head in model.local_heads.values() if isinstance(head, LocalHead)]
        self._head: nn.Module = heads[0] if rank == 0 else nn.Identity()
        self.module: nn.Module = nn.ModuleList([self._trunk, self._head])
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=RATE)
        self._sent: deque[tuple[Any, Tensor]] = deque()

    def steps(self, first: int, count: int) -> None:
        """Take some steps; the first half may begin one while the second still works on the one before."""
        expected = self._received(count * self._number) if self._rank == 1 else None
        for step in range(first, first + count):
            for samples in windows(step, self._number, context=self._config.context).chunk(self._number):
                logits = self._head(self._sent_on(samples[:, :-1])) if expected is None else self._trunk(next(expected))
                (cross_entropy(logits, samples[:, 1:]) / self._number).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            self._optimizer.zero_grad()
        while self._sent:
            self._sent.popleft()[0].wait()

    def _sent_on(self, tokens: Tensor) -> Tensor:
        stream: Tensor = self._trunk(tokens)
        while len(self._sent) >= _AHEAD:
            self._sent.popleft()[0].wait()
        message = stream.detach()
        self._sent.append((dist.isend(message, 1), message))
        return stream

    def _received(self, count: int) -> Any:  # noqa: ANN401 - a generator of tensors
        """Yield what the first half sends, the next one on its way while one is used."""

        def begin() -> tuple[Any, Tensor]:
            buffer = torch.empty(MICRO_BATCH, self._config.context, self._config.width)
            return dist.irecv(buffer, 0), buffer

        coming = begin()
        for number in range(count):
            work, buffer = coming
            work.wait()
            if number + 1 < count:
                coming = begin()
            yield buffer


WAYS: dict[str, Callable[..., Any]] = {"1F1B": Pipeline, "local blocks": LocalBlocks}


def timed(rank: int, world_size: int, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each round, number of micro-batches and way: seconds, the share of them in want of a core, CPU time.

    The latter two are of the process that has more.

    Args:
        rank: which half.
        world_size: 2.
        settings: `counts` of micro-batches, `steps` in a round, `rounds` of each way, in turns whose order alternates,
            and `pass_s`, the seconds of a stage's forward pass on its device.
    """
    del world_size
    steps, pass_s = settings["steps"], settings["pass_s"]
    ways = {
        (name, count): make(rank, count, pass_s=pass_s) for count in settings["counts"] for name, make in WAYS.items()
    }
    for way in ways.values():  # shapes are agreed in the first step of a pipeline, memory is found
        way.steps(0, 2)
    found = []
    for number in range(settings["rounds"]):
        for name, count in list(ways)[:: 1 if number % 2 else -1]:
            dist.barrier()
            began_s, waited_s, cpu_s = time.perf_counter(), _waited_for_core_s(), time.thread_time()
            ways[name, count].steps(2 + number * steps, steps)
            busy = [_waited_for_core_s() - waited_s, time.thread_time() - cpu_s]
            dist.barrier()
            seconds = time.perf_counter() - began_s
            largest = torch.tensor(busy, dtype=torch.float64)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            row = {"way": name, "micro_batches": count, "seconds": seconds}
            found.append({**row, "waited": float(largest[0]) / seconds, "cpu_s": float(largest[1])})
    return found


def _waited_for_core_s() -> float:
    """Return the seconds for which this thread could have run and had no core: other work on the machine."""
    return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9


def trained(rank: int, world_size: int, steps: int, count: int, pass_s: float) -> dict[str, list[list[float]]]:
    """Return the parameters of both halves after some steps, by way, for a comparison with one process."""
    del world_size
    found: dict[str, list[list[float]]] = {}
    for name, make in WAYS.items():
        way = make(rank, count, pass_s=pass_s)
        way.steps(0, steps)
        own = nn.utils.parameters_to_vector(way.module.parameters()).detach()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        dist.all_gather(sizes, torch.tensor([own.numel()]))
        longest = max(int(size) for size in sizes)
        both = [torch.zeros(longest) for _ in range(2)]
        dist.all_gather(both, functional.pad(own, (0, longest - own.numel())))
        found[name] = [vector[: int(size)].tolist() for vector, size in zip(both, sizes, strict=True)]
    return found


def trained_alone(steps: int, count: int, *, pass_s: float) -> dict[str, list[list[float]]]:
    """Return the same of one process with the whole model."""
    found = {}
    for name in WAYS:
        local = name == "local blocks"
        model = whole_model(local=local, pass_s=pass_s)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        for step in range(steps):
            samples = windows(step, count, context=model.config.context)
            out = model(samples[:, :-1])
            all_logits = (*out.local_logits, out.logits) if local else (out,)
            torch.stack([cross_entropy(logits, samples[:, 1:]) for logits in all_logits]).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        halves = [[*half(model, number).parameters()] for number in range(2)]
        halves[0] += model.local_heads.parameters()
        found[name] = [nn.utils.parameters_to_vector(own).detach().tolist() for own in halves]
    return found
