"""Which settings of a run do not go together with what its replicas exchange."""

from __future__ import annotations

from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError
from dptrain.exchange.settings import ExchangeConfig

READ_NOISE = ("goodput", "noise", "pollux")
"""Batch laws that need the noise scale."""
_RULES_WITHOUT_NOISE = ("none", "linear", "square_root")


def check_exchange(
    exchange: ExchangeConfig,
    *,
    control: ControlConfig,
    rule: str | None,
    average_decay: float | None,
    wrapper: str,
    precision: str,
    sparsity: str,
) -> None:
    """Refuse laws and modes that need a noise scale where none is defined, and what a kind cannot do.

    Args:
        exchange: the settings.
        control: of the batch.
        rule: by which the learning rate follows the batch.
        average_decay: of an average of the weights.
        wrapper: of the model.
        precision: of parameters and passes.
        sparsity: method by which weights are kept at zero.

    Raises:
        ConfigError: with the reason and the remedy.
    """
    if exchange == ExchangeConfig():
        return
    # Loads torch, which takes a second: the first line of a run with the default exchange does not wait for it.
    from dptrain.exchange.kinds import no_noise_scale, parameters_are_equal

    reason, kind = no_noise_scale(exchange), f"exchange.kind={exchange.kind}"
    if exchange.kind == "all_reduce":
        return
    if wrapper != "ddp":
        raise ConfigError(
            f"{kind} needs whole parameters on each replica, but execution.wrapper is {wrapper}: use "
            f"execution.wrapper=ddp"
        )
    if precision == "bf16_parameters":
        raise ConfigError(f"{kind} is for parameters in full precision, not for bf16_parameters: use precision=bf16")
    _check_masks(exchange, sparsity)
    if reason is not None:
        check_without_noise(control, rule, kind=kind, reason=reason)
    if parameters_are_equal(exchange):
        return
    if precision == "fp16":
        raise ConfigError(f"with {kind} each replica would need a loss scale of its own: use precision=bf16")
    if average_decay is not None:
        raise ConfigError(
            f"with {kind} the weights are not the same on all replicas: leave optimizer.average_decay out"
        )
    if sparsity == "rigl":
        raise ConfigError(
            f"with {kind} the weights are not the same on all replicas, so that sparsity.method=rigl would move each "
            f"one's mask elsewhere, and a checkpoint holds one: use sparsity.method=static or exchange.kind=all_reduce"
        )


def check_without_noise(control: ControlConfig, rule: str | None, *, kind: str, reason: str) -> None:
    """Refuse laws, modes and rules that need a noise scale.

    Args:
        control: of the batch.
        rule: by which the learning rate follows the batch.
        kind: of exchange, as in the settings.
        reason: why there is none.

    Raises:
        ConfigError: with the reason and the remedy.
    """
    if control.mode in ("measure", "advise"):
        raise ConfigError(f"control.mode={control.mode} needs the noise scale, which {kind} has not: {reason}")
    if control.mode != "adapt" or control.law == "constant":
        return
    if control.law in READ_NOISE:
        raise ConfigError(
            f"control.law={control.law} needs the noise scale, which {kind} has not: {reason}. Or keep the batch with "
            f"control.law=constant, or give it with control.law=schedule"
        )
    if rule not in _RULES_WITHOUT_NOISE and not (rule is None and control.law == "seesaw"):
        raise ConfigError(
            f"with {kind} and control.law={control.law} the learning rate cannot follow the batch by the noise scale: "
            f"use optimizer.rule=square_root (adamw), linear (sgd) or none"
        )


def _check_masks(exchange: ExchangeConfig, sparsity: str) -> None:
    """Refuse masks where the combined gradient is not zero at a masked weight, though each replica's is."""
    if sparsity != "off" and (exchange.kind == "random_bases" or exchange.codec == "powersgd"):
        kind = f"exchange.kind={exchange.kind}"
        how = f"{kind} exchange.codec=powersgd" if exchange.codec == "powersgd" else kind
        raise ConfigError(
            f"{how} makes gradients of a few numbers, which are not zero where sparsity.method={sparsity} has masked a "
            f"weight, so that grad_norm, clipping and the optimizer's moments would be of other weights: use "
            f"exchange.codec=int8 of exchange.kind=compressed, or exchange.kind=all_reduce"
        )
