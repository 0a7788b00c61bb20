"""A task whose replicas send themselves a signal at named points of a step; for runs in processes of their own."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dptrain.checkpoint import async_writer as async_writer_module
from dptrain.checkpoint import store as checkpoint_module
from tests.runs import Noisy, noisy, slow_loss

INSIDE_A_STEP = ("data", "forward", "backward", "reduction", "update")
BETWEEN_STEPS = ("evaluation", "save", "rename")


def strike(point, *, when=True):
    """Send the signal, if this is the point that is armed, on rank 1 (on rank 0 where only that one comes by)."""
    armed = Path(os.environ["TEST_STRIKES"])
    plan = json.loads(armed.read_text())
    if not when or plan["point"] != point or os.environ["RANK"] != str(int(point in INSIDE_A_STEP)):
        return
    plan["calls"] -= 1
    _replace(armed, plan if plan["calls"] else {"point": None})
    if not plan["calls"]:
        os.kill(os.getpid(), plan["signal"])


def arm(path, point, *, number=signal.SIGKILL, calls=6):
    """Have the replica struck when it comes by a point for the given time."""
    _replace(path, {"point": point, "calls": calls, "signal": int(number)})


def _replace(path, plan):
    """Write the plan in one move: others read it all the time."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(plan))
    temporary.replace(path)


def disarmed(path):
    """Whether what was armed has happened."""
    return json.loads(path.read_text())["point"] is None


class Struck(Noisy):
    """The data, at the reading of which a replica may be struck."""

    def __getitem__(self, index):
        strike("data")
        return super().__getitem__(index)


def loss_with_strikes(model, batch):
    """Strike before and after a forward pass, in the backward pass, and in an evaluation."""
    strike("evaluation", when=not model.training)
    strike("forward", when=model.training)
    loss = slow_loss(model, batch)
    if model.training:
        # DDP's own hooks, which start the reduction, come after that of the last layer and before that of the first.
        module = getattr(model, "module", model)
        loss.register_hook(lambda _: strike("backward"))
        if not hasattr(module, "struck"):
            module.struck = True
            module[0].weight.register_post_accumulate_grad_hook(lambda _: strike("reduction"))
    return loss


def _patched(module, name, point, *, before):
    real = getattr(module, name)

    def struck(*arguments, **options):
        if before:
            strike(point)
        found = real(*arguments, **options)
        if not before:
            strike(point)
        return found

    setattr(module, name, struck)


def striking():
    """Build the task, and put the points that lie outside of it into this process."""
    torch.set_num_threads(1)
    register_optimizer_step_post_hook(lambda *_: strike("update"))
    _patched(checkpoint_module, "_write", "save", before=True)
    _patched(checkpoint_module, "_commit", "rename", before=False)
    assert async_writer_module.save_checkpoint is checkpoint_module.save_checkpoint
    task = noisy()
    return replace(task, train_data=Struck(), loss=loss_with_strikes)
