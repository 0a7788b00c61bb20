"""Seed by seed, what do adaptive runs take to a target beside one fixed batch, and how far are they at its samples?"""
# python -m benchmarks.seed_by_seed --task digits|pysource VARIANT VARIANT […] [--seeds FIRST-LAST] [--json PATH|-]

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import harness
from benchmarks.targets import results
from benchmarks.targets.benchmark_case import BenchmarkCase, benchmark_cases
from benchmarks.targets.comparison import reporting
from benchmarks.targets.timed_run import Finish, Mark, Pair, TimedRun

_PATIENCE = 4
"""Times the seconds of the first variant after which another is given up."""
_QUICK_SEEDS = 1
_VARIANTS = """\
VARIANT is one of
  fixed:BATCH:RATE                      a plain run of one batch
  adaptive:START:RATE[:NAME=VALUE,…]    the default law, with settings of `control` of its own
  written:SAMPLE=BATCH,…:RATE           batches written down beforehand, at one rate
The first is what the others are compared with. The rate of an adaptive run is for the task's default batch,
wherever it starts."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A competitor, as the command line names it.

    Attributes:
        name: as it was written.
        kind: fixed, adaptive or written.
        batches: (first sample, batch); but for `written` there is one.
        learning_rate: of a fixed batch at that, of an adaptive run at the task's default batch.
        control: settings of `control` that are not the default's.
    """

    name: str
    kind: str
    batches: Sequence[tuple[int, int]]
    learning_rate: float
    control: Mapping[str, Any]

    @classmethod
    def from_text(cls, text: str) -> Variant:
        """Read `kind:batch:rate[:settings]`; see the command's help.

        Raises:
            ValueError: where the text is none.
        """
        kind, batches, rate, *more = text.split(":")
        if kind not in {"fixed", "adaptive", "written"} or len(more) > (kind == "adaptive"):
            raise ValueError(text)
        stages = [stage.split("=") for stage in (batches if kind == "written" else f"0={batches}").split(",")]
        pairs = (pair.split("=", 1) for pair in ",".join(more).split(",") if pair)
        return cls(
            name=text,
            kind=kind,
            batches=[(int(start), int(batch)) for start, batch in stages],
            learning_rate=float(rate),
            control={name: _value(value) for name, value in pairs},
        )

    def timed_run(self, case: BenchmarkCase, **more: Any) -> TimedRun:  # noqa: ANN401 - handed on
        """Return its timed run."""
        more["learning_rate"] = self.learning_rate
        if self.kind == "written":
            return case.scheduled(self.batches, rule="none", **more)
        batch = self.batches[0][1]
        if self.kind == "fixed":
            return case.fixed(batch, **more)
        timed_run = case.adaptive(batch, **more)
        timed_run.settings["control"].update(self.control)
        return timed_run


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="seed_by_seed")
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, _VARIANTS
    parser.add_argument("--task", choices=sorted(benchmark_cases(quick=False)), required=True, help="what is trained")
    parser.add_argument("--seeds", type=_seeds, default=range(101, 109), metavar="FIRST-LAST", help="(101-108)")
    parser.add_argument("variants", type=_variant, nargs="+", metavar="VARIANT", help="see below")
    options = parser.parse_args()
    if len(options.variants) < 2:
        parser.error("there is nothing to compare the first variant with: name another one")
    seeds = options.seeds[:_QUICK_SEEDS] if options.quick else options.seeds
    found = measure(benchmark_cases(quick=options.quick)[options.task], options.variants, seeds=seeds)
    names = " ".join(variant.name for variant in options.variants)
    command = f"seed_by_seed --task {options.task} --seeds {options.seeds[0]}-{options.seeds[-1]} {names}"
    harness.tell(found, options, question=__doc__, name=command, device="cpu")


def measure(case: BenchmarkCase, variants: Sequence[Variant], *, seeds: Sequence[int]) -> harness.Findings:
    """Run all variants with one seed after another, the first one first, the others in an order that changes."""
    finishes: list[dict[int, Finish]] = [{} for _ in variants]
    with Pair() as pair:
        run = reporting(pair.run, lambda text: print(text, file=sys.stderr, flush=True))
        run(variants[0].timed_run(case, seed=seeds[0], most_steps=50))  # the first run of a process is slow
        for turn, seed in enumerate(seeds):
            reference = run(variants[0].timed_run(case, seed=seed))
            if reference.end is None:
                raise RuntimeError(f"{variants[0].name} is not at the target with seed {seed}: {reference.reason}")
            end, finishes[0][seed] = reference.end, reference
            for place in range(1, len(variants)):
                number = 1 + (place + turn) % (len(variants) - 1)
                most_seconds = _PATIENCE * end.seconds
                timed_run = variants[number].timed_run(
                    case, seed=seed, least_samples=end.samples, most_seconds=most_seconds
                )
                finishes[number][seed] = run(timed_run)
    return findings([variant.name for variant in variants], finishes, target=case.target)


def findings(names: Sequence[str], finishes: Sequence[Mapping[int, Finish]], *, target: float) -> harness.Findings:
    """Compare all variants with the first one, which arrived with every seed.

    Args:
        names: of the variants.
        finishes: of each variant, by seed.
        target: held-out loss.
    """
    ends = {seed: finish.end for seed, finish in finishes[0].items() if finish.end is not None}
    figures: dict[str, float] = {"loss_spread": results.spread_of_losses(finishes[0].values())} if len(ends) > 1 else {}
    rows: list[dict[str, Any]] = []
    for number, (name, variant) in enumerate(zip(names, finishes, strict=True), start=1):
        found = {
            "seconds_ratio": [_over(finish.end, ends[seed], "seconds") for seed, finish in variant.items()],
            "samples_ratio": [_over(finish.end, ends[seed], "samples") for seed, finish in variant.items()],
            "loss_gap": [
                results.loss_gap(variant[seed], samples=ends[seed].samples, target=target) for seed in variant
            ],
        }
        rows.append({"number": number, "variant": name, "seeds": list(variant)})
        for figure, values in found.items():
            rows[-1][figure] = [value if math.isfinite(value) else None for value in values]
            rows[-1][f"shown_{figure}"] = _shown(values)
            if number > 1 and math.isfinite(middle := statistics.median(values)):
                figures[f"{figure}_{number}"] = middle
    return harness.Findings(
        figures=figures,
        rows=rows,
        columns={
            "": "{number}",
            "variant": "{variant}",
            "seconds, to the first's": "{shown_seconds_ratio}",
            "samples, to the first's": "{shown_samples_ratio}",
            "loss above the target at the first's samples": "{shown_loss_gap}",
        },
        note=f"{len(ends)} seeds, compared seed by seed: median (least to most). The target is {target:g}.",
    )


def _over(end: Mark | None, first: Mark, what: str) -> float:
    return math.inf if end is None else getattr(end, what) / getattr(first, what)


def _shown(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.3g} ({min(values):,.3g} to {max(values):,.3g})"


def _value(text: str) -> Any:  # noqa: ANN401 - of any setting
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _variant(text: str) -> Variant:
    try:
        return Variant.from_text(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no variant, such as fixed:64:0.008 or adaptive:16:0.008"
        ) from None


def _seeds(text: str) -> range:
    first, _, last = text.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        found = range(0)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not such as 101-108")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
