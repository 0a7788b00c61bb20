"""`dptrain sweep`: trains a grid of batch sizes and learning rates, and prints the fitted frontiers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from dptrain.cli.sweep_request import read_request
from dptrain.config.filled_in import given
from dptrain.errors import ConfigError
from dptrain.runtime.launcher import is_replica, load_for_all, refuse_in_many_tasks
from dptrain.runtime.signals import EXIT_RESUMABLE
from dptrain.sweep import (
    Outcome,
    SweepSpec,
    fits_record,
    outcomes,
    read_clock,
    table,
    write_csv,
    write_parquet,
)
from dptrain.sweep.child_runs import Site
from dptrain.sweep.folder import SweepFolder
from dptrain.sweep.loop import Ending, SweepLoop
from dptrain.sweep.view import SweepView


def sweep(arguments: Sequence[str]) -> int:
    """Train the grid and print the results.

    Returns:
        0; 75 where it was asked to stop; else the exit code of a run that failed.

    Raises:
        ConfigError: where options or settings make no sense.
        TaskError: where the task has nothing to measure.
    """
    if is_replica():
        raise ConfigError("dptrain sweep starts its own replicas: run it once, without torchrun or srun")
    refuse_in_many_tasks()
    request = read_request(arguments)
    config = request.config
    site = Site.here(
        num_parallel=request.num_parallel,
        num_replicas=given(config.layout_replicas),
        cpu=config.device == "cpu",
    )
    folder = SweepFolder(request.out)
    try:
        folder.save(config, request.spec)
        return _run(request.spec, folder=folder, site=site, max_skipped_steps=config.optimizer.max_skipped_steps)
    finally:
        folder.close()


def _run(spec: SweepSpec, *, folder: SweepFolder, site: Site, max_skipped_steps: int) -> int:
    load_for_all()
    loop = SweepLoop(spec, folder=folder, site=site, max_skipped_steps=max_skipped_steps)
    view = SweepView(spec, course_of=loop.course_of)
    try:
        batches = ", ".join(map(str, spec.batch_sizes))
        view.note(f"batches {batches}; {site.num_parallel} runs at a time → {folder.path}")
        ending = loop.run(view)
    finally:
        view.close()
    rows = list(
        table(
            spec,
            ending.searches,
            course_of=loop.course_of,
            clock_of=lambda run: read_clock(folder.run_dir(run)),
        )
    )
    write_csv(folder.path / "table.csv", rows)
    has_parquet = write_parquet(folder.path / "table.parquet", rows)
    files = "table.csv and table.parquet" if has_parquet else "table.csv (table.parquet needs pyarrow)"
    if ending.was_stopped or ending.failures:
        return _tell_of_the_rest(ending, folder=folder)
    found = list(outcomes(spec, rows, ending.searches))
    folder.write_json(folder.path / "fit.json", fits_record(found))
    lines = [line for outcome in found for line in _sentences(spec, outcome)]
    sys.stdout.write("\n".join([*lines, f"{files} and fit.json: {folder.path}"]) + "\n")
    return 0


def _tell_of_the_rest(ending: Ending, *, folder: SweepFolder) -> int:
    """Say why it is not done, and how it goes on."""
    unsettled = sum(len(found.unsettled) for found in ending.searches)
    for run, code in ending.failures.items():
        sys.stderr.write(f"dptrain sweep: {run.name} ended with exit code {code}; see {folder.log(run)}\n")
    sys.stderr.write(
        f"dptrain sweep: {'stopped on request' if ending.was_stopped else 'not done'}, {unsettled} or more runs "
        f"left: continue with dptrain sweep --out {folder.path}\n"
    )
    return next(iter(ending.failures.values()), EXIT_RESUMABLE)


def _sentences(spec: SweepSpec, outcome: Outcome) -> Iterable[str]:
    yield f"target {outcome.target:g}: {outcome.sentence}"
    if len(spec.seeds) == 1:
        yield "  one seed: no interval; scatter between seeds counts as misfit"
    if missed := [batch for batch in spec.batch_sizes if batch not in outcome.rates]:
        yield f"  not reached by every seed at any learning rate: batch {_listed(missed)}"
    if outcome.early:
        yield (
            f"  reached before the first evaluation, not in the fit: batch {_listed(outcome.early)}; "
            "use a smaller --log.eval-every-samples"
        )
    if outcome.at_edge:
        yield (
            f"  best learning rate at the edge of the grid, a better one may lie beyond: batch "
            f"{_listed(outcome.at_edge)}"
        )


def _listed(batches: Sequence[int]) -> str:
    return ", ".join(map(str, batches))
