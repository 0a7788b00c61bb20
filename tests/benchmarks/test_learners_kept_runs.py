"""Runs that the benchmark of learners keeps: the same one is not trained twice, another one is."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.learners import kept_runs
from benchmarks.learners.runs import Arm
from dptrain.models.settings import ModelConfig


def test_a_run_is_trained_once_and_its_figures_say_when(tmp_path, monkeypatch):
    """Equal settings, way, arm and seed are one run, wherever what they start from lies; anything else is another."""
    trained = []

    def train(arm, *, seed, folder):
        trained.append((arm.name, seed, folder.name))
        return {"loss": float(len(trained))}

    monkeypatch.setattr(kept_runs, "train", train)
    kept = tmp_path / "kept"
    kept.mkdir()

    def once(arm, *, seed=0, shared="a", kept=kept):
        return kept_runs.train_once(arm, seed=seed, folder=tmp_path / "run", shared=tmp_path / shared, kept=kept)

    def arm_in(shared, **settings):
        return Arm(
            way="w", name="n", settings={"model": ModelConfig(weights=str(tmp_path / shared / "first")), **settings}
        )

    first = once(arm_in("a"))
    assert first["loss"] == 1.0
    assert first.keys() == {"loss", "measured", "source"}
    assert once(arm_in("b"), shared="b") == first
    assert len(trained) == 1
    assert once(arm_in("a"), seed=1)["loss"] == 2.0
    assert once(arm_in("a", max_samples=5))["loss"] == 3.0
    assert once(replace(arm_in("a"), name="other"))["loss"] == 4.0
    assert once(arm_in("a"), kept=None)["loss"] == 5.0
    # A task file of the benchmark is the same one in another checkout.
    assert kept_runs.known_of(arm_in("a", task=kept_runs.__file__), seed=0, shared=tmp_path)["settings"]["task"] == (
        "…/kept_runs.py"
    )
    assert len(list(kept.iterdir())) == 4
