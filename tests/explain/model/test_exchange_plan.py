"""Plans of exchanges, against arithmetic by hand."""

from __future__ import annotations

import json

import pytest
import torch

from dptrain.cli.plan import plan
from dptrain.errors import ConfigError
from dptrain.exchange import ExchangeConfig
from dptrain.explain.model.exchange_plan import FASTEST_MBIT, plan_exchange
from dptrain.explain.text.exchange_text import exchange_sentences
from dptrain.tracking.run_folder import write_config
from dptrain.train import ControlConfig, Trainer
from tests.runs import make_config, noisy

SHAPES = {"weight": ((1000, 250), torch.float32)}  # 1 MB


class Record:
    """A run of two replicas with steps of 10 ms."""

    name = "run"
    train = ({"time/step_s": 0.01},) * 4

    def __init__(self, replicas=2):
        self._replicas = replicas

    def last(self, _key, *, in_summary=None):
        del in_summary
        return self._replicas


def kinds(**network):
    found = plan_exchange(Record(), SHAPES, **network)
    return found, {kind.settings: kind for kind in found.kinds}


def test_bytes_and_seconds_are_those_of_a_ring():
    """1 MB at 100 Mbit/s is 80 ms beside 10 ms of compute; int8 sends a quarter, every eighth step an eighth."""
    _, found = kinds(mbit_per_s=100.0, delay_s=0.0)
    exact = found["all_reduce"]
    assert exact.bytes_per_step == 1e6
    assert exact.step_s == pytest.approx(0.09)
    assert found["compressed codec=int8"].bytes_per_step == pytest.approx(0.25e6, rel=1e-4)
    assert found["local_updates every=8"].step_s == pytest.approx(0.02)
    assert found["local_updates every=8"].most_steps == pytest.approx(4.5)
    assert found["compressed codec=powersgd"].bytes_per_step == 4 * 2 * 1250
    assert found["random_bases dimensions=256"].bytes_per_step == 1024
    assert found["ensemble"].bytes_per_step == 0


def test_a_kind_pays_below_the_bandwidth_at_which_it_saves_a_tenth():
    """Nothing sent saves a tenth where 1 MB takes a ninth of the compute: 8 Mbit in 1.11 ms."""
    _, found = kinds(mbit_per_s=7000.0, delay_s=0.0)
    assert found["ensemble"].pays_below_mbit == pytest.approx(8 / (0.01 / 9), rel=2e-3)
    assert found["ensemble"].pays
    assert found["all_reduce"].pays_below_mbit is None
    plan, found = kinds(mbit_per_s=7300.0, delay_s=0.0)
    assert not any(kind.pays for kind in found.values())
    assert exchange_sentences(plan)[0].startswith("No gain")


def test_with_a_delay_rare_messages_pay_at_any_bandwidth_and_more_messages_do_not():
    """A round of 2 messages takes 20 ms; PowerSGD needs two of them, and no step is faster than one."""
    _, found = kinds(mbit_per_s=1e5, delay_s=0.01)
    assert found["local_updates every=8"].pays_below_mbit == FASTEST_MBIT
    assert found["local_updates every=8"].step_s == pytest.approx(0.02)
    assert not found["compressed codec=powersgd"].pays


def test_one_replica_has_nothing_to_exchange():
    """It is refused with the remedy."""
    with pytest.raises(ConfigError, match="two or more"):
        plan_exchange(Record(1), SHAPES, mbit_per_s=1.0, delay_s=0.0)


def test_the_command_refuses_a_run_on_one_replica(tmp_path, capsys):
    """With the same words, from a run folder."""
    config = make_config(tmp_path / "run", control=ControlConfig(law="constant"))
    assert config.exchange == ExchangeConfig()
    Trainer(config, task=noisy).run()
    write_config(tmp_path / "run" / "config.yaml", config)
    with pytest.raises(ConfigError, match="one replica"):
        plan([str(tmp_path / "run"), "--bandwidth-mbit-per-s", "100", "--json", str(tmp_path / "plan.json")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["bytes_per_step"] == 0
