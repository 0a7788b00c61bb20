"""The meter as a callback of the transformers Trainer; what changes the batch stands in `window`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from dptrain.errors import CheckpointError, ObservationError
from dptrain.integrations.transformers.rows import REMEDY, RowCheck
from dptrain.integrations.transformers.tokens import TokenShares
from dptrain.noise import Smoothing
from dptrain.observe import Meter, Reading
from dptrain.observe.build import Options, build_meter
from dptrain.observe.geometry import GeometryName
from dptrain.observe.hooks.wrapping import Wrapping
from dptrain.observe.loop.batch_size import batch_size


class NoiseScaleMonitor(TrainerCallback, ExportableState):
    """Measures the gradient noise scale and adds `noise_scale/…` to each row that the Trainer logs.

    `Trainer(..., callbacks=[NoiseScaleMonitor()])` is enough for `state.log_history` and the progress
    bar. The Trainer puts the reporters of `report_to` in front of everybody's callbacks, so for their rows write
    `NoiseScaleMonitor().add_to(trainer)` instead.

    It measures under DDP and in one process. Where the Trainer normalises the loss by the tokens of all replicas,
    micro-batches are weighted by theirs, and a sample is a sequence all the same, also where several are packed into
    a row. A loss from `compute_loss_func` or an overridden `compute_loss` is taken to weight micro-batches equally.

    Args:
        every: measure each such step; by default the meter chooses by what measuring costs.
        budget: the share of the step time that measuring may take, where `every` is not given.
        memory: see `dptrain.Smoothing`.
        half_life_samples: see `dptrain.Smoothing`.
        level: confidence of the interval.
        population: samples in the data set where it is small and drawn without replacement.
        loss: whether the loss is the mean or the sum over the sequences, where the Trainer does not count tokens.
        groups: see `dptrain.attach`; of the forms that JSON holds.
        geometry: the norm, see `dptrain.attach`.
        micro_batch_size: samples in a micro-batch; by default the first dimension of the model's inputs, or the
            sequences that are packed into them. Needed where a sample is several rows, such as a pair of DPO.

    Raises:
        ObservationError: when training begins, where the meter could not be right.
    """

    # Plain numbers, because the Trainer keeps the arguments of its callbacks in JSON.
    def __init__(
        self,
        *,
        every: int | None = None,
        budget: float = 0.01,
        memory: float = 0.2,
        half_life_samples: float | None = None,
        level: float = 0.95,
        population: int | None = None,
        loss: Literal["mean", "sum"] = "mean",
        groups: Literal["module", "experts", "local_blocks"] | dict[str, str] | None = None,
        geometry: GeometryName = "sgd",
        micro_batch_size: int | None = None,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "loss": loss,
            "groups": groups,
            "geometry": geometry,
            "micro_batch_size": micro_batch_size,
            "every": every,
            "budget": budget,
            "memory": memory,
            "half_life_samples": half_life_samples,
            "level": level,
            "population": population,
        }
        self._shares = TokenShares()
        self._rows: RowCheck | None = None
        self._accumulation_steps = 1
        self.meter: Meter | None = None

    def add_to(self, trainer: Any) -> None:  # noqa: ANN401 - any Trainer
        """Join a Trainer in front of its reporters, so that their rows have `noise_scale/…` too."""
        trainer.callback_handler.callbacks.insert(0, self)

    # What the Trainer calls

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's signature
        """Put the meter on the parameters, and go on from a checkpoint's state where there is one."""
        model: nn.Module = kwargs["model"]
        _refuse(args, model)
        self._remove()
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        given = self._arguments
        self.meter = build_meter(
            Wrapping(kind="ddp" if args.world_size > 1 else "none", model=model),
            Options(
                loss_scale=None if scaler is None else scaler.get_scale,
                groups=given["groups"],
                geometry=given["geometry"],
                optimizers=[kwargs["optimizer"]],
                every=given["every"],
                budget=given["budget"],
                smoothing=Smoothing(memory=given["memory"], half_life_samples=given["half_life_samples"]),
                level=given["level"],
                population=given["population"],
            ),
        )
        self._shares = TokenShares(args)
        self._accumulation_steps = args.gradient_accumulation_steps
        first_is_full = state.global_step == 0 and _num_batches(kwargs["train_dataloader"]) > 1
        self._rows = RowCheck(args, first_is_full=first_is_full)
        handle = model.register_forward_hook(self._on_forward, with_kwargs=True)
        self.meter.on_remove(handle.remove)
        states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # it lists them only at first
        saved = self._saved_record(states)
        # At the first step the entry is what this object held when training began: of a run before, if any.
        if state.global_step > 0 and saved is not None:
            self._restore(saved)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:  # noqa: ARG002 - the Trainer's signature
        """Keep the latest entry of each of several monitors: the Trainer adds one at each checkpoint."""
        states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # as above
        entries = states[type(self).__name__]
        if isinstance(entries, list):
            later = [[other["args"] for other in entries[number + 1 :]] for number in range(len(entries))]
            kept = [entry for entry, others in zip(entries, later, strict=True) if entry["args"] not in others]
            states[type(self).__name__] = kept

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Close the step. The gradients are unscaled and clipped by now: the meter finds the factor."""
        assert self.meter is not None
        self.meter.step()

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: object, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - the Trainer's signature
        """Add to rows of training what is known (synchronises the device)."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" in logs:
            metrics = self.as_metrics()
            logs.update(metrics)
            state.log_history[-1].update(metrics)

    def on_train_end(self, *_: object, **__: object) -> None:
        """Take everything off the model; the meter can still be read."""
        self._remove()

    # One micro-batch

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _on_forward(self, model: nn.Module, args: object, kwargs: dict[str, Any], output: object) -> None:  # noqa: ARG002 - a hook's signature
        if not (model.training and torch.is_grad_enabled()):
            return
        assert self.meter is not None
        if not self.meter.measuring:
            self.meter.count_forward()
            return
        num_samples = self._num_samples(kwargs)
        share = self._shares.of(model, kwargs, micro_steps=self._planned_micro_steps())
        if share is not None:
            self.meter.begin(num_samples=num_samples, weight=share)
        else:
            self.meter.begin(num_samples=num_samples, weight=num_samples if self._arguments["loss"] == "sum" else None)

    def _num_samples(self, inputs: Mapping[str, Any]) -> float:
        """Return the samples of a micro-batch.

        Raises:
            ObservationError: where the inputs do not say them, or speak against the data loader's.
        """
        given: int | None = self._arguments["micro_batch_size"]
        if given is not None:
            return given
        num_samples = batch_size(None, (), inputs, remedy=REMEDY)
        assert self._rows is not None
        self._rows.check(inputs, num_samples=num_samples)
        return num_samples

    def _planned_micro_steps(self) -> int:
        return self._accumulation_steps

    # State

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats under `noise_scale/…` (synchronises the device)."""
        assert self.meter is not None
        return Reading(self.meter).as_metrics()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer's checkpoint must hold."""
        return {"args": self._arguments, "attributes": {"record": self._record()}}

    def _saved_record(self, states: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a loaded state holds of this object; of several monitors' entries the one with its arguments.

        Raises:
            CheckpointError: where there are several, and none is this one's.
        """
        # The Trainer expects an entry of each callback's when it saves; to a list it appends, one for each.
        entries = states.setdefault(type(self).__name__, [])
        if not isinstance(entries, list):
            record: dict[str, Any] | None = entries["attributes"]["record"]
            return record
        if not entries:
            return None
        own = [entry for entry in entries if entry["args"] == self._arguments]
        if not own:
            raise CheckpointError(
                f"the checkpoint has the states of several {type(self).__name__}, none with the arguments of this one: "
                "give them the arguments of the run that is resumed, or take this one out"
            )
        record = own[-1]["attributes"]["record"]
        return record  # noqa: RET504 - its type is known by now

    def _record(self) -> dict[str, Any] | None:
        return None if self.meter is None else {"meter": self.meter.state_dict()}

    def _restore(self, record: Mapping[str, Any]) -> None:
        assert self.meter is not None
        self.meter.load_state_dict(record["meter"])

    def _remove(self) -> None:
        if self.meter is not None:
            self.meter.remove()


def _num_batches(loader: Any) -> float:  # noqa: ANN401 - any data loader
    try:
        return len(loader)
    except TypeError:  # a stream, which nobody knows the end of
        return math.inf


def _refuse(args: TrainingArguments, model: nn.Module) -> None:
    """Raise where the hooks would not see what a replica's own gradient is."""
    if args.n_gpu > 1:
        raise ObservationError(
            f"the Trainer runs {args.n_gpu} devices in one process (DataParallel), where no replica's own gradient "
            "can be seen: start it with torchrun"
        )
    sharded = any(hasattr(p, "device_mesh") for p in model.parameters())
    if args.deepspeed or args.fsdp or sharded:
        raise ObservationError(
            "the Trainer shards the parameters (FSDP, DeepSpeed or tensor parallelism), where this callback cannot "
            "see a replica's own gradient: measure under DDP or in one process"
        )
