"""Counting the FLOPs of passes: against closed forms, and without a trace in what is trained."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dptrain import attach
from dptrain.config.execution import ExecutionConfig
from dptrain.cost.flops import FlopCounter
from dptrain.exchange import AllReduce
from dptrain.models.experts import ExpertsConfig
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.tasks.base import split_loss
from dptrain.tasks.gpt import next_token_loss
from dptrain.train.execution.wrapping import wrap

WIDTH, DEPTH, CONTEXT, SAMPLES = 32, 2, 24, 3


def _text(samples=SAMPLES):
    return torch.randint(0, 256, (samples, CONTEXT + 1), generator=torch.Generator().manual_seed(0)).byte()


def _count(model, loss, batch, *, num_samples):
    counter = FlopCounter()
    with counter.counting(batch, num_samples=num_samples):
        loss(model, batch).backward()
    return counter.take_per_sample()


def test_a_transformer_costs_six_n_d_and_its_attention():
    """N = all parameters but the embedding, which is looked up and not multiplied (as Kaplan et al. 2020 count)."""
    model = Gpt(GptConfig(width=WIDTH, depth=DEPTH, heads=4))
    n = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    attention = 12 * DEPTH * CONTEXT * WIDTH
    per_token = _count(model, next_token_loss, _text(), num_samples=SAMPLES) / CONTEXT
    assert per_token == pytest.approx(6 * n + attention, rel=0.03)
    assert abs(per_token - 6 * n) > 0.03 * per_token  # attention is there, and not lost in the tolerance


def test_attention_counts_alike_whichever_kernel_does_it():
    """A fused kernel computes a product again in its backward pass; the model has it once."""
    model = Gpt(GptConfig(width=WIDTH, depth=DEPTH, heads=4))
    counts = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend):
            counts.append(_count(model, next_token_loss, _text(), num_samples=SAMPLES))
    assert counts[0] == counts[1] > 0


class _Last(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0].square().mean()


@pytest.mark.parametrize("settings", [{}, {"experts": ExpertsConfig(num_experts=4, top_k=2)}])
def test_blocks_that_run_again_count_once(settings):
    """The model needs them once, whatever memory leaves no room for; only utilisation of hardware counts them twice."""
    counts = []
    for recomputed in ("off", "blocks"):
        torch.manual_seed(0)
        model = Gpt(GptConfig(width=WIDTH, depth=DEPTH, heads=4, **settings))
        execution = ExecutionConfig(activation_checkpointing=recomputed)
        wrap(model, exchange=AllReduce(), execution=execution, precision="no", device=torch.device("cpu"))
        counter = FlopCounter()
        products = [module for module in model.modules() if isinstance(module, nn.Linear)]
        passes = []
        products[0].register_forward_hook(lambda *_, passes=passes: passes.append(1))
        with counter.counting(_text(), num_samples=SAMPLES):
            _loss(model, _text()).backward()
        assert len(passes) == (1 if recomputed == "off" else 2)
        counts.append(counter.take_per_sample())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_count_those_that_process_a_token(top_k):
    """A mixture costs top_k dense layers of an expert's size, and its router: 6 FLOPs per weight and token."""
    shape = {"width": WIDTH, "depth": DEPTH, "context": CONTEXT, "feed_forward": "relu2"}
    experts = ExpertsConfig(num_experts=4, top_k=top_k)
    dense, mixture = (
        _count(Gpt(GptConfig(**shape, experts=kind)), _loss, _text(), num_samples=SAMPLES) for kind in (None, experts)
    )
    layer, router = 8 * WIDTH**2, 4 * WIDTH
    assert mixture - dense == 6 * CONTEXT * DEPTH * ((top_k - 1) * layer + router)


def _loss(model, batch):
    return split_loss(next_token_loss(model, batch))[0]


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_lstm_counts_each_matrix_at_each_place(batch_first):
    """A fused recurrent layer is three times its forward products: 2 FLOPs per weight and place."""
    model = _Last(nn.LSTM(6, 10, num_layers=2, batch_first=batch_first))
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    x = torch.randn(4, 7, 6, requires_grad=True)
    per_sample = _count(model, lambda m, b: m(b), x, num_samples=4)
    assert per_sample == 3 * 2 * weights * 7


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_in_groups_costs_its_weights_at_each_place(kind, groups):
    """Forward pass and weight gradient take a product for each weight and place; so does a gradient of the inputs."""
    layer = kind(8, 8, 3, stride=2, padding=1, groups=groups, bias=False)
    inputs = torch.randn(SAMPLES, 8, 6, 6)
    places = 6 * 6 if kind is nn.ConvTranspose2d else 3 * 3
    found = _count(layer, lambda model, batch: model(batch).square().mean(), inputs, num_samples=SAMPLES)
    assert found == 2 * (2 * places * layer.weight.numel())
    with_gradient = inputs.clone().requires_grad_()
    found = _count(layer, lambda model, batch: model(batch).square().mean(), with_gradient, num_samples=SAMPLES)
    assert found == 3 * (2 * places * layer.weight.numel())


def test_a_perceptron_is_counted_to_the_last_product():
    """The first layer has no gradient for its input: two products; every other has three."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    assert _count(model, loss, torch.randn(5, 64), num_samples=5) == 2 * (2 * 64 * 32 + 3 * 32 * 10)


def _train(*, counted):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 1))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(None))
    meter, counter = attach(model, every=1), FlopCounter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        for _ in range(2):
            batch = torch.randn(4 + step // 2, 8)
            meter.begin(num_samples=len(batch), weight=0.5)
            if counted:
                with counter.counting(batch, num_samples=len(batch)):
                    (model(batch).square().mean() / 2).backward()
            else:
                (model(batch).square().mean() / 2).backward()
        meter.step()
        optimizer.step()
        optimizer.zero_grad()
    reading = meter.read()
    meter.remove()
    return [*model.state_dict().values(), torch.get_rng_state()], str(reading), len(calls)


def test_counting_leaves_no_trace():
    """Parameters, batch norm statistics, random numbers, the meter's reading and the number of passes are the same."""
    (state, reading, calls), (plain, plain_reading, plain_calls) = _train(counted=True), _train(counted=False)
    assert all(torch.equal(a, b) for a, b in zip(state, plain, strict=True))
    assert (reading, calls) == (plain_reading, plain_calls)


def test_a_shape_is_counted_once_and_remembered(monkeypatch):
    """Torch's counter is entered once per shape; the sums go on."""
    entered = []
    import dptrain.cost.flops as module

    real = module.FlopCounterMode
    monkeypatch.setattr(module, "FlopCounterMode", lambda **options: entered.append(None) or real(**options))
    model, counter = nn.Linear(4, 1), FlopCounter()
    for size in (2, 2, 5, 2, 5):
        batch = {"x": torch.randn(size, 4), "names": ["a"] * size}
        with counter.counting(batch, num_samples=size):
            model(batch["x"]).sum().backward()
    assert len(entered) == 2
    assert counter.take_per_sample() == 2 * 2 * 4
    assert counter.take_per_sample() is None


def test_a_pass_of_no_sample_does_not_count():
    """A replica that only keeps in step computes, but for nobody; the mean per sample stays what it is."""
    model, counter = nn.Linear(4, 1), FlopCounter()
    for num_samples in (1, 0):
        with counter.counting(batch := torch.randn(1, 4), num_samples=num_samples):
            model(batch).sum().backward()
    assert counter.take_per_sample() == 2 * 2 * 4


def test_a_loss_that_fails_fails_as_without():
    """The task's own error comes through, and the shape is not taken to be known."""
    counter = FlopCounter()
    with pytest.raises(ZeroDivisionError), counter.counting(torch.ones(1), num_samples=1):
        1 / 0  # noqa: B018
    assert counter.take_per_sample() is None
