"""Each law and rule by its name in the settings, in a run of its own: it trains, decides, and refuses what it lacks."""

from __future__ import annotations

import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.tracking.jsonl import read_rows
from dptrain.train import ControlConfig, OptimizerConfig, TrainConfig, Trainer
from tests.runs import make_config, noisy

LAWS = {
    "goodput": {},
    "pollux": {"law_options": {"overlap": 3.0}},
    "noise": {"law_options": {"ratio": 4.0}},
    "kaplan": {"law_options": {"tokens_per_sample": 10**6}},
    "seesaw": {},
    "schedule": {"schedule": "0:4..12 80:12"},
    "constant": {},
}


def train(folder, *, optimizer=None, **control):
    control = ControlConfig(**{"min_gain": 0.0, "smallest": 2, "largest": 16, **control})
    optimizer = optimizer or OptimizerConfig(weight_decay=0.01)
    trainer = Trainer(make_config(folder, control=control, optimizer=optimizer, max_samples=200), task=noisy)
    return trainer, trainer.run()


@pytest.mark.parametrize("law", LAWS)
def test_each_law_trains_by_its_name(tmp_path, law):
    """All samples are seen, batches keep to the bounds, each decision changes the batch and says why; a constant has none."""
    if law == "schedule":
        LAWS[law].update(smallest=None, largest=None)
    _, summary = train(tmp_path / "run", law=law, **LAWS[law])
    decisions = read_rows(tmp_path / "run" / "decisions.jsonl")
    batches = {row["batch/global"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"}
    assert summary["samples_seen"] == 200
    assert batches <= set(range(1, 17))
    assert all(row["reason"] for row in decisions)
    assert bool(decisions) == (law != "constant")
    assert all(row["batch/after"] != row["batch/before"] for row in decisions)  # none is of the rate alone
    if law in ("schedule", "seesaw"):
        assert decisions[-1]["batch/after"] > 4


@pytest.mark.parametrize(
    ("law", "lacking"),
    [("kaplan", "law_options.tokens_per_sample"), ("schedule", "schedule")],
)
def test_a_law_says_what_it_lacks(law, lacking):
    """What a law needs must be given, and what it has no use for must not."""
    with pytest.raises(ConfigError, match=f"needs control.{lacking}"):
        TrainConfig(control=ControlConfig(law=law))
    with pytest.raises(ConfigError, match=r"it would be ignored|has no option"):
        TrainConfig(control=ControlConfig(law="goodput", **LAWS[law]))


@pytest.mark.parametrize("name", ["ratio", "samples_per_step"])
def test_a_relation_to_the_noise_scale_is_for_the_noise_law(name):
    """Another law refuses it, and the noise law takes one of the two."""
    with pytest.raises(ConfigError, match="has no option"):
        TrainConfig(control=ControlConfig(law="goodput", law_options={name: 2.0}))
    TrainConfig(control=ControlConfig(law="noise", law_options={name: 2.0}))
    with pytest.raises(ConfigError, match="exclude each other"):
        TrainConfig(control=ControlConfig(law="noise", law_options={"ratio": 2.0, "samples_per_step": 2.0}))


def test_what_seesaw_and_beta_rules_need_of_the_optimizer():
    """Seesaw needs a rate that falls, a rule for betas needs Adam, and a decay fraction a decay at the end."""
    with pytest.raises(ConfigError, match="falls"):
        TrainConfig(control=ControlConfig(law="seesaw"), optimizer=OptimizerConfig(schedule="constant"))
    with pytest.raises(ConfigError, match="Adam"):
        TrainConfig(optimizer=OptimizerConfig(name="sgd", beta_rule="half_life"))
    with pytest.raises(ConfigError, match="ignored"):
        TrainConfig(optimizer=OptimizerConfig(decay_fraction=0.3))


def test_seesaw_doubles_where_the_rate_would_halve(tmp_path):
    """The batch doubles once the linear schedule is down to a half, and the rate falls by √2 and not by two halves."""
    train(tmp_path / "run", law="seesaw", optimizer=OptimizerConfig(schedule="linear", warmup_samples=4))
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    first = next(row for row in rows if row["batch/global"] == 8)
    before = next(row for row in rows if row["progress/samples"] > 4)
    # The step that was under way when the stair came had the smaller batch and the smaller rate already.
    assert first["progress/samples"] == pytest.approx(113, abs=16)
    assert first["train/lr"] / before["train/lr"] == pytest.approx(2**-0.5)


def test_a_rate_is_tuned_at_one_batch_and_used_at_others(tmp_path):
    """From the reference batch the rule leads to the first batch and to those after it, as it leads back."""
    train(
        tmp_path / "run",
        law="schedule",
        schedule="0:4 60:16",
        smallest=None,
        largest=None,
        optimizer=OptimizerConfig(
            learning_rate=0.01, reference_batch_size=64, rule="square_root", schedule="constant", warmup_samples=0
        ),
    )
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    rates = {row["batch/global"]: row["train/lr"] for row in rows[:-1]}  # the last step has what is left
    assert rates == {4: pytest.approx(0.01 / 4), 16: pytest.approx(0.01 / 2)}


def test_a_rate_that_moves_at_a_constant_batch_is_in_the_metrics_alone(tmp_path):
    """Each decision on record changes the batch; the rate of each step is a column of its own."""
    train(
        tmp_path / "run",
        law="schedule",
        schedule="0:4 40:16",
        smallest=None,
        largest=None,
        optimizer=OptimizerConfig(learning_rate=0.01, rule="gain", schedule="constant", warmup_samples=0),
    )
    decisions = read_rows(tmp_path / "run" / "decisions.jsonl")
    assert [(row["batch/before"], row["batch/after"]) for row in decisions] == [(4, 16)]
    rates = [row["train/lr"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert len(set(rates)) > len(decisions) + 1


def test_betas_follow_the_batch_and_come_back(tmp_path):
    """Adam's second moment forgets over equal numbers of samples, as a function of the batch in force alone."""
    trainer, _ = train(
        tmp_path / "run",
        law="schedule",
        schedule="0:4 60:16 120:4",
        smallest=None,
        largest=None,
        optimizer=OptimizerConfig(beta_rule="half_life", beta1=0.95, beta2=0.99),
    )
    assert trainer._optimizer.param_groups[0]["betas"] == (0.95, 0.99)
    other, _ = train(
        tmp_path / "other",
        law="schedule",
        schedule="0:4 60:16",
        smallest=None,
        largest=None,
        optimizer=OptimizerConfig(beta_rule="half_life", beta1=0.95, beta2=0.99),
    )
    assert other._optimizer.param_groups[0]["betas"] == pytest.approx((0.95**4, 0.99**4))
    assert all(torch.isfinite(p).all() for p in other._bare_model.parameters())


def test_the_preset_moves_rate_betas_and_decay_with_the_batch(tmp_path, capsys):
    """At four times the batch all three follow, what is not decayed stays so, and a floor that binds is logged."""
    trainer, _ = train(
        tmp_path / "run",
        law="schedule",
        schedule="0:4 60:16",
        smallest=None,
        largest=None,
        optimizer=OptimizerConfig(
            preset="per_sample", beta2=0.95, weight_decay=0.01, schedule="constant", warmup_samples=0
        ),
    )
    groups = {group["weight_decay"] > 0: group for group in trainer._optimizer.param_groups}
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    factor = rows[-1]["train/lr"] / rows[0]["train/lr"]
    assert 1 <= factor <= 2
    assert groups[True]["weight_decay"] == pytest.approx(0.01 * 4 / factor, rel=1e-6)
    assert groups[True]["betas"] == (0.8, 0.9)
    assert "batch 16: beta1=0.8 beta2=0.9 (floor of beta_rule)" in capsys.readouterr().out


def test_each_row_has_the_factor_of_the_rule(tmp_path):
    """Under a rule that reads the noise scale it moves from step to step, also where the batch stays."""
    optimizer = OptimizerConfig(learning_rate=0.01, rule="noise", schedule="constant", warmup_samples=0)
    train(tmp_path / "run", law="noise", optimizer=optimizer)
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert all(row["train/lr"] == pytest.approx(0.01 * row["batch/lr_factor"]) for row in rows)
    decided = {row["lr_factor/after"] for row in read_rows(tmp_path / "run" / "decisions.jsonl")}
    assert len({row["batch/lr_factor"] for row in rows}) > len(decided)
