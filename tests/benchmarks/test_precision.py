"""What the benchmark of precision computes: a noise scale with its interval, rows, figures, page and picture."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import harness, precision, precision_page
from benchmarks.result_tables import differences
from dptrain.cli.operations.int8_export import Int8Export
from dptrain.tasks import resolve_task
from dptrain.tasks.known import exact_noise


def drawn(*, mean, count, seed):
    """Gradients in 20 dimensions: tr(Σ) is 20, and |G|² is 20 × mean²."""
    return mean + torch.randn(count, 20, generator=torch.Generator().manual_seed(seed)).double()


def test_the_noise_scale_is_right_and_its_interval_holds_it():
    """Over 200 sets of 200 samples with φ = 4, the mean is right to 5 %, and 95 % intervals hold it in 90 to 99 %."""
    found = [
        precision.interval(precision.noise(drawn(mean=0.5, count=200, seed=seed)).log_scales) for seed in range(200)
    ]
    assert math.exp(sum(math.log(value) for value, _, _ in found) / 200) == pytest.approx(4, rel=0.05)
    assert 180 <= sum(low <= 4 <= high for _, low, high in found) <= 198


def test_leaving_a_sample_out_is_what_it_says():
    """The entries after the first are ln φ of all samples but one, computed from them alone."""
    gradients = drawn(mean=0.5, count=30, seed=0)
    logs = precision.noise(gradients).log_scales
    for left_out in (0, 7, 29):
        rest = torch.cat([gradients[:left_out], gradients[left_out + 1 :]])
        assert float(logs[1 + left_out]) == pytest.approx(float(precision.noise(rest).log_scales[0]), rel=1e-9)


def test_a_noise_scale_that_is_not_resolved_is_none():
    """Without a mean gradient, |G|² of some of the sets is not positive or not known to a factor: nothing is told."""
    found = [precision.interval(precision.noise(drawn(mean=0.0, count=20, seed=seed)).log_scales) for seed in range(9)]
    assert None in found


@pytest.mark.parametrize("name", ["digits", "pysource"])
def test_gradients_of_samples_are_those_of_the_task(name):
    """|G|² and tr(Σ) in float32 are those that the task's samples have one by one."""
    torch.manual_seed(0)
    task = resolve_task(name, options=dict(precision.CASES[name].options))
    picks = list(range(0, 24, 2))
    gradients = precision._of_samples(precision.in_format(task.model, precision.FULL), task, picks)
    exact = exact_noise(task.model, task.loss, [task.train_data[pick] for pick in picks])
    assert float(gradients.var(0).sum()) == pytest.approx(exact.noise_trace, rel=1e-4)
    assert float(gradients.mean(0).square().sum()) == pytest.approx(exact.grad_sq_norm, rel=1e-4)


def test_page_figures_and_picture_are_of_the_rows(tmp_path):
    """Rows of a task early in training, an export and losses of seeds make a page that says what its figures say."""
    torch.manual_seed(0)
    task = resolve_task("digits")
    rows = [
        *precision.noise_rows(task, stage="late", count=40),
        *precision.gap_rows(task, part=0.1),
        *precision.gap_rows(task, part=0.9),
        precision.loss_row("digits", precision.FULL, [0.1, 0.2], full=[0.1, 0.2]),
        precision.loss_row("digits", ("fp8", "nearest"), [0.3, 0.3], full=[0.1, 0.2]),
        precision.export_row(
            "digits",
            Int8Export(tensors={}, num_weights=2, size_bytes=(8, 2), loss=(0.5, 0.75), quantize=None),
        ),
    ]
    figures = precision_page.figures_of(rows)
    assert figures["loss_difference_digits_fp8_nearest"] == pytest.approx(0.15)
    assert figures["loss_change_digits_int8_weights"] == 0.25
    assert any(name.startswith("noise_ratio_digits_fp8") for name in figures)
    found = {
        "command": "python -m benchmarks.precision",
        "environment": harness.environment(device="cpu"),
        "figures": figures,
        "rows": rows,
    }
    path = tmp_path / "precision.json"
    path.write_text(json.dumps(found))
    precision_page.write(path)
    text = path.with_suffix(".md").read_text()
    assert differences(text, figures) == []
    assert "| digits | fp8, nearest | 0.3000 ± 0.0000 | +0.1500 ± 0.0707 |" in text
    assert text.count("| digits | late |") == len(precision._MEASURED)
    # The coarser the format, the nearer the gradient's norm is to the quantisation noise.
    gaps = {row["arm"]: row["gap"] for row in rows if row["table"] == "gap"}
    assert gaps["fp8, nearest"] > gaps["int3, nearest"]
    assert "](precision.png)" in text
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_where_the_gap_is_below_one_is_told_by_points():
    """Never, always, or from the first such point on, with how many there are."""
    parts = (0.25, 0.5, 0.75)
    rows = [
        {"table": "gap", "task": "t", "arm": arm, "part": part, "gap": gap}
        for arm, gaps in (("a", (3.0, 2.0, 1.5)), ("b", (0.9, 0.8, 0.7)), ("c", (2.0, 0.9, 0.8)))
        for part, gap in zip(parts, gaps, strict=True)
    ]
    assert [row["below"] for row in precision_page.gap_table(rows)] == ["never", "always", "from 50 %, at 2"]
