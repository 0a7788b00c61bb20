"""Whether a task can be trained on several replicas: its parts looked at, then two samples run through its loss."""

from __future__ import annotations

import copy
import inspect
import math
import signal
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter, is_lazy
from torch.utils.data import IterableDataset, default_collate

from dptrain.data.iterable import StreamedSamples
from dptrain.data.source import random_state_kept, state_beside_torch
from dptrain.errors import DptrainError, TaskError
from dptrain.tasks.base import Batch, LossFunction, Suggestion, Task, split_loss

_NUM_CHECKED_SAMPLES = 2
_MOST_PARAMETERS = 200_000_000
"""Of a model whose loss is compared in several ways. Each way is a pass on the CPU before the run starts: a model of
1.5 billion parameters takes some 10 s for one, on two windows of 1,024 tokens and a tera-FLOP/s."""
_MAX_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class CheckedLoss:
    """What the check of a task found out about its loss.

    Attributes:
        unused: names of the parameters that it does not reach.
        parts: names of what it returns beside what is minimised, sorted.
        draws_beside_torch: whether it draws from numpy's or Python's global generator.
    """

    unused: frozenset[str]
    parts: tuple[str, ...]
    draws_beside_torch: bool


def check_task(task: Task) -> CheckedLoss:
    """Run two training samples through a copy of the model, on the CPU in train mode, and look at the loss.

    The task stays as it was: parameters, gradients, buffers, modes, and the random states of torch, numpy and Python;
    lazy modules alone get their parameters. The value need not be finite. Because the loss sees a copy, a loss that
    uses a model of its own instead of the one that it is given is found out too: under data parallelism nobody would
    reduce its gradients.

    Raises:
        TaskError: where a sample, the collation, or the loss raises; where the loss is not a floating-point scalar with
            a graph that reaches a parameter of the model; or where a gradient is one that replicas cannot combine.
    """
    with random_state_kept(), torch.enable_grad():
        samples = _first_samples(task)
        with reported(f"the first two training samples of task {task.name!r} do not make a micro-batch"):
            batch = (task.collate or default_collate)(samples)
        refuse_coroutine(batch, f"what `collate` of task {task.name!r} returns")
        _materialise(task, batch)
        with reported(f"the model of task {task.name!r} cannot be copied"):
            model = copy.deepcopy(task.model).train()
        wrapped, state = _Wrapped(model), state_beside_torch()
        with _explained(wrapped, name=task.name):
            found = task.loss(wrapped, batch)
        draws = state != state_beside_torch()
        refuse_coroutine(found, f"what the loss of task {task.name!r} returns")
        unused = _check_loss(found, model=model, kept=task.model, name=task.name)
    if not wrapped.was_called:
        raise TaskError(
            f"the loss of task {task.name!r} does not call model(…), the one call that replicas synchronise by: call "
            f"it rather than its parts, and put the work of other methods into forward()"
        )
    return CheckedLoss(unused=unused, parts=tuple(sorted(split_loss(found)[1])), draws_beside_torch=draws)


def fewest_samples(task: Task) -> int:
    """Return the fewest samples at a time that the loss is known to take: 1, or 2 where it compares samples.

    A loss over pairs, or one that divides by a deviation, raises or is not finite for a single sample, which the rest
    of a run or an odd batch may leave.

    Args:
        task: one that `check_task` has accepted.
    """
    with random_state_kept(), torch.no_grad():
        model = _Wrapped(copy.deepcopy(task.model)).train()
        two, collate = _first_samples(task), task.collate or default_collate
        takes_one = _is_finite(task, model, collate, two[:1])
        return 1 if takes_one or not _is_finite(task, model, collate, two) else 2


def _is_finite(task: Task, model: nn.Module, collate: Callable[[list[Any]], Batch], samples: list[Any]) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it may say itself that it needs more samples
            return bool(split_loss(task.loss(model, collate(samples)))[0].isfinite())
    except Exception:  # noqa: BLE001 - whatever a user's code raises for too few samples
        return False


def warn_unless_mean(task: Task) -> None:
    """Warn of a loss that is not the mean of what it is of each sample alone; of the first two, in evaluation mode.

    A sum, and a mean over tokens, weights or boxes that differ in number from sample to sample, depend on how a step is
    cut into micro-batches, and the noise scale of such a loss does not count samples. What draws random numbers, or
    takes no single sample, is not compared, nor is a model of more than 200 million parameters.

    Args:
        task: one that `check_task` has accepted.
    """
    if _is_large(task.model):
        return
    with random_state_kept(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single sample
        wrapped, collate = _Wrapped(copy.deepcopy(task.model)).eval(), task.collate or default_collate
        samples, state, beside = _first_samples(task), torch.get_rng_state(), state_beside_torch()
        try:
            together, first, second = (
                split_loss(task.loss(wrapped, collate(part)))[0].item() for part in (samples, samples[:1], samples[1:])
            )
        except Exception:  # noqa: BLE001 - it needs more samples, or training mode
            return
        draws = not torch.equal(torch.get_rng_state(), state) or beside != state_beside_torch()
    mean = (first + second) / 2
    if draws or not math.isfinite(together + mean) or math.isclose(together, mean, rel_tol=0.01, abs_tol=1e-4):
        return
    warnings.warn(
        f"the loss of task {task.name!r} is not a mean over samples: it is {together:.4g} for the first two together, "
        f"{first:.4g} and {second:.4g} for each alone, so that what is trained depends on micro_batch_size, and the "
        "noise scale is not in samples: average within each sample first (over its tokens, say), then over the samples",
        stacklevel=1,
    )


def losses_of_two_samples(task: Task) -> tuple[float | None, float | None]:
    """Return losses by a copy of the model in evaluation mode: of two training samples, and of two held-out ones.

    Replicas compare them: a loss that differs between them, by a sign or by class weights that each process computed
    for itself, trains all of them on something that nobody asked for. None is computed in training mode, in which a
    loss may count what it sees.

    Args:
        task: one that `check_task` and `check_evaluation` have accepted.

    Returns:
        None for a loss where a second call gives another number (noise of its own), or none that is finite; and for the
        held-out one where the task has none apart, or a model of more than 200 million parameters.
    """
    with random_state_kept(), torch.enable_grad():
        model = copy.deepcopy(task.model).eval()
        collate = task.collate or default_collate
        trained = _repeated_loss(task.loss, _Wrapped(model).eval(), collate(_first_samples(task)))
        if task.eval_loss is None or not task.eval_sets or _is_large(model):
            return trained, None
        data: Any = next(iter(task.eval_sets.values()))
        samples = [data[index] for index in range(min(2, len(data)))]
        return trained, _repeated_loss(task.eval_loss, model, collate(samples))


def _is_large(model: nn.Module) -> bool:
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter)) > _MOST_PARAMETERS


def _repeated_loss(loss: LossFunction, model: nn.Module, batch: Batch) -> float | None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        try:
            found.append(split_loss(loss(model, batch))[0].item())
        except Exception:  # noqa: BLE001 - in training mode it ran, which is what counts
            return None
    return found[0] if found[0] == found[1] and math.isfinite(found[0]) else None


class _Wrapped(nn.Module):
    """Stands for what a model is wrapped in on several replicas: it can be called, and has nothing of the model's own.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.was_called = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the model's own
        self.was_called = True
        return self.module(*args, **kwargs)


@contextmanager
def _explained(wrapped: _Wrapped, *, name: str) -> Iterator[None]:
    """Say of a loss that misses something of the model's that the wrapper has none of it."""
    try:
        with reported(f"the loss of task {name!r} does not run on a micro-batch of two samples"):
            yield
    except TaskError as error:
        cause = error.__cause__
        if isinstance(cause, AttributeError) and cause.obj is wrapped and hasattr(wrapped.module, str(cause.name)):
            raise TaskError(
                f"the loss of task {name!r} uses model.{cause.name}, which the wrapper of several replicas does not "
                f"have: call model(…) alone, and put the work of model.{cause.name} into forward()"
            ) from cause
        raise


def _check_suggestion(suggestion: Any, *, name: str) -> None:  # noqa: ANN401 - whatever a user gave
    if not isinstance(suggestion, Suggestion):
        raise TaskError(
            f"the suggestion of task {name!r} must be a dptrain.tasks.Suggestion, got {type(suggestion).__name__}"
        )
    for field in fields(suggestion):
        value, is_rate = getattr(suggestion, field.name), field.name == "learning_rate"
        is_number = type(value) is int or (is_rate and type(value) is float and math.isfinite(value))
        if not is_number or value <= 0:
            kind = "finite number above 0" if is_rate else "whole number of at least 1"
            raise TaskError(f"{field.name} in the suggestion of task {name!r} must be a {kind}, got {value!r:.80}")


def check_parts(task: Task) -> None:
    """Look at the parts of a task without running any.

    Raises:
        TaskError: where one is not what the trainer needs.
    """
    name = task.name
    if not isinstance(name, str) or not name:
        raise TaskError(f"the name of a task must be a text that is not empty, got {name!r:.80}")
    _check_suggestion(task.suggestion, name=name)
    if not isinstance(task.model, nn.Module):
        raise TaskError(f"the model of task {name!r} must be a torch.nn.Module, got {type(task.model).__name__}")
    if not callable(task.loss):
        raise TaskError(f"the loss of task {name!r} must be a function of (model, micro-batch), got {task.loss!r}")
    if task.metrics and task.outputs is None:
        raise TaskError(f"task {name!r} has metrics, and no function `outputs` that gives them something to measure")
    _check_data(task.train_data, f"train_data of task {name!r}", at_least=_NUM_CHECKED_SAMPLES)
    if task.sample_weights is not None:
        _check_weights(task)
    for key, data in task.eval_sets.items():
        _check_data(data, f"eval_data{f'[{key!r}]' if key else ''} of task {name!r}", at_least=1)


def _check_weights(task: Task) -> None:
    if isinstance(task.train_data, StreamedSamples):
        raise TaskError(f"task {task.name!r} weights its samples, but an IterableDataset decides on its own order")
    num_weights, num_samples = 0 if task.sample_weights is None else len(task.sample_weights), len(task.train_data)  # type: ignore[arg-type]
    if num_weights != num_samples:
        raise TaskError(f"task {task.name!r} has {num_weights} sample_weights for {num_samples} samples")


def _check_data(data: Any, what: str, *, at_least: int) -> None:  # noqa: ANN401 - whatever a user gave
    if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__"):
        raise TaskError(
            f"{what} must be a map-style dataset, with __getitem__ and __len__, because the trainer decides the order "
            f"of samples; got {type(data).__name__}"
        )
    with reported(f"{what} has no length"):
        length = len(data)
    if length < at_least:
        raise TaskError(f"{what} must have at least {at_least} samples, got {length}")


def _first_samples(task: Task) -> list[Any]:
    return [_sample(task.train_data, index, name=task.name) for index in range(_NUM_CHECKED_SAMPLES)]


def _sample(data: Any, index: int, *, name: str) -> Any:  # noqa: ANN401 - whatever a user gave
    with reported(f"sample {index} of the training data of task {name!r} cannot be read"):
        sample = data[index]
    refuse_coroutine(sample, f"sample {index} of the training data of task {name!r}")
    return sample


def _materialise(task: Task, batch: Batch) -> None:
    """Give lazy modules their parameters, which data parallelism needs to know before the first pass."""
    if not _is_lazy(task.model):
        return
    was_training = task.model.training
    task.model.eval()  # statistics of batch norms stay as they are
    try:
        with reported(f"the lazy modules of task {task.name!r} cannot be initialised"), torch.no_grad():
            task.loss(task.model, batch)
    finally:
        task.model.train(was_training)
    if _is_lazy(task.model):
        raise TaskError(
            f"the model of task {task.name!r} has lazy modules that its loss does not use: they would never get "
            f"parameters; remove them, or give them their sizes"
        )


def _is_lazy(model: nn.Module) -> bool:
    tensors = (*model.parameters(), *model.buffers())
    return any(isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in tensors)


def _check_loss(found: Any, *, model: nn.Module, kept: nn.Module, name: str) -> frozenset[str]:  # noqa: ANN401 - whatever a user's loss returned
    parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
    if not any(p.numel() for p in parameters.values()):
        raise TaskError(f"the model of task {name!r} has no parameter that requires a gradient")
    loss = _check_scalars(found, name=name)
    device = next(iter(parameters.values())).device
    if loss.device != device:
        raise TaskError(
            f"the loss of task {name!r} is on device {loss.device}, and its model on {device}: "
            "put what the loss makes itself where the micro-batch is"
        )
    if not loss.requires_grad:
        raise TaskError(f"the loss of task {name!r} returned no graph: is there a .detach(), .item() or no_grad in it?")
    with reported(f"the loss of task {name!r} cannot be differentiated"):
        own = {key: p for key, p in kept.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, (*parameters.values(), *own.values()), allow_unused=True)
    gradients, past = found[: len(parameters)], found[len(parameters) :]
    by_name = dict(zip(parameters, gradients, strict=True))
    if all(gradient is None for gradient in gradients):
        raise TaskError(
            f"the loss of task {name!r} reaches no parameter of the model that it is given: does it use another one?"
        )
    # What the given model reaches as well is combined with its gradients, in the same backward pass.
    missed = [key for key, gradient in zip(own, past, strict=True) if gradient is not None and by_name[key] is None]
    if missed:
        raise TaskError(
            f"the loss of task {name!r} uses {_listed(missed)} by a model that it kept, past the one that it is given, "
            "so that replicas would not combine their gradients: call the given model, and put that work into forward()"
        )
    _check_gradients({key: gradient for key, gradient in by_name.items() if gradient is not None}, name=name)
    return frozenset(key for key, gradient in by_name.items() if gradient is None)


_COLUMNS = frozenset({"lr", "grad_norm", "steps_dropped"})
"""Names of the columns `train/…` of the log beside the loss and its parts."""


def _check_scalars(found: Any, *, name: str) -> Tensor:  # noqa: ANN401 - whatever a user's loss returned
    """Return what is minimised, and refuse a loss or a part of it that is no number."""
    if isinstance(found, Mapping) and "loss" not in found:
        raise TaskError(f"the loss of task {name!r} returned {', '.join(map(repr, found))}, and no part named 'loss'")
    loss, parts = split_loss(found) if isinstance(found, (Tensor, Mapping)) else (found, {})
    if taken := parts.keys() & _COLUMNS:
        raise TaskError(
            f"the loss of task {name!r} returned a part named {_listed(sorted(taken))}, which is a column of the log "
            f"already (train/{min(taken)}): give it another name"
        )
    if not isinstance(loss, Tensor):
        raise TaskError(f"the loss of task {name!r} must return a scalar tensor, got {type(loss).__name__}")
    for what, value in (("the loss", loss), *((f"part {key!r} of the loss", part) for key, part in parts.items())):
        if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
            got = f"shape {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise TaskError(
                f"{what} of task {name!r} must return one floating-point number, the mean over the micro-batch's "
                f"samples, got {got}"
            )
    return loss


def _check_gradients(gradients: Mapping[str, Tensor], *, name: str) -> None:
    """Refuse gradients that replicas, the meter or a checkpoint cannot take."""
    sparse = [key for key, gradient in gradients.items() if gradient.layout is not torch.strided]
    if sparse:
        raise TaskError(
            f"the model of task {name!r} has sparse gradients ({_listed(sparse)}), which replicas cannot combine: "
            f"build the embedding with sparse=False"
        )
    complex_ones = [key for key, gradient in gradients.items() if gradient.is_complex()]
    if complex_ones:
        raise TaskError(
            f"the model of task {name!r} has complex parameters ({_listed(complex_ones)}), of which no noise scale is "
            f"measured: keep the real view, torch.view_as_real, as the parameter"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return f"{', '.join(names[:_MAX_NAMES])}{more}"


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Make one sentence of what a user's code raises; our own errors are sentences already.

    That includes what is no Exception, such as sys.exit(), asyncio.CancelledError and a raised KeyboardInterrupt.
    """
    try:
        yield
    except DptrainError:
        raise
    except BaseException as error:
        if is_interrupt(error):
            raise
        raise TaskError(f"{what}: {_description(error)}") from error


def is_interrupt(error: BaseException) -> bool:
    """Whether an error can be a person's Ctrl-C: never in the command, where SIGINT raises no KeyboardInterrupt."""
    return isinstance(error, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def refuse_coroutine(found: Any, what: str) -> None:  # noqa: ANN401 - whatever a user's function returned
    """Refuse what an `async def` returns, and close it, or Python would warn that it "was never awaited".

    Raises:
        TaskError: where it is a coroutine.
    """
    if inspect.iscoroutine(found):
        found.close()
        raise TaskError(f"{what} is a coroutine, which nothing would run: write `def` instead of `async def`")


def _description(error: BaseException) -> str:
    """Type, message, and the innermost line of it that is neither dptrain's nor installed: most likely the user's."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    if isinstance(error, SyntaxError):
        return text  # it names its file and line itself; the traceback ends where the import began
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_OF_THE_USER)]
    return f"{text} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else text


_NOT_OF_THE_USER = (
    "<",
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)
