"""What the benchmark of learners makes of its runs: margins, verdicts, figures, and the page."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.learners import __main__ as learners
from benchmarks.learners import branches, expert_gradients, normalised_cnn, page, pictures, table, ways
from benchmarks.learners.runs import Arm
from tests import runs


def result(loss, *, noise=10.0):
    return {
        "loss": loss,
        "accuracy": 0.5,
        "seconds": 1.0,
        "flops": 2e9,
        "sparse_flops": None,
        "noise_early": noise,
        "noise_late": None,
        "gradient_bytes": 4e6,
        "speed_up": {"8": 5.0, "64": "64 devices need a larger data set"},
        "measured": "2026-12-01",
        "source": "0123",
    }


def rows_of(*arms):
    rows = [table.trained_row(arm, [result(loss) for loss in losses]) for arm, losses in arms]
    table.compare(rows, [arm for arm, _ in arms])
    return rows


def test_a_margin_is_in_units_of_the_larger_spread():
    """1.0 ± 0.1 and 0.7 ± 0.05 are three spreads apart; within one spread there is no gain; above it a loss."""
    control = Arm(way="w", name="control")
    arms = [Arm(way="w", name=name, control="control") for name in ("better", "equal", "worse")]
    rows = rows_of(
        (control, (0.9, 1.0, 1.1)),
        (arms[0], (0.65, 0.7, 0.75)),
        (arms[1], (0.95, 0.95, 0.95)),
        (arms[2], (1.2, 1.2, 1.2)),
    )
    assert [row.get("margin") for row in rows[1:]] == pytest.approx([3.0, 0.5, -2.0])
    assert [row["verdict"].partition(" over")[0] for row in rows] == ["–", "gain", "no gain", "loss"]
    assert rows[0]["noise_early"] == "10"
    assert rows[0]["noise_late"] == "not resolved"


def test_figures_and_page_are_of_the_rows():
    """The order of RigL over static masks must hold on every task; the page has a line for each row and figure."""
    pairs = []
    for way, names in (
        ("fine-tuning", ("all weights",)),
        ("distillation", ("taught",)),
        ("a", ("rigl",)),
        ("b", ("rigl",)),
    ):
        pairs.append((Arm(way=way, name="control"), (1.0, 1.1)))
        pairs += [(Arm(way=way, name=name, control="control"), (0.5, 0.6)) for name in names]
    rows = rows_of(*pairs)
    figures = table.margin_figures(rows)
    assert figures["rigl_order_holds"] == 1.0
    assert figures["finetune_margin_in_spreads"] == figures["distill_margin_in_spreads"] > 1
    rows[-1]["margin"] = -0.1
    assert table.margin_figures(rows)["rigl_order_holds"] == 0.0
    findings = harness.Findings(
        figures=figures, rows=rows, columns={"arm": "{arm}", "loss": "{loss:.1f}"}, note="A note."
    )
    text = page.page(findings, command="python -m benchmarks.learners", figure="learners.png")
    assert text.count("\n| ") == 1 + len(rows) + 1 + len(figures)
    assert "| taught | 0.6 |" in text
    assert "![Margins over controls, and noise scales](learners.png)" in text
    assert "- distillation: 2026-12-01 (0123)" in text


def test_earlier_results_stand_beside_those_of_the_run_and_say_so(tmp_path):
    """Of an arm in two files the later counts, and this run's above all; what was not measured then is not made up."""
    environment = {"dptrain": "0.0.9", "torch": "2.0"}
    for name, losses in (("first", {"a": 1.0, "b": 2.0, "c": 3.0}), ("second", {"b": 2.5})):
        rows = [{"way": "w", "arm": arm, "loss": loss} for arm, loss in losses.items()]
        found = {"command": "python -m x", "environment": environment, "figures": {"f": 1.0, name: 2.0}, "rows": rows}
        (tmp_path / name).write_text(json.dumps(found))
    (own,) = rows_of((Arm(way="w", name="c"), (0.1, 0.2)))
    findings = harness.Findings(figures={"f": 3.0}, rows=[own], columns={}, note="A note.")
    merged = page.with_earlier(findings, [tmp_path / "first", tmp_path / "second"])
    a, b, c = sorted(merged.rows, key=lambda row: row["arm"])
    assert [row["loss"] for row in (a, b, c)] == pytest.approx([1.0, 2.5, 0.15])
    assert merged.figures == {"f": 3.0, "first": 2.0, "second": 2.0}
    assert a["speed_up_64"] == a["gradients_text"] == "not measured"
    assert a["measured"] == "an earlier `python -m x`, dptrain 0.0.9, torch 2.0"
    assert c == own


def test_branches_of_an_arm_stand_in_its_row(tmp_path):
    """The loss of the earlier row, the critical batch of this run, and when each was measured."""
    row = {"way": "w", "arm": "a", "loss": 1.0, "measured": "then; branches before", "critical_text": "32"}
    found = {"command": "x", "environment": {"dptrain": "0", "torch": "2"}, "figures": {}, "rows": [row]}
    (tmp_path / "earlier").write_text(json.dumps(found))
    new = {"way": "w", "arm": "a", "critical_text": "64", "branches": [{}], "measured": "branches now"}
    findings = harness.Findings(figures={}, rows=[new], columns={}, note="A note.")
    (merged,) = page.with_earlier(findings, [tmp_path / "earlier"]).rows
    assert (merged["loss"], merged["critical_text"], merged["measured"]) == (1.0, "64", "then; branches now")


def test_the_page_says_what_was_not_measured():
    """By column, the ways that lack it; nothing where nothing is lacking."""
    rows = [
        {"way": "w", "plan": "2", "critical": "64", "measured": "now"},
        {"way": "v", "plan": "not measured", "critical": "not measured", "measured": "now"},
        {"way": "u", "plan": "3", "critical": "not measured", "measured": "now"},
    ]
    columns = {"way": "{way}", "8 replicas": "{plan}", "critical batch": "{critical}"}

    def text(rows):
        findings = harness.Findings(figures={}, rows=rows, columns=columns, note="A note.")
        return page.page(findings, command="python -m benchmarks.learners")

    assert "/what-replicas-learn.md#what-is-not-here): 8 replicas of v; critical batch of v, u.\n" in text(rows)
    assert "Not measured" not in text(rows[:1])


def test_rows_of_a_way_stand_together_in_the_order_of_the_run(tmp_path):
    """A new arm comes between those that were there before; arms that this run does not have come last."""
    old = [{"way": way, "arm": arm, "loss": 1.0} for way, arm in (("w", "a"), ("w", "c"), ("w", "gone"), ("v", "a"))]
    found = {"command": "x", "environment": {"dptrain": "0", "torch": "2"}, "figures": {}, "rows": old}
    (tmp_path / "earlier").write_text(json.dumps(found))
    new = rows_of(*((Arm(way="w", name=name), (0.1, 0.2)) for name in ("a", "b", "c")))
    findings = harness.Findings(figures={}, rows=new, columns={}, note="A note.")
    merged = page.with_earlier(findings, [tmp_path / "earlier"]).rows
    assert [(row["way"], row["arm"]) for row in merged] == [
        ("w", "a"),
        ("w", "b"),
        ("w", "c"),
        ("w", "gone"),
        ("v", "a"),
    ]


def test_each_arm_has_its_own_branches(tmp_path, monkeypatch):
    """Arms of two tasks may have one name; each row has its own arm's results, in the order of the seeds."""
    settings = {"max_samples": 4 * 8 * 32, "global_batch_size": 32}
    short = {**settings, "max_samples": 4 * 8 * 32 - 4}
    ways_and_settings = (("digits", settings), ("brief", short), ("mnist1d", settings))
    arms = [Arm(way=way, name="dense", settings=choice) for way, choice in ways_and_settings]

    def once(arm, *, seed, **_):
        base = {"digits": 100, "mnist1d": 200}[arm.way]
        stamp = {"losses": {}, "measured": "now", "source": "0"}
        return {"largest": base + seed, "below": 1000, "only_below": False, **stamp}

    monkeypatch.setattr(learners, "branch_once", once)
    with ThreadPoolExecutor(1) as pool:
        rows = learners._branched(arms, learners._Runs(seeds=(0, 1, 2), folder=tmp_path, pool=pool, kept=None))
    assert [(row["way"], row["critical_text"], row.get("measured")) for row in rows] == [
        ("digits", "100, 101, 102", "branches now (0)"),
        ("brief", "too short", None),
        ("mnist1d", "200, 201, 202", "branches now (0)"),
    ]


def test_parts_and_branches_are_of_the_ways_that_are_named(monkeypatch):
    """A way's arms are made once for both; a way that is in neither is not touched, nor are experts."""
    made = []

    def way(name):
        def arms(folder, *, quick):
            assert folder.is_dir()
            made.append(name)
            return [Arm(way=name, name="dense", settings={"max_samples": 800, "global_batch_size": 1})]

        return arms

    stamp = {"measured": "now", "source": "0"}
    branch = {"losses": {}, "largest": 8, "below": None, "only_below": False, **stamp}
    monkeypatch.setattr(learners, "WAYS", {name: way(name) for name in ("a", "b", "c")})
    monkeypatch.setattr(learners, "train_once", lambda *_, **__: {**result(1.0), **stamp})
    monkeypatch.setattr(learners, "branch_once", lambda *_, **__: branch)
    monkeypatch.setattr(learners, "ProcessPoolExecutor", lambda number, **_: ThreadPoolExecutor(number))
    found = learners.measure(quick=False, parts=("a", "b", "branches"), branches_of=("b", "c"))
    assert made == ["a", "b", "c"]
    assert [(row["way"], "loss" in row) for row in found.rows] == [("a", True), ("b", True), ("b", False), ("c", False)]
    assert found.figures == {}


def test_branches_go_from_the_middle_of_a_run(tmp_path):
    """A loss for each multiple, the largest batch that is no worse or the bound on it; all are forgotten afterwards."""
    settings = {
        "task": f"{Path(runs.__file__)}:noisy",
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "max_samples": 80,
    }
    arm = Arm(way="w", name="a", settings=settings)
    found = branches.critical_batch(arm, seed=0, folder=tmp_path / "run")
    assert set(found["losses"]) == {"1", "2", "4", "8"}
    assert all(loss > 0 for loss in found["losses"].values())
    assert [int(path.name.removeprefix("step-")) for path in (tmp_path / "run" / "checkpoints").iterdir()] == [10]
    assert not list((tmp_path / "run" / "branches").iterdir())
    worse, known, open_end = (
        {"largest": 4, "below": 8, "only_below": True},
        {"largest": 8, "below": 16, "only_below": False},
        {"largest": 32, "below": None, "only_below": False},
    )
    assert branches.critical_text([worse, known, open_end]) == "< 8, 8, ≥ 32"


def test_a_plan_is_said_as_far_as_there_is_one():
    """The median over the seeds, how many of them where some are refused, and that there is none."""
    plans = [{"speed_up": {"8": value}} for value in (4.0, 6.0, "the noise scale is not resolved")]
    assert table.speed_up_text(plans, 8) == "5× (2 of 3 seeds)"
    assert table.speed_up_text(plans[:2], 8) == "5×"
    assert table.speed_up_text(plans[2:], 8) == "not planned"


def test_gradients_of_experts_are_those_of_one_process():
    """On two replicas their mean is the reference's to rounding, also for what lies below the experts."""
    assert expert_gradients.experts_gradient_error(2) < 1e-5


def test_arms_of_a_mixture_have_the_flops_of_the_dense_one(tmp_path, monkeypatch):
    """Samples times FLOPs per sample are equal to half a step; the last arm has equal samples instead."""

    def flops_of(settings):
        return {None: 7.0, 1: 7.1, 2: 10.3}[settings["task_options"].get("top_k")]

    monkeypatch.setattr(ways, "run", lambda settings, **_: {"flops": 64 * flops_of(settings)})
    dense, top_1, top_2, longer = ways.mixture(tmp_path, quick=False)
    budget = dense.settings["max_samples"] * flops_of(dense.settings)
    for arm in (top_1, top_2):
        assert arm.control == dense.name
        assert abs(arm.settings["max_samples"] * flops_of(arm.settings) - budget) <= 16 * flops_of(arm.settings)
    assert longer.settings["max_samples"] == dense.settings["max_samples"]
    tokens = torch.from_file(str(tmp_path / "data" / "val.bin"), dtype=torch.int16, size=64 * 1024)
    assert 0 <= tokens.min() <= tokens.max() < 256


def test_large_batches_see_equal_samples_at_twice_the_rate(tmp_path):
    """Each way to fine-tune is there at 32 and at 128 samples, and is compared with itself."""
    control, *arms = pictures.finetuning_pictures(tmp_path, quick=False)
    assert "model" not in control.settings
    assert len(arms) == 2 * 5
    for small, large in zip(arms[::2], arms[1::2], strict=True):
        assert (small.control, large.control) == (control.name, small.name)
        assert small.settings["model"] == large.settings["model"]
        assert small.settings["max_samples"] == large.settings["max_samples"] == control.settings["max_samples"]
        assert large.settings["global_batch_size"] == 4 * small.settings["global_batch_size"] == 128
        rates = [arm.settings["optimizer"].learning_rate for arm in (small, large)]
        assert rates[1] == pytest.approx(2 * rates[0])


@pytest.mark.parametrize(
    ("norm", "independent"), [("batch", False), ("group", True), ("response", True), ("none", True)]
)
def test_norms_are_what_the_rows_say(norm, independent):
    """The gradient of a batch is the mean of those of its halves, but for batch norm; all have the network's size."""
    torch.manual_seed(0)
    task = normalised_cnn.build(norm=norm)
    signals, classes = task.train_data[:4]

    def gradient(part):
        task.model.zero_grad()
        task.loss(task.model.train(), (signals[part], classes[part])).backward()
        return torch.cat([p.grad.flatten() for p in task.model.parameters()])

    whole = gradient(slice(0, 4))
    halves = (gradient(slice(0, 2)) + gradient(slice(2, 4))) / 2
    assert torch.allclose(whole, halves, rtol=1e-4, atol=1e-6) == independent
    assert sum(isinstance(layer, torch.nn.Conv1d) for layer in task.model) == 3
    normalised = torch.nn.Sequential(*list(task.model)[: 3 if norm != "none" else 2])(signals)
    if norm in ("batch", "group"):
        assert normalised.mean().item() == pytest.approx(0, abs=1e-5)
    if norm == "response":
        cut = normalised.square().mean(-1)  # of 1, less what the cut at zero takes away
        assert ((cut > 0) & (cut <= 1.001)).all()
