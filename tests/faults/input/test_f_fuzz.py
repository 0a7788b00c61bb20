"""F10 and invariant 13 of the faults: whatever stands in settings, they are settings or a ConfigError."""

from __future__ import annotations

import math
import os
from dataclasses import asdict

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dptrain.config.settings_file import build_config, read_settings, setting_names, settings_text
from dptrain.errors import ConfigError
from dptrain.train import TrainConfig

# The long form of the fuzz: DPTRAIN_FUZZ_CASES=1000.
FUZZ = settings(
    derandomize=True,
    max_examples=int(os.environ.get("DPTRAIN_FUZZ_CASES", "100")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
ODD_TEXT = st.sampled_from(
    [
        *("no", "1e3", "010", "null", "~", "", "true", "1_0", ".nan", "2026-01-01", "=", "<<", "0o7", "1:30"),
        *("a: b", "- a", "#", "'", "!x", "&a", "*a", "%", "@", "|", "\n", "a\n b\n", "é", "😀"),
        *("\t", "\x85", "\u2028", "\ufeff", "\x00", "\x7f", "\ud800"),
    ]
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, ODD_TEXT)
JUNK = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | ODD_TEXT, inner, max_size=3)
)
PLAIN_SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
    ODD_TEXT.filter("\ud800".__ne__),
)
PLAIN = st.recursive(
    PLAIN_SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
COUNT = st.integers(1, 2**40)
POSITIVE = st.floats(1e-30, 1e30)
VALID = {
    "task": st.sampled_from(["digits", "a b/c.py:f", "no"]),
    "task_options": st.dictionaries(TEXT.filter(bool), PLAIN, max_size=3),
    "run_dir": st.none() | st.sampled_from(["runs/1", "1e3", "no", "ö: x", "-rf"]),
    "seed": st.integers(0, 2**63 - 1),
    "max_samples": st.none() | COUNT,
    "global_batch_size": st.none() | COUNT,
    "micro_batch_size": st.none() | st.just("auto") | COUNT,
    "branch_from": st.none() | st.sampled_from(["runs/1/checkpoints/step-000000000012", "ö"]),
    "layout_replicas": st.none() | COUNT,
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "precision": st.sampled_from(["no", "bf16"]),
    "num_workers": st.integers(0, 64),
    "replica_check_every_steps": st.integers(0, 2**40),
    "control.mode": st.sampled_from(["off", "measure", "advise", "adapt"]),
    "control.critical_ratio": POSITIVE,
    "control.min_gain": st.floats(0, 1e6),
    "noise.observer": st.sampled_from(["parameters", "hook"]),
    "noise.memory": st.floats(1e-6, 1e6),
    "noise.half_life_samples": st.none() | POSITIVE,
    "noise.level": st.floats(0.01, 0.99),
    "noise.groups": st.booleans(),
    "optimizer.name": st.sampled_from(["adamw", "sgd"]),
    "optimizer.learning_rate": st.none() | POSITIVE,
    "optimizer.reference_batch_size": st.none() | COUNT,
    "optimizer.rule": st.sampled_from([None, "none", "linear", "square_root", "gain", "root_gain", "noise", "surge"]),
    "optimizer.schedule": st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    "optimizer.weight_decay": st.floats(0, 1e6),
    "optimizer.beta1": st.floats(0, 0.999),
    "optimizer.beta2": st.floats(0, 0.999),
    "optimizer.max_grad_norm": st.none() | POSITIVE,
    "optimizer.max_skipped_steps": COUNT,
    "checkpoint.every_samples": st.none() | COUNT,
    "checkpoint.hours_between_failures": POSITIVE,
    "checkpoint.keep": st.integers(1, 100),
    "log.every_steps": COUNT,
    "log.print_every_steps": COUNT,
    "log.eval_every_samples": st.none() | COUNT,
    "log.tracker": st.sampled_from(["auto", "wandb", "none"]),
    "log.project": st.sampled_from(["dptrain", "1e3", "no", "null"]),
    "log.price_per_device_hour": st.none() | POSITIVE,
}
"""Values that are allowed in any combination. Those that depend on others are left at their defaults."""

COUNTS = [
    *("max_samples", "max_steps", "global_batch_size", "control.smallest", "control.largest"),
    *("max_tokens", "global_batch_tokens", "control.smallest_tokens", "control.largest_tokens"),
    *("optimizer.reference_batch_tokens", "checkpoint.every_tokens", "log.eval_every_tokens"),
    "optimizer.reference_batch_size",
    *("layout_replicas", "optimizer.max_skipped_steps", "checkpoint.every_samples", "checkpoint.keep"),
    *("log.every_steps", "log.print_every_steps", "log.eval_every_samples"),
]
COUNTS_FROM_0 = [
    *("seed", "num_workers", "replica_check_every_steps"),
]
POSITIVES = [
    *(
        "control.critical_ratio",
        "noise.memory",
        "noise.half_life_samples",
        "optimizer.learning_rate",
        "optimizer.max_grad_norm",
    ),
    *("checkpoint.hours_between_failures", "log.price_per_device_hour"),
]
CHOICES = [
    *("device", "precision", "control.law", "noise.observer"),
    *("optimizer.schedule", "log.tracker", "control.mode"),
]
OUTSIDE = {
    "exchange.codec": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, 3, ""],
    "exchange.dimensions": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "exchange.error_feedback": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", [], {}, 3, ""],
    "exchange.every": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "exchange.kind": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "exchange.outer": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, 3, ""],
    "exchange.outer_learning_rate": [0.0, 0, -1, -1.0, math.nan, math.inf, "x", True, [], {}, ""],
    "exchange.outer_momentum": [-1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, 3, ""],
    "exchange.overlap": [-1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "exchange.predictions": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, 3, ""],
    "exchange.rank": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "exchange.redraw": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", [], {}, 3, ""],
    "exchange.shared_samples": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "exchange.staleness": [-1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "exchange.weight": [-1, -1.0, math.nan, math.inf, "x", True, [], {}, ""],
    "sparsity.dense": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "sparsity.distribution": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "sparsity.drop_fraction": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "sparsity.end_fraction": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "sparsity.method": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "sparsity.sparsity": [0.0, 0, -1, -1.0, 1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "sparsity.update_every_samples": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "early_stopping.figure": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, None, [], {}, 3, ""],
    "early_stopping.higher_is_better": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", None, [], {}, 3, ""],
    "early_stopping.min_improvement": [-1, -1.0, math.nan, math.inf, "x", True, None, [], {}, ""],
    "early_stopping.patience": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "execution.activation_checkpointing": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "execution.collect_garbage_every_steps": [0.0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, ""],
    "execution.compile": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "execution.compile_backend": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, None, [], {}, 3],
    "execution.shard_size": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "execution.expert_parallel_size": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, ""],
    "execution.share_devices": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", None, [], {}, 3, ""],
    "execution.tf32": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", None, [], {}, 3, ""],
    "execution.wrapper": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "find_unused_parameters": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", [], {}, 3, ""],
    "log.console": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "log.metrics_file": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "log.metrics_port": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "log.opentelemetry": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", None, [], {}, 3, ""],
    "model.freeze": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "model.lora_alpha": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, ""],
    "model.lora_rank": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "model.lora_targets": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "model.weights": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "distillation.hidden": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "distillation.hidden_weight": [0.0, 0, -1, -1.0, math.nan, math.inf, "x", True, None, [], {}, ""],
    "distillation.teacher": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "distillation.temperature": [0.0, 0, -1, -1.0, math.nan, math.inf, "x", True, None, [], {}, ""],
    "distillation.weight": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "model.layer_decay": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, 3, ""],
    "model.quantize": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, 3, ""],
    "model.rounding": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], {}, 3, ""],
    "model.unquantized": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "model.new_head": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, [], {}, 3, ""],
    "noise.budget": [0.0, 0, -1, -1.0, math.nan, math.inf, "x", True, None, [], {}, ""],
    "noise.every": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, ""],
    "optimizer.average_decay": [-1, -1.0, math.nan, math.inf, 1.5, "x", True, [], {}, 3, ""],
    "optimizer.options": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, "x", True, None, [], 3, ""],
    **dict.fromkeys(COUNTS, (0, -1, 2**63, 10**5000, 1.5, "3", True, [], math.nan)),
    **dict.fromkeys(COUNTS_FROM_0, (-1, 2**63, 1.5, "3", True, None, math.nan)),
    **dict.fromkeys(POSITIVES, (0.0, -1.0, math.nan, math.inf, "1", True)),
    **dict.fromkeys(CHOICES, ("newest", "", None, 3, False)),
    "optimizer.name": [0.0, 0, -1, -1.0, math.nan, math.inf, 1.5, True, None, [], {}, 3, ""],
    "optimizer.rule": ["newest", "", 3, False],
    "optimizer.beta1": [1.0, -0.1, math.nan, "1", None],
    "optimizer.beta2": [1.0, -0.1, math.nan, "1", None],
    "noise.level": [0.0, 1.0, -1.0, math.nan, None],
    "optimizer.weight_decay": [-1.0, math.nan, math.inf, None],
    "optimizer.final_fraction": [-0.1, 1.1, math.nan, "1"],
    "optimizer.warmup_samples": [-1, 2**63, 0.5],
    "optimizer.warmup_tokens": [-1, 2**63, 0.5],
    "noise.groups": [1, "true", None],
    "control.min_gain": [-1.0, math.nan, math.inf, "1", None],
    "control.law_options": [None, [], {"overlap": 2.0}],
    "optimizer.beta_rule": ["newest", "", 3, False],
    "optimizer.decay_rule": ["newest", "", 3, False],
    "optimizer.preset": ["newest", "", 3, False],
    "micro_batch_size": [0, -1, 2**63, 1.5, "3", "all", True, []],
    "branch_from": ["", "a\x00b", 7, "\udcff"],
    "control.schedule": ["0:8", 3],
    "control.schedule_tokens": ["0:8", 3],
    "optimizer.decay_fraction": [0.0, 0.5, 1.1, "1"],
    "run_dir": ["", "a\x00b", "a\nb", "a\x1b[2Jb", "x" * 256, "x/" * 4000, 7, "\udcff"],
    "task": ["", None, 7, "a\x00b"],
    "log.project": ["", None, 7, "a\nb"],
    "task_options": [None, [], {1: 2}, {"a": math.nan}, {"a": object()}, {"a": (1, 2)}, {"a": {"b": {3}}}],
}
"""Values of each setting that are never allowed, or never beside the defaults."""


def tree(flat):
    """Return names with dots as groups."""
    found = {}
    for name, value in flat.items():
        group, dot, inner = name.partition(".")
        if dot:
            found.setdefault(group, {})[inner] = value
        else:
            found[name] = value
    return found


@st.composite
def valid_settings(draw):
    """Some of the settings, in any order, each with a value that is allowed."""
    names = draw(st.lists(st.sampled_from(sorted(VALID)), unique=True))
    return {name: draw(VALID[name]) for name in names}


def yaml_of(values):
    return yaml.dump(values, allow_unicode=True, sort_keys=False, Dumper=yaml.SafeDumper)


@FUZZ
@given(
    content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
)
def test_f10_any_bytes_give_settings_or_a_config_error(tmp_path, content):
    """No content of a settings file gives another error, and none more than a sentence."""
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        settings_read = read_settings(path)
    except ConfigError as error:
        settings_read, sentence = {}, str(error)
    else:
        sentence = ""
    assert isinstance(settings_read, dict)
    assert "\n" not in sentence


@FUZZ
@given(flat=valid_settings(), name=st.sampled_from(sorted(setting_names())), junk=JUNK)
def test_f10_any_value_gives_settings_or_a_config_error(flat, name, junk):
    """Anything in the place of one setting is either a value of it or a ConfigError."""
    try:
        config = build_config(tree({**flat, name: junk}))
    except ConfigError:
        return
    assert isinstance(config, TrainConfig)
    assert yaml.safe_load(settings_text(config))


@FUZZ
@given(flat=valid_settings())
def test_f10_settings_come_back_as_they_were(tmp_path, flat):
    """Invariant 13: written and read, settings are equal, by our reader and, but for floats, by any other."""
    config = build_config(tree(flat))
    path = tmp_path / "settings.yaml"
    path.write_text(settings_text(config), encoding="utf-8", newline="")
    assert build_config(read_settings(path)) == config
    assert yaml.safe_load(settings_text(config)) == asdict(config)


@FUZZ
@given(flat=valid_settings(), order=st.randoms(use_true_random=False))
def test_f10_the_order_of_names_means_nothing(flat, order):
    """Invariant 13: the same settings in another order are the same settings."""
    names = list(flat)
    order.shuffle(names)
    assert build_config(tree({name: flat[name] for name in names})) == build_config(tree(flat))


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_f10_one_value_outside_its_domain_is_refused_by_name(name):
    """Invariant 13: each such value gives a ConfigError with the dotted name of the setting."""
    for value in OUTSIDE[name]:
        with pytest.raises(ConfigError) as caught:
            build_config(tree({name: value}))
        assert name in str(caught.value), (value, str(caught.value))


def test_f10_every_setting_is_fuzzed():
    """A setting that is added has a domain here in the same commit."""
    alone = {
        "control.law",
        "control.law_options",
        "control.schedule",
        "control.smallest",
        "control.largest",
        "max_steps",
    }
    alone |= {"optimizer.preset", "optimizer.beta_rule", "optimizer.decay_rule", "optimizer.decay_fraction"}
    alone |= {"max_tokens", "global_batch_tokens", "optimizer.reference_batch_tokens", "optimizer.warmup_tokens"}
    alone |= {"control.schedule_tokens", "control.smallest_tokens", "control.largest_tokens"}
    alone |= {"checkpoint.every_tokens", "log.eval_every_tokens"}  # allowed in place of those in samples only
    alone |= {"optimizer.warmup_samples", "optimizer.final_fraction"}  # allowed with some values of others only
    alone |= {name for name in OUTSIDE if name.startswith("exchange.")}  # each is for some kinds only
    # Allowed with packages, devices, ports or sizes of replicas that not every machine has.
    alone |= {
        "distillation.hidden",
        "distillation.hidden_weight",
        "distillation.teacher",
        "distillation.temperature",
        "distillation.weight",
        "early_stopping.figure",
        "early_stopping.higher_is_better",
        "early_stopping.min_improvement",
        "early_stopping.patience",
        "execution.activation_checkpointing",
        "execution.collect_garbage_every_steps",
        "execution.compile",
        "execution.compile_backend",
        "execution.expert_parallel_size",
        "execution.shard_size",
        "execution.share_devices",
        "execution.tf32",
        "execution.wrapper",
        "find_unused_parameters",
        "log.console",
        "log.metrics_file",
        "log.metrics_port",
        "log.opentelemetry",
        "model.freeze",
        "model.layer_decay",
        "model.lora_alpha",
        "model.lora_rank",
        "model.lora_targets",
        "model.new_head",
        "model.quantize",
        "model.rounding",
        "model.unquantized",
        "model.weights",
        "noise.budget",
        "noise.every",
        "optimizer.average_decay",
        "optimizer.options",
        "sparsity.dense",
        "sparsity.distribution",
        "sparsity.drop_fraction",
        "sparsity.end_fraction",
        "sparsity.method",
        "sparsity.sparsity",
        "sparsity.update_every_samples",
    }
    assert set(VALID) | alone == set(setting_names())
    assert set(OUTSIDE) == set(setting_names())
