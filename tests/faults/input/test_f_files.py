"""Settings and task files with mistakes in them: one sentence each, and nothing is accepted that cannot run."""

from __future__ import annotations

import os

import pytest

from tests.faults.input.fuzzed_files import try_files
from tests.replicas import run_replicas

NUMBER = int(os.environ.get("TEST_FUZZED_FILES", "60"))
"""A quarter of a second each, seconds where it runs. A thousand are tried before a release."""


def try_all(rank, world_size, folder, seed):
    return try_files(folder, number=NUMBER, seed=seed)


@pytest.mark.timeout(3000)
def test_each_mistake_is_one_sentence_and_what_is_accepted_runs(tmp_path):
    """Values, names, punctuation and lines of settings; parts of a task: exit code 2 with one line, or a whole run.

    One file in twenty only looks odd, and has to run.
    """
    ((found, accepted),) = run_replicas(try_all, world_size=1, args=(tmp_path, 1), timeout_s=2900)
    assert accepted < 0.8 * NUMBER, "most mistakes are none"
    assert not found, "\n\n".join("\n".join(part) for part in found[:5])
