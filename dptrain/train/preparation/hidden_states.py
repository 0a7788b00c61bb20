"""How far a model's hidden states are from those of its teacher: outputs of modules by name, as they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dptrain.errors import ConfigError

_SETTING = "distillation.hidden"
States = dict[str, list[Tensor]]
"""By the name of a module, what it returned at each call."""


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """Pairs of modules whose outputs are to be alike (Romero et al. 2015, arXiv 1412.6550, section 2.2).

    Where the widths, the last dimensions, differ, the teacher's states are projected to the model's width by a random
    matrix with orthonormal rows or columns, always the same one. It is not learned, as that of Romero et al. is: a
    learned one would be a parameter of the model, in its checkpoints, its gradient and its noise scale.

    Attributes:
        pairs: names of a module of the model and of one of the teacher.
        weight: of the distance in the loss.
    """

    pairs: tuple[tuple[str, str], ...]
    weight: float
    _projections: dict[tuple[int, int, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def of_model(self) -> list[str]:
        """The modules of the model."""
        return [name for name, _ in self.pairs]

    @property
    def of_teacher(self) -> list[str]:
        """The modules of the teacher."""
        return [name for _, name in self.pairs]

    def distance(self, own: States, taught: States) -> Tensor:
        """Return the mean over the pairs of the mean squared difference of a value; it is a mean over samples.

        Raises:
            ConfigError: where a module was not called once, or shapes differ in more than the width.
        """
        return torch.stack([self._of_pair(own, taught, names=names) for names in self.pairs]).mean()

    def _of_pair(self, own: States, taught: States, *, names: tuple[str, str]) -> Tensor:
        state, target = _only(own, names[0], of="model").float(), _only(taught, names[1], of="teacher").float()
        if state.shape[:-1] != target.shape[:-1]:
            raise ConfigError(
                f"{_SETTING}: {names[0]} of the model returns shape {tuple(state.shape)} and {names[1]} of the teacher "
                f"{tuple(target.shape)}: they may differ in the last dimension alone"
            )
        if state.shape[-1] != target.shape[-1]:
            target = target @ self._projection(target.shape[-1], state.shape[-1], device=target.device)
        return functional.mse_loss(state, target)

    def _projection(self, width: int, to: int, *, device: torch.device) -> Tensor:
        if (width, to, device) not in self._projections:
            self._projections[width, to, device] = projection(width, to).to(device)
        return self._projections[width, to, device]


def projection(width: int, to: int) -> Tensor:
    """Return a random matrix of shape (width, to) with orthonormal columns, or rows where `to` is the larger."""
    generator = torch.Generator().manual_seed(0)
    # In float64, so that processors that round differently give the same float32.
    drawn = torch.randn(max(width, to), min(width, to), generator=generator, dtype=torch.float64)
    orthonormal: Tensor = torch.linalg.qr(drawn).Q.float()
    return orthonormal if width >= to else orthonormal.T.contiguous()


def hidden_states(text: str, *, weight: float, model: nn.Module, teacher: nn.Module) -> HiddenStates:
    """Return what the setting stands for, such as "blocks.0=blocks.1,blocks.1=blocks.3".

    Raises:
        ConfigError: where it names no modules, or some that there are not.
    """
    pairs = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        own, equals, other = part.partition("=")
        pairs.append((own.strip(), (other if equals else own).strip()))
    if not pairs:
        raise ConfigError(f"{_SETTING} {text!r} names no modules: write blocks.0, or blocks.0=blocks.1")
    for names, network, of in zip(zip(*pairs, strict=True), (model, teacher), ("model", "teacher"), strict=True):
        for name in names:
            _check_name(network, name, of=of)
    return HiddenStates(pairs=tuple(pairs), weight=weight)


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[States]:
    """Give what the modules return inside, and look no longer afterwards: a layer may be computed again for gradients.

    Args:
        model: the model, which may be wrapped.
        names: of modules in it.
    """
    found: States = {name: [] for name in names}
    handles = [_submodule(model, name).register_forward_hook(partial(_note, found[name])) for name in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _note(outputs: list[Tensor], _module: nn.Module, _inputs: Any, output: Any) -> None:  # noqa: ANN401 - any module's
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point():
        raise ConfigError(
            f"{_SETTING}: a {type(_module).__name__} returns {type(output).__name__}, which is no hidden state: name a "
            f"module that returns a tensor, alone or first in a tuple"
        )
    outputs.append(first)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    while True:
        try:
            return model.get_submodule(name)
        except AttributeError:
            inner = getattr(model, "module", None)  # of DDP, or of the check of a task
            if not isinstance(inner, nn.Module):
                raise
            model = inner


def _only(states: States, name: str, *, of: str) -> Tensor:
    if len(states[name]) != 1:
        raise ConfigError(f"{_SETTING}: {name} of the {of} is called {len(states[name])} times for one micro-batch")
    return states[name][0]


def _check_name(model: nn.Module, name: str, *, of: str) -> None:
    names = [known for known, _ in model.named_modules() if known]
    if name not in names:
        close = get_close_matches(name, names, n=1)
        hint = f", did you mean {close[0]}?" if close else f"; there are {', '.join(names[:5])}, …"
        raise ConfigError(f"{_SETTING}: the {of} has no module {name!r}{hint}")
