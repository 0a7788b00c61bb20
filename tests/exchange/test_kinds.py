"""Every kind of exchange in one loop: its limit is the all-reduced step, its bytes are those that it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dptrain.errors import ConfigError
from dptrain.exchange import AllReduce, Compressed, LocalUpdates, RandomBases
from tests.replicas import run_replicas

STEPS = 12


def problem(rank):
    """A small network whose replicas begin with parameters of their own, which `wrap` makes equal."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    torch.manual_seed(7)
    teacher = nn.Linear(6, 2)
    generator = torch.Generator().manual_seed(100 + rank)

    def batch():
        x = torch.randn(8, 6, generator=generator)
        return x, teacher(x).detach() + 0.3 * torch.randn(8, 2, generator=generator)

    held_out = torch.randn(512, 6, generator=torch.Generator().manual_seed(5))

    def excess_loss():
        with torch.no_grad():
            return (model(held_out) - teacher(held_out)).square().mean().item()

    return model, batch, excess_loss


def train(exchange, rank, *, steps=STEPS, save_at=None, resumed=None, rate=0.1, **ddp):
    """The loop of the interface; with `save_at`, what a checkpoint after that step would hold."""
    model, batch, excess_loss = problem(rank)
    wrapped = exchange.wrap(model, **ddp)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    saved, losses = None, [excess_loss()]
    for step in range(1, steps + 1):
        x, y = batch()
        if resumed is not None and step <= resumed["step"]:
            if step == resumed["step"]:
                model.load_state_dict(resumed["model"])
                exchange.load_state_dict(resumed["exchange"])
            continue
        loss = (wrapped(x) - y).square().mean()
        loss.backward()
        exchange.combine()
        optimizer.step()
        exchange.updated()
        optimizer.zero_grad()
        if step == save_at:
            parameters = {name: value.clone() for name, value in model.state_dict().items()}
            saved = {"step": step, "model": parameters, "exchange": exchange.state_dict()}
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return {"parameters": parameters, "losses": [*losses, excess_loss()], "saved": saved}


KINDS = {
    "all_reduce": AllReduce,
    "fp16": lambda: Compressed("fp16"),
    "bf16": lambda: Compressed("bf16"),
    "bf16 without feedback": lambda: Compressed("bf16", error_feedback=False),
    "int8": lambda: Compressed("int8"),
    "powersgd": lambda: Compressed("powersgd", rank=2),
    "local 1": lambda: LocalUpdates(1),
    "local 4": lambda: LocalUpdates(4),
    "nesterov": lambda: LocalUpdates(4, outer="nesterov"),
    "overlapped": lambda: LocalUpdates(4, overlap=2),
    "nesterov as average": lambda: LocalUpdates(1, outer="nesterov", outer_learning_rate=1.0, outer_momentum=0.0),
    "bases": lambda: RandomBases(24),
    "all directions": lambda: RandomBases(10**6),
}


def train_all(rank, world_size):
    found = {}
    for name, make in KINDS.items():
        exchange = make()
        found[name] = {**train(exchange, rank), "bytes": exchange.bytes_per_step()}
    for name in ("int8", "bf16", "powersgd", "local 4", "nesterov", "overlapped", "bases"):
        saved = train(KINDS[name](), rank, steps=8, save_at=8)["saved"]
        found[name]["resumed"] = train(KINDS[name](), rank, resumed=saved)["parameters"]
    found["spread"] = local_spread(rank)
    return found


def local_spread(rank):
    exchange = LocalUpdates(4)
    train(exchange, rank)
    return exchange.spread


@pytest.fixture(scope="module")
def runs():
    return run_replicas(train_all, world_size=2, timeout_s=240)


def distance(runs, name, other="all_reduce"):
    one, two = (torch.tensor(runs[0][kind]["parameters"]) for kind in (name, other))
    return (one - two).norm().item() / two.norm().item()


@pytest.mark.parametrize("name", ["local 1", "nesterov as average", "all directions"])
def test_the_limit_of_a_kind_is_the_all_reduced_step(runs, name):
    """H = 1 with averaging and SGD, and as many directions as parameters, equal all-reduce to rounding."""
    assert distance(runs, name) < 1e-6


@pytest.mark.parametrize(("name", "most"), [("fp16", 1e-4), ("bf16", 1e-3), ("int8", 5e-3), ("powersgd", 0.5)])
def test_compression_stays_near_the_exact_run(runs, name, most):
    """The parameters after a dozen steps differ from the exact ones by less than the codec's rounding allows."""
    assert 0 < distance(runs, name) < most


def test_error_feedback_keeps_what_rounding_loses(runs):
    """With feedback bf16 ends nearer to the exact parameters than without."""
    assert distance(runs, "bf16") < distance(runs, "bf16 without feedback")


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("local 4", "nesterov", "overlapped")])
def test_parameters_are_equal_on_all_replicas(runs, name):
    """Kinds that say so have equal parameters after each step, to the last bit."""
    assert runs[0][name]["parameters"] == runs[1][name]["parameters"]


def test_local_updates_end_equal_after_an_exchange_and_know_their_spread(runs):
    """Twelve steps end with an exchange; before it the replicas had moved apart."""
    assert runs[0]["local 4"]["parameters"] == runs[1]["local 4"]["parameters"]
    assert runs[0]["spread"] == runs[1]["spread"] > 0
    assert distance(runs, "local 4") > 1e-4


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_trains(runs, name):
    """The loss against the teacher without its noise falls, on both replicas."""
    for run in runs:
        first, last = run[name]["losses"]
        assert last < first


def test_bytes_are_in_the_order_of_what_is_sent(runs):
    """Two replicas send each gradient once: 4 bytes an element, 2 in half precision, 1 in int8; bases far fewer."""
    elements = len(runs[0]["all_reduce"]["parameters"])
    sent = {name: runs[0][name]["bytes"] for name in KINDS}
    assert sent["all_reduce"] == 4 * elements
    assert sent["fp16"] == sent["bf16"] == 2 * elements
    assert sent["int8"] == elements + 4 * 4  # a scale for each of four parameters
    assert sent["local 4"] == elements
    assert sent["bases"] == pytest.approx(4 * 24, rel=0.2)


@pytest.mark.parametrize("name", ["bf16", "int8", "powersgd", "local 4", "nesterov", "overlapped", "bases"])
def test_a_resumed_run_ends_with_the_same_bits(runs, name):
    """Residuals, anchors, velocities and the number of the step are all that a kind remembers."""
    for run in runs:
        assert run[name]["resumed"] == run[name]["parameters"]


def layouts(rank, world_size):
    """The parameters under PowerSGD in one bucket of DDP and in one for each parameter, with the messages sent."""
    found = {}
    for name, size_mb in (("one", 25), ("many", 1e-5)):
        exchange, calls = Compressed("powersgd", rank=1), []
        original = torch.distributed.all_reduce
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.distributed,
                "all_reduce",
                lambda *args, calls=calls, original=original, **options: (
                    calls.append(args[0].numel()) or original(*args, **options)
                ),
            )
            parameters = train(exchange, rank, bucket_cap_mb=size_mb)["parameters"]
        found[name] = {"parameters": parameters, "messages": len(calls), "numbers": sum(calls)}
        found[name]["bytes"] = exchange.bytes_per_step()
    return found


def test_powersgd_sends_two_messages_a_step_whatever_the_buckets():
    """On three replicas, one bucket or four: the same bits, two reductions a step, and the bytes that it says."""
    for found in run_replicas(layouts, world_size=3):
        assert found["one"] == found["many"]
        assert found["one"]["messages"] == 2 * STEPS
        assert 4 * found["one"]["numbers"] / STEPS * 2 * 2 / 3 == pytest.approx(found["one"]["bytes"])


def test_settings_out_of_range_are_refused():
    """Each error names the value."""
    for make, message in [
        (lambda: Compressed("fp8"), "fp8"),
        (lambda: Compressed("powersgd", rank=0), "rank"),
        (lambda: LocalUpdates(0), "at least 1, got 0"),
        (lambda: LocalUpdates(outer="adam"), "adam"),
        (lambda: LocalUpdates(outer="nesterov", outer_momentum=1.0), "momentum"),
        (lambda: RandomBases(0), "got 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make()


def test_one_replica_needs_no_group():
    """Without a process group every kind trains, and sends nothing."""
    for make in KINDS.values():
        exchange = make()
        first, last = train(exchange, 0, steps=4)["losses"]
        assert first != last
        assert exchange.bytes_per_step() == 0
