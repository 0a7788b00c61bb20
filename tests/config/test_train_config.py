"""Settings: what is refused, how what is left open is filled in, and what is built from them."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from dptrain.config.built import controller, learning_rate_schedule, measurement_interval, micro_batch_size
from dptrain.config.filled_in import as_saved, filled_in
from dptrain.control import Measurement
from dptrain.control.goodput import GoodputLaw
from dptrain.control.schedule import Constant
from dptrain.errors import ConfigError
from dptrain.noise import MomentSums, noise_scale, smoothed
from dptrain.tasks import Suggestion
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    ExecutionConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)

SUGGESTION = Suggestion(
    learning_rate=0.01, global_batch_size=16, micro_batch_size=4, max_samples=10_000, eval_every_samples=1_000
)


def filled(*, world_size=2, **settings):
    return filled_in(TrainConfig(**settings), SUGGESTION, world_size=world_size)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: TrainConfig(max_samples=0), "max_samples"),
        (lambda: TrainConfig(global_batch_size=-4), "global_batch_size"),
        (lambda: TrainConfig(micro_batch_size=0), "micro_batch_size"),
        (lambda: TrainConfig(num_workers=-1), "num_workers"),
        (lambda: TrainConfig(seed=-1), "seed"),
        (lambda: TrainConfig(seed=2**63), "seed"),
        (lambda: TrainConfig(checkpoint=CheckpointConfig(keep=0)), "checkpoint.keep"),
        (lambda: TrainConfig(checkpoint=CheckpointConfig(every_samples=0)), "checkpoint.every_samples"),
        (lambda: TrainConfig(log=LogConfig(every_steps=0)), "log.every_steps"),
        (lambda: TrainConfig(log=LogConfig(print_every_steps=0)), "log.print_every_steps"),
        (lambda: TrainConfig(log=LogConfig(eval_every_samples=0)), "log.eval_every_samples"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(learning_rate=0.0)), "optimizer.learning_rate"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(learning_rate=math.nan)), "optimizer.learning_rate"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(max_grad_norm=-1.0)), "optimizer.max_grad_norm"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(beta1=1.0)), "optimizer.beta1"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(beta2=-0.1)), "optimizer.beta2"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(weight_decay=-1.0)), "optimizer.weight_decay"),
        (lambda: TrainConfig(noise=NoiseConfig(level=1.0)), "noise.level"),
        (lambda: TrainConfig(noise=NoiseConfig(memory=-1.0)), "memory"),
        (lambda: TrainConfig(control=ControlConfig(law="noise", law_options={"ratio": 0.0})), "law_options.ratio"),
        (lambda: TrainConfig(control=ControlConfig(law="noise", law_options={"ratio": True})), "law_options.ratio"),
        (lambda: TrainConfig(control=ControlConfig(law="pollux", law_options={"overlap": "2"})), "law_options.overlap"),
        (lambda: TrainConfig(control=ControlConfig(min_gain=-1.0)), "control.min_gain"),
        (lambda: TrainConfig(control=ControlConfig(min_gain=math.inf)), "control.min_gain"),
        (lambda: TrainConfig(control=ControlConfig(critical_ratio=0.0)), "control.critical_ratio"),
        (lambda: TrainConfig(control=ControlConfig(critical_ratio=math.nan)), "control.critical_ratio"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(warmup_samples=-1)), "optimizer.warmup_samples"),
        (lambda: TrainConfig(control=ControlConfig(law="kaplan")), "tokens_per_sample"),
        (lambda: TrainConfig(control=ControlConfig(law_options={"overlap": 2.0})), "no option overlap; it takes none"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(preset="per_sample", rule="none")), "leave optimizer.rule out"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(rule="linear", beta_rule="half_life")), "does not go with"),
        (lambda: TrainConfig(optimizer=OptimizerConfig(name="sgd", beta_rule="half_life")), "Adam's betas"),
        (lambda: TrainConfig(control=ControlConfig(law="schedule")), "control.schedule"),
        (
            lambda: TrainConfig(
                optimizer=OptimizerConfig(average_decay=0.9), execution=ExecutionConfig(wrapper="fsdp")
            ),
            "leave the average out",
        ),
        (lambda: TrainConfig(control=ControlConfig(law="schedule", schedule="0:8 x")), "'x'"),
        (lambda: TrainConfig(control=ControlConfig(schedule="0:8")), "control.schedule"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(build, name):
    """As soon as the settings are built, and in one line."""
    with pytest.raises(ConfigError, match=name) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "control",
    [
        ControlConfig(smallest=64, largest=32),
        ControlConfig(largest=1),
    ],
)
def test_limits_that_cannot_hold_are_refused(control):
    """When the controller is built, which is before anything is trained."""
    with pytest.raises(ConfigError):
        controller(filled(control=control))


def test_settings_are_data():
    """They are equal by value and cannot be changed."""
    assert TrainConfig() == TrainConfig()
    with pytest.raises(FrozenInstanceError):
        TrainConfig().seed = 1


def test_nothing_that_has_a_default_is_left_open():
    """Filling in leaves None only where None means "not"; and filling in twice changes nothing."""
    config = filled()
    assert (config.max_samples, config.global_batch_size, config.micro_batch_size) == (10_000, 16, 4)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_samples) == (0.01, 200)
    assert (config.optimizer.reference_batch_size, config.optimizer.rule) == (config.global_batch_size, "root_gain")
    assert (config.control.smallest, config.control.largest) == (8, 200)
    assert config.log.eval_every_samples == 1_000
    assert config.layout_replicas == 2
    assert config.checkpoint.every_samples is None, "by the clock"
    assert filled_in(config, SUGGESTION, world_size=2) == config


@pytest.mark.parametrize("micro", [1, 3, 4, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_the_settings_of_a_run_are_settings(world_size, micro):
    """A run's config.yaml starts the same run again, whatever was left open and however small the first batch is."""
    suggestion = replace(SUGGESTION, micro_batch_size=micro)
    for share in (None, 1, 3, 5, 8, 20):
        config = TrainConfig(global_batch_size=None if share is None else share * world_size)
        config = filled_in(config, suggestion, world_size=world_size)
        assert filled_in(config, suggestion, world_size=world_size) == config
        assert controller(config)
        assert config.micro_batch_size <= micro


@pytest.mark.parametrize("law", ["goodput", "pollux"])
@pytest.mark.parametrize(("control", "expected"), [({}, 1.0), ({"critical_ratio": 2.0}, 2.0)])
def test_the_critical_ratio_reaches_the_law(law, control, expected):
    """One for each optimizer by default, or what the user has set."""
    for name in ("adamw", "sgd"):
        config = filled(control=ControlConfig(law=law, **control), optimizer=OptimizerConfig(name=name))
        built = controller(config).inner
        assert isinstance(built, GoodputLaw)
        assert built.critical_ratio.median == config.control.critical_ratio == expected


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ({}, ("root_gain", "none", "none")),
        ({"name": "sgd"}, ("gain", "none", "none")),
        ({"preset": "per_sample"}, ("root_gain", "half_life", "timescale")),
        ({"preset": "per_sample", "name": "sgd"}, ("gain", "none", "timescale")),
        ({"rule": "square_root", "beta_rule": "square_root"}, ("square_root", "square_root", "none")),
    ],
)
def test_a_preset_fills_in_rate_betas_and_decay(optimizer, expected):
    """One setting moves all three, and a filled-in configuration can be filled in again."""
    config = filled(optimizer=OptimizerConfig(**optimizer))
    filled_rules = config.optimizer.rule, config.optimizer.beta_rule, config.optimizer.decay_rule
    assert filled_rules == expected
    assert filled_in(config, SUGGESTION, world_size=2) == config


def test_what_is_set_stays():
    """No default replaces a value that was given."""
    config = filled(
        max_samples=500,
        global_batch_size=8,
        micro_batch_size=2,
        optimizer=OptimizerConfig(
            learning_rate=1.0,
            reference_batch_size=4,
            rule="none",
            beta_rule="none",
            decay_rule="timescale",
            warmup_samples=0,
            final_fraction=0.0,
        ),
        control=ControlConfig(smallest=4, largest=64),
        checkpoint=CheckpointConfig(every_samples=7),
        log=LogConfig(eval_every_samples=9),
    )
    assert (config.max_samples, config.global_batch_size, config.micro_batch_size) == (500, 8, 2)
    assert config.optimizer == OptimizerConfig(
        learning_rate=1.0,
        reference_batch_size=4,
        rule="none",
        beta_rule="none",
        decay_rule="timescale",
        warmup_samples=0,
        final_fraction=0.0,
    )
    assert (config.control.smallest, config.control.largest) == (4, 64)
    assert (config.checkpoint.every_samples, config.log.eval_every_samples) == (7, 9)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 48])
def test_a_suggestion_yields_to_the_world_size(world_size):
    """A task's batch is rounded up to what the replicas share equally: no task refuses a number of replicas."""
    config = filled(world_size=world_size)
    assert 16 <= config.global_batch_size < 16 + world_size
    assert config.global_batch_size % world_size == 0
    assert micro_batch_size(config, global_batch_size=config.global_batch_size)
    assert controller(config)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"global_batch_size": 12, "micro_batch_size": 4}, "multiple of 8, such as 8 or 16"),
        ({"global_batch_size": 15}, "multiple of 2, such as 14 or 16"),
        ({"global_batch_size": 3, "micro_batch_size": 4}, "multiple of 2, such as 2 or 4"),
        ({"global_batch_size": 1}, "multiple of 2, such as 2 or 4"),
    ],
)
def test_a_batch_that_cannot_be_reached_is_refused_with_the_nearest_that_can(settings, text):
    """A batch that somebody wrote is not rounded in silence."""
    with pytest.raises(ConfigError, match=text):
        filled(**settings)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch", [4, 8, 16, 24, 64])
def test_the_layout_gives_the_batch_in_two_micro_batches_at_least(batch, world_size):
    """The replicas that a run is laid out for share full micro-batches equally; there always are two to compare."""
    micro = micro_batch_size(filled(world_size=world_size), global_batch_size=batch)
    assert batch % (micro * world_size) == 0
    assert micro <= 4
    assert batch // micro >= 2


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_other_replicas_change_nothing_in_filled_in_settings(world_size):
    """What a run was laid out for stays, whatever number of replicas goes on with it."""
    config = filled(world_size=2)
    assert filled_in(config, SUGGESTION, world_size=world_size) == config


def test_what_is_left_open_is_as_it_was_saved():
    """Resumed with few settings, a run has those of its checkpoint; those that are given stay as given."""
    saved = filled(max_samples=500, control=ControlConfig(smallest=4, largest=64))
    assert as_saved(TrainConfig(), saved=asdict(saved)) == saved
    given = as_saved(TrainConfig(max_samples=600, control=ControlConfig(largest=32)), saved=asdict(saved))
    assert (given.max_samples, given.control.largest, given.control.smallest) == (600, 32, 4)


def test_a_schedule_written_by_hand_is_not_cut():
    """Its batches, the first included, are those of the run, though they lie outside the default bounds."""
    config = filled(control=ControlConfig(law="schedule", schedule="0:4 100:1000 200:6"), max_samples=300)
    assert config.global_batch_size == 4
    control = controller(config)
    state, asked, batch = control.init(), [], 4
    for position in (50, 150, 250):
        measurement = Measurement(samples_seen=position, global_batch_size=batch, noise_scale=unknown())
        state, decision = control.update(state, measurement)
        batch = decision.global_batch_size
        asked.append(batch)
    assert asked == [4, 1000, 6]


def unknown():
    return noise_scale(smoothed(MomentSums()))


def test_a_constant_law_has_no_limits():
    """Its batch may lie outside any bound."""
    config = filled(control=ControlConfig(law="constant"), global_batch_size=6, micro_batch_size=3)
    assert controller(config) == Constant(6)


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_every_schedule_of_the_rate_can_be_chosen_alone(kind):
    """Its end is filled in to fit: none where the rate stays, a tenth where it falls."""
    schedule = learning_rate_schedule(filled(optimizer=OptimizerConfig(schedule=kind)))
    assert schedule.factor(10_000) == pytest.approx(1.0 if kind == "constant" else 0.1)
    assert schedule.factor(100) == pytest.approx(0.5)


def interval_when_measuring_is_dear(config):
    """Steps between two measured ones, where each measurement takes half of a step."""
    rule = measurement_interval(config)
    for _ in range(30):
        rule.note([0.5, 1.5, 1.0])
        rule.close()
    return rule.every


@pytest.mark.parametrize(
    ("law", "rule", "reference", "by_seed"),
    [
        ("noise", "none", 16, True),
        ("schedule", "root_gain", 16, True),
        ("schedule", "square_root", 16, False),
        ("constant", "root_gain", 64, True),
        ("constant", "noise", 16, True),
        ("constant", "root_gain", 16, False),
        ("goodput", "root_gain", 16, False),
    ],
)
def test_a_seed_decides_a_run_whose_law_reads_no_clock(law, rule, reference, by_seed):
    """Each step is measured where batch or rate follow the noise scale; else the clock may choose the steps."""
    control = ControlConfig(law=law, schedule="0:16 1000:32" if law == "schedule" else None)
    optimizer = OptimizerConfig(rule=rule, reference_batch_size=reference)
    config = filled(control=control, optimizer=optimizer)
    assert (interval_when_measuring_is_dear(config) == 1) == by_seed
    only_advised = replace(config, control=replace(config.control, mode="advise"))
    assert interval_when_measuring_is_dear(only_advised) > 1
    assert interval_when_measuring_is_dear(replace(config, noise=NoiseConfig(every=4))) == 4
