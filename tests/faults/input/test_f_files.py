"""F of the faults, whole files: settings and tasks with mistakes, as the command itself answers to each."""

from benchmarks.mistakes.fuzzed_files import try_files
from tests.replicas import run_replicas

NUMBER = 60
"""A quarter of a second each, seconds where it runs. `python -m benchmarks.mistakes` tries a thousand."""


def try_all(rank, world_size, folder, seed):
    return try_files(folder, number=NUMBER, seed=seed)


def test_each_mistake_is_one_sentence_and_what_is_accepted_runs(tmp_path):
    """Values, names, punctuation and lines of settings; parts of a task: exit code 2 with one line, or a whole run.

    One file in twenty only looks odd, and has to run.
    """
    (trials,) = run_replicas(try_all, world_size=1, args=(tmp_path, 1), timeout_s=500)
    found = [f"{trial.wrong}\n{trial.content}\n{trial.reported}" for trial in trials if trial.wrong]
    assert sum(trial.accepted for trial in trials) < 0.8 * NUMBER, "most mistakes are none"
    assert not found, "\n\n".join(found[:5])
