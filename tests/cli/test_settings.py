"""Settings of several files and the command line, put together."""

from __future__ import annotations

from dptrain.cli.settings import parse


def test_an_empty_mapping_empties_a_setting_and_no_group(tmp_path):
    """Options of a file go with `{}`, for else nothing would take them away; a group without settings changes none."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("control: {law: noise, law_options: {ratio: 4.0}}\ntask_options: {size: tiny, inner: {a: 1}}\n")
    second.write_text("control: {}\noptimizer: {}\n")
    files = [f"--config={first}", f"--config={second}"]
    kept = parse(files)[0]
    assert (kept.control.law, kept.control.law_options) == ("noise", {"ratio": 4.0})
    assert parse([*files, "--task_options.size=small"])[0].task_options == {"size": "small", "inner": {"a": 1}}
    emptied = parse([*files, "--control.law_options={}", "--task_options={}"])[0]
    assert (emptied.control.law, emptied.control.law_options, emptied.task_options) == ("noise", {}, {})
