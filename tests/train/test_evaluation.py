"""Held-out figures: exact for any number of samples, batch size and replicas, and without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torchmetrics import CatMetric, MeanMetric
from torchmetrics.classification import BinaryAUROC, MulticlassF1Score
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from dptrain.errors import TaskError
from dptrain.tasks import Suggestion, Task
from dptrain.train.evaluation import evaluate_task
from tests.replicas import run_replicas

CASES = [(num_samples, micro) for num_samples in (1, 2, 7, 37, 53) for micro in (1, 3, 5)]
SUGGESTION = Suggestion(
    learning_rate=0.1, global_batch_size=4, micro_batch_size=2, max_samples=100, eval_every_samples=50
)


CPU = torch.device("cpu")


def make_model():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))


def make_data(num_samples):
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(num_samples, 4, generator=generator), torch.arange(num_samples) % 3)


def parts(model, batch):
    logits = model(batch[0])
    correct = (logits.argmax(1) == batch[1]).float()
    return {"loss": functional.cross_entropy(logits, batch[1]), "accuracy": correct.mean()}


def make_task(eval_data, **changes):
    settings = {"loss": lambda model, batch: (model(batch[0]) ** 2).mean(), "model": make_model()}
    return Task(
        name="small", train_data=make_data(8), eval_data=eval_data, suggestion=SUGGESTION, **{**settings, **changes}
    )


def evaluate_on(task, micro, *, rank=0, world_size=1):
    return evaluate_task(task, task.model, batch_size=micro, rank=rank, world_size=world_size, device=CPU)


def evaluate_all(rank, world_size):
    return [
        evaluate_on(make_task(make_data(num_samples), eval_loss=parts), micro, rank=rank, world_size=world_size)
        for num_samples, micro in CASES
    ]


def truth(num_samples):
    with torch.no_grad():
        return {name: float(value) for name, value in parts(make_model().eval(), make_data(num_samples)[:]).items()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_figures_are_means_over_all_samples(world_size):
    """Loss and parts on any number of replicas, also where some have a short batch or none, and the same on each."""
    results = run_replicas(evaluate_all, world_size=world_size)
    assert all(found == results[0] for found in results)
    for found, (num_samples, _) in zip(results[0], CASES, strict=True):
        assert found == pytest.approx(truth(num_samples), rel=1e-6)


METRICS = {
    "f1": lambda: MulticlassF1Score(num_classes=3),
    "auroc": lambda: BinaryAUROC(),  # noqa: PLW0108 - a fresh one each time
    "auroc_by_bins": lambda: BinaryAUROC(thresholds=20),
    "correlation": lambda: PearsonCorrCoef(),  # noqa: PLW0108 - as above
    "of_one_tensor_twice": lambda: SpearmanCorrCoef(),  # noqa: PLW0108 - as above
}
ARGUMENTS = {
    "f1": lambda logits, classes: (logits, classes),
    "auroc": lambda logits, classes: (logits[:, 0].sigmoid(), (classes == 0).long()),
    "auroc_by_bins": lambda logits, classes: (logits[:, 0].sigmoid(), (classes == 0).long()),
    "correlation": lambda logits, classes: (logits[:, 0], classes.float()),
    "of_one_tensor_twice": lambda logits, _: (logits.sum(1),) * 2,
}


def outputs_for(name):
    def outputs(model, batch):
        logits = model(batch[0])
        return functional.cross_entropy(logits, batch[1]), ARGUMENTS[name](logits, batch[1])

    return outputs


def metrics_of(rank, world_size):
    found = {}
    for name, make in METRICS.items():
        for num_samples in (4, 31):
            task = make_task(make_data(num_samples), metrics={name: make()}, outputs=outputs_for(name))
            found[name, num_samples] = evaluate_on(task, 3, rank=rank, world_size=world_size)[name]
    return found


@pytest.mark.parametrize("world_size", [1, 3])
def test_metrics_are_those_of_all_samples_at_once(world_size):
    """Torchmetrics with sums, lists and moments: 4 samples leave one of three replicas without any."""
    results = run_replicas(metrics_of, world_size=world_size)
    assert all(found == results[0] for found in results)
    for (name, num_samples), value in results[0].items():
        metric, (features, classes) = METRICS[name](), make_data(num_samples)[:]
        with torch.no_grad():
            metric.update(*ARGUMENTS[name](make_model().eval()(features), classes))
        assert value == pytest.approx(float(metric.compute()), rel=1e-5), (name, num_samples)


def refusal(rank, world_size):
    class Average(MeanMetric):
        def __init__(self):
            super().__init__()
            self.add_state("average", default=torch.zeros(()), dist_reduce_fx="mean")

    task = make_task(make_data(4), metrics={"mine": Average()}, outputs=lambda _, batch: (batch[0].mean(), (1.0,)))
    with pytest.raises(TaskError, match="'mine' keeps a mean, which is not exact over replicas"):
        evaluate_on(task, 2, rank=rank, world_size=world_size)


def test_a_metric_that_would_be_wrong_over_replicas_is_refused():
    """A state that replicas average weighs a replica with one sample like one with a hundred."""
    run_replicas(refusal, world_size=2)


def test_a_metric_of_many_numbers_is_refused():
    """A figure is one number; the text says how metrics are made to give one."""
    task = make_task(
        make_data(4), metrics={"all": CatMetric()}, outputs=lambda _, batch: (batch[0].mean(), (batch[0],))
    )
    with pytest.raises(TaskError, match="'all' must give one number"):
        evaluate_on(task, 2)


def uneven_parts(rank, world_size, at):
    """Evaluate 8 batches of a sample, of which number `at` alone has a part; return the error."""

    def loss(_, batch):
        value = batch[0].mean()
        return {"loss": value, "error": value, **({"rare": value} if int(batch[1]) == at else {})}

    data = [(torch.ones(4), index) for index in range(8)]
    try:
        evaluate_on(make_task(data, eval_loss=loss), 1, rank=rank, world_size=world_size)
    except TaskError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("world_size", "at"), [(1, 3), (1, 0), (2, 0), (2, 5), (2, 7)])
def test_parts_that_some_batches_lack_are_refused_on_all_replicas(world_size, at):
    """Their sums would be divided by the number of all samples, and meet other parts of other replicas."""
    for error in run_replicas(uneven_parts, world_size=world_size, args=(at,)):
        assert "error" in error
        assert "return the same ones for each batch" in error


def parts_by_rank(rank, world_size):
    def loss(_, batch):
        value = batch[0].mean()
        return {"loss": value, ("first", "second")[rank]: value}

    with pytest.raises(TaskError, match="another set on another replica"):
        evaluate_on(make_task(make_data(8), eval_loss=loss), 2, rank=rank, world_size=world_size)

    def turned(_, batch):
        parts = {"first": batch[0].mean(), "second": batch[0].std()}
        return {"loss": batch[0].sum(), **dict(sorted(parts.items(), reverse=bool(rank)))}

    return evaluate_on(make_task(make_data(8), eval_loss=turned), 2, rank=rank, world_size=world_size)


def test_parts_meet_by_name():
    """Other names on another replica are refused; the same ones in another order are the same parts."""
    first, second = run_replicas(parts_by_rank, world_size=2)
    assert first == second

    def plain(_, batch):
        return {"loss": batch[0].sum(), "first": batch[0].mean(), "second": batch[0].std()}

    assert first == pytest.approx(evaluate_on(make_task(make_data(8), eval_loss=plain), 2))


def test_each_held_out_set_has_its_figures():
    """Two sets: each under its name, the first also without one, `eval_metrics` included."""
    sets = {"near": make_data(7), "far": make_data(31)}
    task = make_task(sets, eval_loss=parts, eval_metrics={"double": lambda loss: 2 * loss})
    found = evaluate_on(task, 5)
    expected = {
        name: {**truth(count), "double": 2 * truth(count)["loss"]} for name, count in (("near", 7), ("far", 31))
    }
    assert found == pytest.approx(
        {
            **expected["near"],
            **{f"{key}/{name}": value for key, values in expected.items() for name, value in values.items()},
        }
    )


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(training):
    """The model is in the mode that it was in, without gradients."""
    task = make_task(make_data(7))
    task.model.train(training)
    evaluate_on(task, 2)
    assert task.model.training is training
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_a_batch_is_no_larger_than_a_micro_batch():
    """What is known to fit into memory in training is what evaluation takes."""
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch[0]))
        return batch[0].mean()

    evaluate_on(make_task(make_data(7), loss=loss), 3)
    assert sizes == [3, 3, 1]


def test_each_batch_is_a_sign_of_life():
    """The watchdog hears of each, so that a long evaluation is no hang."""
    beats = []
    task = make_task(make_data(7))
    evaluate_task(task, task.model, batch_size=2, rank=0, world_size=1, device=CPU, beat=lambda: beats.append(1))
    assert len(beats) == 4


def test_a_loss_that_raises_leaves_the_modes():
    """A caller that catches the error goes on in the modes that each module had."""
    model = make_model().train()
    model[1].eval()

    def broken(_model, _batch):
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        evaluate_on(make_task(make_data(3), loss=broken, model=model), 1)
    assert [module.training for module in model] == [True, False, True]


def test_a_loss_that_is_not_finite_stays_where_it_is():
    """A replica whose share is not counted adds nothing, also where its loss is no number."""
    found = evaluate_on(make_task(make_data(3), loss=lambda _, batch: batch[0].mean() * float("nan")), 2)
    assert found["loss"] != found["loss"]
