"""The rows of the table of `benchmarks.learners`: what is said of an arm, by the results of its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.learners.branches import critical_text
from benchmarks.learners.runs import REPLICAS, Arm

UNKNOWN = "not measured"
TOO_SHORT = "too short"
_UNRESOLVED = "not resolved"

COLUMNS = {
    "way": "{way}",
    "arm": "{arm}",
    "held-out loss": "{loss:.4f} ± {loss_spread:.4f}",
    "accuracy": "{accuracy_text}",
    "GFLOP": "{gflop:.3g}",
    "by density": "{sparse_text}",
    "gradients": "{gradients_text}",
    "noise scale early": "{noise_early}",
    "late": "{noise_late}",
    "critical batch by `branch`": "{critical_text}",
    **{f"{number} replicas": f"{{speed_up_{number}}}" for number in REPLICAS},
    "against its control": "{verdict}",
}
"""Heads of the table, and the template of a row's cell below each."""


def trained_row(arm: Arm, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of an arm, without its margin, from what `train_once` returns for each seed."""
    losses = [result["loss"] for result in results]
    accuracies = [result["accuracy"] for result in results if result["accuracy"] is not None]
    sparse = results[0]["sparse_flops"]
    return {
        "way": arm.way,
        "arm": arm.name,
        "loss": statistics.mean(losses),
        "loss_spread": statistics.stdev(losses),
        "accuracy_text": f"{statistics.mean(accuracies):.3f}" if accuracies else "–",
        "seconds": statistics.mean(result["seconds"] for result in results),
        "gflop": results[0]["flops"] / 1e9,
        "sparse_text": "–" if sparse is None else f"{sparse / 1e9:.3g}",
        "noise_early": _median(result["noise_early"] for result in results),
        "noise_late": _median(result["noise_late"] for result in results),
        "gradient_bytes": results[0]["gradient_bytes"],
        "gradients_text": f"{results[0]['gradient_bytes'] / 1e6:.3g} MB",
        **{f"speed_up_{number}": speed_up_text(results, number) for number in REPLICAS},
        "measured": _stamps(results),
        "losses": " ".join(f"{loss:.5f}" for loss in losses),
        "critical_text": UNKNOWN,
        "verdict": "–",
    }


def branches_row(arm: Arm, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the row of an arm has beside `trained_row`, from what `branch_once` returns for each seed.

    Args:
        arm: its names.
        results: none where the run is too short for branches.
    """
    row = {"way": arm.way, "arm": arm.name, "branches": [result["losses"] for result in results]}
    if not results:
        return {**row, "critical_text": TOO_SHORT}
    return {**row, "critical_text": critical_text(results), "measured": _stamps(results, what="branches ")}


def _stamps(results: Iterable[Mapping[str, Any]], *, what: str = "") -> str:
    return "; ".join(sorted({f"{what}{result['measured']} ({result['source']})" for result in results}))


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.3g}" if known else _UNRESOLVED


def speed_up_text(results: Sequence[Mapping[str, Any]], number: int) -> str:
    """Return the median over the seeds that `plan` plans for, with how many those are where it refuses some."""
    found = [result["speed_up"][str(number)] for result in results]
    planned = [value for value in found if not isinstance(value, str)]
    if not planned:
        return "not planned"
    part = "" if len(planned) == len(found) else f" ({len(planned)} of {len(found)} seeds)"
    return f"{statistics.median(planned):.2g}×{part}"


def compare(rows: Iterable[dict[str, Any]], arms: Iterable[Arm]) -> None:
    """Say in each arm's row how far it is below its control, in units of the larger spread of the two."""
    found = {(row["way"], row["arm"]): row for row in rows}
    for arm in arms:
        if arm.control is not None:
            row, control = found[arm.way, arm.name], found[arm.way, arm.control]
            margin = _margin(row, control)
            row["margin"] = margin
            gain = "gain" if margin > 1 else "loss" if margin < -1 else "no gain"
            row["verdict"] = f"{gain} over {arm.control}: {margin:+.1f} spreads"


def _margin(row: Mapping[str, Any], control: Mapping[str, Any]) -> float:
    spread = max(row["loss_spread"], control["loss_spread"], 1e-12)
    return float((control["loss"] - row["loss"]) / spread)


def margin_figures(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the margins that are on record as figures, as far as the rows have them."""
    margins = {(row["way"], row["arm"]): row["margin"] for row in rows if "margin" in row}
    figures = {}
    for name, arm in (
        ("finetune_margin_in_spreads", ("fine-tuning", "all weights")),
        ("finetune_pictures_margin_in_spreads", ("fine-tuning, EfficientNet-Lite0", "all weights")),
        ("distill_margin_in_spreads", ("distillation", "taught")),
    ):
        if arm in margins:
            figures[name] = margins[arm]
    if orders := [margin > 0 for (_, arm), margin in margins.items() if arm == "rigl"]:
        figures["rigl_order_holds"] = float(all(orders))
    return figures
