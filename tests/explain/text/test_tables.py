"""The tables of the report: nothing that moved the batch is missing, and advice is kept apart from what was done."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.explain.record import read_run
from dptrain.explain.text import findings, tables
from tests.explain.made_runs import write_run


def run(folder, **how):
    return read_run(write_run(folder, **how))


def test_every_decision_has_its_reason(tmp_path):
    """Step, samples, both batches, the factor on the rate, and the sentence."""
    table = tables.decisions([run(tmp_path)])
    assert len(table.rows) == 4
    assert table.rows[0] == [*("61", "960", "16 → 32", "×1.41", "the noise scale is above what the batch is right for")]


def test_advice_is_marked(tmp_path):
    """A row that was not acted on says so itself, not by its colour."""
    table = tables.decisions([run(tmp_path, applied=False)])
    assert all(row[-1].startswith("(advice, not applied) ") for row in table.rows)
    assert "not applied" in table.about


def test_a_run_without_a_move_says_so(tmp_path):
    """No empty table."""
    table = tables.decisions([run(tmp_path, batches=(32,))])
    assert (table.rows, table.about) == ([], "The batch never changed.")


def test_of_very_many_decisions_the_first_are_shown_and_the_rest_counted(tmp_path):
    """A page stays a page."""
    table = tables.decisions([run(tmp_path, num_steps=1000, batches=(16, 32) * 500)])
    assert len(table.rows) == 400
    assert "The last 599 are only in decisions.jsonl." in table.about


def test_experts_have_their_noise_scale_with_the_share_that_reaches_them(tmp_path):
    """φ, p and the noise scale in routed samples, p·φ − 1 + p; a run without experts has no such table."""
    assert tables.experts(run(tmp_path / "plain", groups={"head": 2.0})) is None

    def route(rows):
        for index, row in enumerate(rows):
            # An early share must not count: the noise scale of a group is that of the end.
            row["train/routed_samples/blocks.0.experts.1"] = 1.0 if index < 100 else 0.25
            row["train/routed_tokens/blocks.0.experts.1"] = 0.125

    record = run(tmp_path / "routed", groups={"blocks.0.experts.1": 2.0, "rest": 1.0}, edit=route)
    phi = record.groups()["blocks.0.experts.1"]["noise_scale/value"]
    ((name, measured, samples, tokens, routed),) = tables.experts(record).rows
    assert (name, samples, tokens) == ("blocks.0.experts.1", "25.0%", "12.5%")
    assert measured == findings.noise_scale_text(record.groups()[name])
    assert float(routed.replace(",", "")) == pytest.approx(0.25 * phi - 0.75, rel=0.05)
    bound = run(tmp_path / "bound", groups={"blocks.0.experts.1": 2.0}, edit=route, noise="bound only")
    assert tables.experts(bound).rows[0][1].startswith("at least")
    assert tables.experts(bound).rows[0][-1] == "not resolved"


def test_settings_are_named_as_the_command_line_names_them(tmp_path):
    """Known ones that matter; the layout of the batch beside them."""
    table = tables.settings(run(tmp_path, control={"law": "noise"}))
    assert [row for row in table.rows if row[0][:7] != "noise.l"][:2] == [
        ["task", "pysource"],
        ["control.law", "noise"],
    ]
    assert "Global batch = micro-batch 8 × accumulation steps 1–8 × 2 replicas." in table.about


def test_runs_stand_side_by_side_with_what_differs(tmp_path):
    """A column for each run; a setting is a row where two runs differ in it, and none where they agree."""
    both = [
        run(tmp_path / "a", seed=1, control={"law": "noise"}),
        run(tmp_path / "b", seed=2, control={"law": "noise"}),
    ]
    table = tables.comparison(both)
    rows = {row[0]: row[1:] for row in table.rows}
    assert table.head == ["", "A a", "B b"]
    assert rows["seed"] == ["1", "2"]
    assert "control.law" not in rows
    assert rows["Samples to the target"][0] == rows["Samples to the target"][1]
    assert "Compute" in rows
    assert all(len(row) == 3 for row in table.rows)


@pytest.mark.parametrize(
    ("law", "shown", "hidden"),
    [
        ("goodput", {"control.critical_ratio", "control.min_gain", "optimizer.beta1"}, set()),
        ("noise", {"control.law_options.ratio", "control.min_gain"}, {"control.critical_ratio"}),
        ("constant", {"control.law"}, {"control.largest", "control.critical_ratio"}),
    ],
)
def test_settings_that_the_law_ignores_are_not_shown(tmp_path, law, shown, hidden):
    """Those that decide are, whatever their names are; defaults are filled in by the run."""
    control = {"law": law, "law_options": {"ratio": 1.0}, "critical_ratio": 1.0, "min_gain": 0.02, "largest": 64}
    record = replace(run(tmp_path), config={"control": control, "optimizer": {"beta1": 0.9}})
    names = {row[0] for row in tables.settings(record).rows}
    assert shown <= names
    assert not hidden & names
