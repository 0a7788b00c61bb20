"""What the benchmark of learners makes of its runs: margins, verdicts, figures, and the page."""

from __future__ import annotations

import pytest

from benchmarks import harness, learners


def result(loss, *, noise=10.0):
    return {
        "loss": loss,
        "accuracy": 0.5,
        "seconds": 1.0,
        "flops": 2e9,
        "sparse_flops": None,
        "noise_early": noise,
        "noise_late": None,
    }


def rows_of(*arms):
    rows = [learners._row(arm, [result(loss) for loss in losses]) for arm, losses in arms]
    learners._compare(rows, [arm for arm, _ in arms])
    return rows


def test_a_margin_is_in_units_of_the_larger_spread():
    """1.0 ± 0.1 and 0.7 ± 0.05 are three spreads apart; within one spread there is no gain; above it a loss."""
    control = learners.Arm(way="w", name="control")
    arms = [learners.Arm(way="w", name=name, control="control") for name in ("better", "equal", "worse")]
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
        pairs.append((learners.Arm(way=way, name="control"), (1.0, 1.1)))
        pairs += [(learners.Arm(way=way, name=name, control="control"), (0.5, 0.6)) for name in names]
    rows = rows_of(*pairs)
    figures = learners._figures(rows)
    assert figures["rigl_order_holds"] == 1.0
    assert figures["finetune_margin_in_spreads"] == figures["distill_margin_in_spreads"] > 1
    rows[-1]["margin"] = -0.1
    assert learners._figures(rows)["rigl_order_holds"] == 0.0
    findings = harness.Findings(
        figures=figures, rows=rows, columns={"arm": "{arm}", "loss": "{loss:.1f}"}, note="A note."
    )
    text = learners.page(findings, command="python -m benchmarks.learners")
    assert text.count("\n| ") == 1 + len(rows) + 1 + len(figures)
    assert "| taught | 0.6 |" in text


def test_gradients_of_experts_are_those_of_one_process():
    """On two replicas their mean is the reference's to rounding, also for what lies below the experts."""
    assert learners.experts_gradient_error(2) < 1e-5
