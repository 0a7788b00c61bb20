"""Parameters in bfloat16 with float32 copies that the optimizer moves; half the memory of weights and gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dptrain.config.train_config import TrainConfig


class MasterWeights:
    """Holds a float32 copy of each trained parameter, and carries gradients to them and values back.

    A step of a hundredth of a percent is lost in bfloat16, whose neighbours are 0.4 % apart; the copies keep it.

    Args:
        model: whose float32 parameters become bfloat16, in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trained: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self.names: dict[nn.Parameter, str] = {}
        masters: dict[int, nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                master = nn.Parameter(parameter.detach().float().clone())
                masters[id(parameter)] = master
                self.names[master] = name
        self._masters = [masters[id(p)] for p in self._trained]
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The copies, in the order of the model's trained parameters."""
        return self._masters

    @property
    def copies(self) -> Mapping[nn.Parameter, nn.Parameter]:
        """The copies by the parameters that they are of."""
        return dict(zip(self._trained, self._masters, strict=True))

    def take_over(self, optimizer: Optimizer, *, device: torch.device) -> None:
        """Have an optimizer over the model's parameters move the copies instead, which go to the device."""
        for master in self._masters:
            master.data = master.data.to(device)
        by_id = {id(p): master for p, master in zip(self._trained, self._masters, strict=True)}
        for group in optimizer.param_groups:
            group["params"] = [by_id[id(p)] for p in group["params"]]
        for parameter in list(optimizer.state):
            state = optimizer.state.pop(parameter)
            wide = {key: value.float() if is_bf16(value) else value for key, value in state.items()}
            optimizer.state[by_id[id(parameter)]] = wide

    def take_gradients(self) -> None:
        """Hand the gradients of the model on to the copies, in float32."""
        for parameter, master in zip(self._trained, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()

    @torch.no_grad()
    def give_values(self) -> None:
        """Round the copies into the model's parameters."""
        torch._foreach_copy_(self._trained, self._masters)  # type: ignore[arg-type]
        for master in self._masters:
            master.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the copies by the names of the parameters, for a checkpoint."""
        return {name: master.detach() for master, name in self.names.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`, and round them into the model."""
        for master, name in self.names.items():
            master.copy_(tensors[name])
        self.give_values()


def needs_masters(config: TrainConfig) -> bool:
    """Whether the settings ask for copies; FSDP keeps its shards in float32 by itself."""
    return config.precision == "bf16_parameters" and config.execution.wrapper == "ddp"


def is_bf16(value: object) -> bool:
    """Whether a value is a tensor in bfloat16."""
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16
