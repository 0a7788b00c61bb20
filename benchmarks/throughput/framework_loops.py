"""The same step in a hand-written DDP loop, accelerate, Lightning, the HF Trainer and dptrain, one at a time."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from dptrain.tasks import Task
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    Trainer,
)

HAND, ACCELERATE, LIGHTNING, TRANSFORMERS, DPTRAIN = "hand-written", "accelerate", "lightning", "hf trainer", "dptrain"
NEVER = 10**9
_RATE, _BETAS, _DECAY, _CLIP = 1e-3, (0.9, 0.95), 0.1, 1.0
_LOG_EVERY = 50


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What all loops train.

    Attributes:
        name: for people.
        build: makes the task anew, with the same parameters each time.
        micro_batch_size: samples of a replica in a step.
    """

    name: str
    build: Callable[[], Task]
    micro_batch_size: int


Loop = Iterator[object]
"""Each `next` takes one optimizer step."""


def make_loop(name: str, problem: Problem, *, folder: Path, every: int) -> Loop:
    """Return a loop; it is set up at its first step.

    Args:
        name: of the framework.
        problem: the same for all.
        folder: for what it writes.
        every: steps between two that dptrain measures.
    """
    _as_under_torchrun()
    torch.manual_seed(0)
    if name == DPTRAIN:
        return _dptrain(problem, folder=folder, every=every)
    if name in (LIGHTNING, TRANSFORMERS):
        return _Turns(lambda pause: {LIGHTNING: _lightning, TRANSFORMERS: _transformers}[name](problem, folder, pause))
    return {HAND: _hand_written, ACCELERATE: _accelerate}[name](problem)


def _as_under_torchrun() -> None:
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": "0", "WORLD_SIZE": world_size}
    os.environ |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29499"}


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": _DECAY},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _optimizer(model: nn.Module) -> torch.optim.AdamW:
    groups = [group for group in _groups(model) if group["params"]]
    return torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS, fused=True)


def _batches(problem: Problem, task: Task) -> DataLoader[Any]:
    data: Any = task.train_data
    sampler: Any = DistributedSampler(data, shuffle=True, seed=0)
    return DataLoader(data, batch_size=problem.micro_batch_size, sampler=sampler, drop_last=True)


def _endless(loader: DataLoader[Any]) -> Iterator[Any]:
    for epoch in range(NEVER):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        yield from loader


def _hand_written(problem: Problem) -> Loop:
    task = problem.build()
    model = DistributedDataParallel(task.model)
    optimizer = _optimizer(model)
    for step, batch in enumerate(_endless(_batches(problem, task)), start=1):
        loss: Any = task.loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _LOG_EVERY == 0:
            loss.item()
        yield step


def _accelerate(problem: Problem) -> Loop:
    from accelerate import Accelerator

    task = problem.build()
    accelerator = Accelerator(cpu=True)
    data: Any = task.train_data
    loader = DataLoader(data, batch_size=problem.micro_batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(task.model, _optimizer(task.model), loader)
    for step, batch in enumerate(_endless(loader), start=1):
        with accelerator.accumulate(model):
            loss: Any = task.loss(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()
        if step % _LOG_EVERY == 0:
            loss.item()
        yield step


def _dptrain(problem: Problem, *, folder: Path, every: int) -> Loop:
    config = TrainConfig(
        run_dir=str(folder / "run"),
        max_samples=NEVER,
        global_batch_size=problem.micro_batch_size * dist.get_world_size(),
        micro_batch_size=problem.micro_batch_size,
        device="cpu",
        control=ControlConfig(law="constant"),
        noise=NoiseConfig(every=every),
        optimizer=OptimizerConfig(learning_rate=_RATE, schedule="constant", warmup_samples=0),
        checkpoint=CheckpointConfig(every_samples=NEVER),
        log=LogConfig(tracker="none", every_steps=_LOG_EVERY, print_every_steps=NEVER, eval_every_samples=NEVER),
    )
    trainer = Trainer(config, task=problem.build)
    with contextlib.redirect_stdout(io.StringIO()):
        yield from trainer.steps()


class _Turns:
    """Runs a framework's own loop in a thread that goes on for one step at each `next`, and stands still else.

    Args:
        run: is given a function that the framework calls after each step.
    """

    def __init__(self, run: Callable[[Callable[[], None]], object]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def _work(self, run: Callable[[Callable[[], None]], object]) -> None:
        self._go.acquire()
        try:
            run(self._pause)
        except BaseException as error:  # noqa: BLE001 - raised where the step was asked for
            self._error = error
            self._done.release()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()

    def __iter__(self) -> _Turns:
        return self

    def __next__(self) -> object:
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return None


def _lightning(problem: Problem, folder: Path, pause: Callable[[], None]) -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    task = problem.build()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = task.model

        def forward(self, *arguments: Tensor) -> Tensor:
            found: Tensor = self.inner(*arguments)
            return found

        def training_step(self, batch: Any, _index: int) -> Any:  # noqa: ANN401 - as Lightning calls it
            return task.loss(self.inner, batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return _optimizer(self)

    class Pause(pl.Callback):
        def on_train_batch_end(self, *_: object) -> None:
            pause()

    data: Any = task.train_data
    loader = DataLoader(data, batch_size=problem.micro_batch_size, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_steps=NEVER,
        gradient_clip_val=_CLIP,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Pause()],
        default_root_dir=str(folder),
    )
    trainer.fit(Module(), loader)


def _transformers(problem: Problem, folder: Path, pause: Callable[[], None]) -> None:
    from transformers import Trainer as HfTrainer
    from transformers import TrainerCallback, TrainingArguments

    task = problem.build()

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = task.model

        def forward(self, batch: Any) -> dict[str, Any]:  # noqa: ANN401 - a micro-batch
            return {"loss": task.loss(self.inner, batch)}

    class Pause(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - as transformers calls it
            pause()

    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=problem.micro_batch_size,
        max_steps=NEVER,
        learning_rate=_RATE,
        lr_scheduler_type="constant",
        weight_decay=_DECAY,
        adam_beta1=_BETAS[0],
        adam_beta2=_BETAS[1],
        max_grad_norm=_CLIP,
        optim="adamw_torch_fused",
        logging_steps=_LOG_EVERY,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_drop_last=True,
        remove_unused_columns=False,
    )
    data: Any = task.train_data
    collate = torch.utils.data.default_collate
    trainer = HfTrainer(
        model=WithLoss(),
        args=arguments,
        train_dataset=data,
        data_collator=lambda samples: {"batch": collate(samples)},
        callbacks=[Pause()],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
