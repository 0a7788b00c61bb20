"""The quadratic problems put together: what the controllers made of them, beside what is known; and its picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.targets.quadratics import (
    DAMPED,
    EXCHANGE_RATES,
    FIXED_BATCHES,
    Damped,
    SampledDamped,
    Spent,
    drive,
    first_batch,
    fixed_runs,
    law_of,
    noisy_curve,
    noisy_run,
    samples_over_curve,
    timed,
)
from dptrain.control.learning_rate import RuleName

_FIXED_TOLERANCE, _EXACT_TOLERANCE, _MEASURED_TOLERANCE = 0.05, 0.05, 0.1
_MIDDLE_RATE = EXCHANGE_RATES[1]
_NOISY_RATES = (64.0, 256.0)
_NOISY_RULES: tuple[RuleName, ...] = ("none", "square_root", "gain")
_GRID, _QUICK_GRID = np.geomspace(0.03, 1.95, 13).tolist(), [1.2, 1.45, 1.7]
_COLUMNS = {
    "problem": "{problem}",
    "batch": "{batch}",
    "noise scale": "{scale}",
    "steps": "{steps:,.1f}",
    "samples": "{samples:,.0f}",
    "compared": "{shown}",
}
_LAWS = {
    "r = {rate:g}, every second batch": {},
    "r = {rate:g}, goodput law": {"goodput": True},
    "r = {rate:g}, powers of two": {"powers_of_two": True},
}


@dataclass(frozen=True, kw_only=True)
class Theory:
    """What was found.

    Attributes:
        findings: for the harness.
        fixed: by batch, on problem 5.
        adaptive: by name and by what is known of the noise scale, on problem 5.
        curve: steps of fixed batches on problem 10.
        noisy: adaptive runs on it, by exchange rate, rule and learning rate.
    """

    findings: harness.Findings
    fixed: dict[int, Spent]
    adaptive: dict[tuple[str, str], Spent]
    curve: dict[int, float]
    noisy: dict[tuple[float, RuleName, float], Spent]


def measure(*, quick: bool, num_seeds: int) -> Theory:
    """Drive problems 5 and 10; the quick form at one exchange rate each."""
    fixed = fixed_runs(FIXED_BATCHES[1:9] if quick else FIXED_BATCHES)
    rows = [_damped_row(f"{batch}", "", spent) for batch, spent in fixed.items()]
    adaptive = dict(_adaptive(quick=quick, num_seeds=num_seeds))
    rows += [_damped_row(name, scale, spent) for (name, scale), spent in adaptive.items()]
    curve = noisy_curve([2**k for k in (range(8, 12, 2) if quick else range(13))])
    noisy = dict(_noisy(quick=quick))
    rows += [_noisy_row(f"{batch}", Spent(steps=steps, samples=batch * steps), None) for batch, steps in curve.items()]
    rows += [
        _noisy_row(f"r = {exchange_rate:g}, rule {rule}, rate {rate:.3g}", spent, samples_over_curve(spent, curve))
        | {"rule": rule}
        for (exchange_rate, rule, rate), spent in noisy.items()
    ]
    figures = _figures(fixed, adaptive, rows)
    findings = harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=_note(figures))
    return Theory(findings=findings, fixed=fixed, adaptive=adaptive, curve=curve, noisy=noisy)


def _adaptive(*, quick: bool, num_seeds: int) -> Iterator[tuple[tuple[str, str], Spent]]:
    for rate in (_MIDDLE_RATE,) if quick else EXCHANGE_RATES:
        step_time, start = timed(rate), first_batch(rate)
        for template, options in list(_LAWS.items())[: 1 if quick else None]:
            name = template.format(rate=rate)
            exact = drive(Damped(), law_of(rate, **options), start=start, step_time=step_time)
            yield (name, "exact"), _arrived(exact)
            drawn = [
                _arrived(drive(SampledDamped(seed=seed), law_of(rate, **options), start=start, step_time=step_time))
                for seed in range(num_seeds)
            ]
            yield (name, "measured"), _median(drawn)
    if not quick:
        damped = SampledDamped(rate_is_measured=True)
        spent = drive(damped, law_of(_MIDDLE_RATE), start=first_batch(_MIDDLE_RATE))
        yield (f"r = {_MIDDLE_RATE:g}, rate damped by it as well", "measured"), _arrived(spent)


def _noisy(*, quick: bool) -> Iterator[tuple[tuple[float, RuleName, float], Spent]]:
    for exchange_rate in _NOISY_RATES[1:] if quick else _NOISY_RATES:
        for rule in _NOISY_RULES[:1] if quick else _NOISY_RULES:
            rates = _QUICK_GRID if quick else _GRID
            spent, rate = noisy_run(exchange_rate=exchange_rate, rule=rule, rates=rates, refined=2 if quick else 12)
            yield (exchange_rate, rule, rate), spent


def _arrived(spent: Spent | None) -> Spent:
    assert spent is not None, "the damped problem always arrives"
    return spent


def _median(runs: list[Spent]) -> Spent:
    """Return the run whose product is the middle one; of an even number the lower middle."""
    return sorted(runs, key=lambda spent: spent.product(DAMPED))[(len(runs) - 1) // 2]


def _damped_row(batch: str, scale: str, spent: Spent) -> dict[str, Any]:
    product = spent.product(DAMPED)
    shown = f"product {product:.4f}"
    if scale:
        shown += f", {product / DAMPED.gamma - 1:+.1%} from γ = {DAMPED.gamma:.4f}"
    return _row("5, damped", batch, scale, spent) | {"product": product, "shown": shown}


def _noisy_row(batch: str, spent: Spent, over_curve: float | None) -> dict[str, Any]:
    if over_curve is None:
        return _row("10, noisy quadratic", batch, "", spent)
    side = "below" if over_curve < 1 else "ABOVE"
    shown = f"{over_curve:.3f} × the samples of the curve at these steps: {side}"
    return _row("10, noisy quadratic", batch, "exact", spent) | {"over_curve": over_curve, "shown": shown}


def _row(problem: str, batch: str, scale: str, spent: Spent) -> dict[str, Any]:
    return {
        "problem": problem, "batch": batch, "scale": scale, "steps": spent.steps, "samples": spent.samples, "shown": "",
    }  # fmt: skip


def _figures(
    fixed: dict[int, Spent], adaptive: dict[tuple[str, str], Spent], rows: list[dict[str, Any]]
) -> dict[str, float]:
    products = [spent.product(DAMPED) for spent in fixed.values()]
    middle = next(iter(_LAWS)).format(rate=_MIDDLE_RATE)
    # Of the batch alone: a rule that moves the rate may win or lose by that.
    over_curve = [row["over_curve"] for row in rows if row.get("rule") == "none"]
    return {
        "frontier_product": max(products, key=lambda product: abs(math.log(product))),
        "gamma_predicted": DAMPED.gamma,
        "gamma_exact": adaptive[middle, "exact"].product(DAMPED),
        "gamma_measured": adaptive[middle, "measured"].product(DAMPED),
        "noisy_quadratic_over_curve": max(over_curve),
        "num_fixed": len(fixed),
    }


def _note(figures: dict[str, float]) -> str:
    gamma = figures["gamma_predicted"]
    verdicts = {
        f"fixed batches within {_FIXED_TOLERANCE:.0%} of the hyperbola": abs(figures["frontier_product"] - 1)
        <= _FIXED_TOLERANCE,
        f"adaptive within {_EXACT_TOLERANCE:.0%} of γ with the exact noise scale": abs(
            figures["gamma_exact"] / gamma - 1
        )
        <= _EXACT_TOLERANCE,
        f"within {_MEASURED_TOLERANCE:.0%} with the measured one": abs(figures["gamma_measured"] / gamma - 1)
        <= _MEASURED_TOLERANCE,
        "below the curve on the noisy quadratic": figures["noisy_quadratic_over_curve"] < 1,
    }
    return "; ".join(f"{bound}: {'held' if holds else 'BROKEN'}" for bound, holds in verdicts.items())


def draw(theory: Theory, *, path: Path) -> None:
    """Draw both problems on the graph of steps against samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    batches = np.geomspace(min(theory.fixed) / 2, max(theory.fixed) * 2, 200)
    steps = DAMPED.min_steps * (1 + DAMPED.critical_batch_size / batches)
    left.plot(steps, steps * batches, color="#999999", linewidth=1.2, label="hyperbola, exact")
    left.plot(*_places(theory.fixed.values()), "o", color="#444444", label="fixed batches")
    for scale, marker, colour in (("exact", "*", "#d55e00"), ("measured", "^", "#0072b2")):
        shown = [spent for (name, known), spent in theory.adaptive.items() if known == scale and "damped" not in name]
        left.plot(*_places(shown), marker, color=colour, label=f"adaptive, {scale} noise scale", markersize=9)
    left.set_title("problem 5, damped quadratic")
    curve = [Spent(steps=steps, samples=batch * steps) for batch, steps in theory.curve.items()]
    right.plot(*_places(curve), "o-", color="#444444", label="fixed batches, best rate each")
    right.plot(*_places(theory.noisy.values()), "*", color="#d55e00", label="adaptive", markersize=9)
    right.set_title("problem 10, noisy quadratic")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="steps to the target", ylabel="samples to the target")
        axes.grid(which="both", alpha=0.2)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _places(runs: Any) -> tuple[list[float], list[float]]:  # noqa: ANN401 - any iterable of runs, twice over
    runs = list(runs)
    return [spent.steps for spent in runs], [spent.samples for spent in runs]
