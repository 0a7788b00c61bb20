"""A plan of exchanges as a table and sentences for people."""

from __future__ import annotations

from rich.table import Table

from dptrain.explain.model.exchange_plan import FASTEST_MBIT, WORTH, ExchangePlan, KindPlan
from dptrain.explain.text.findings import short


def exchange_table(found: ExchangePlan) -> Table:
    """Return the table of kinds."""
    title = f"{found.num_replicas} replicas at {found.mbit_per_s:g} Mbit/s, {1000 * found.delay_s:g} ms one way"
    table = Table(title=title)
    for head in ("exchange.kind", "bytes/step", "step", "may take steps", "pays below", "pays"):
        table.add_column(head, justify="left" if head == "exchange.kind" else "right")
    for kind in found.kinds:
        table.add_row(
            kind.settings,
            short(kind.bytes_per_step),
            f"{1000 * kind.step_s:,.0f} ms",
            f"× {kind.most_steps:.2f}",
            _below(kind),
            "yes" if kind.pays else "no",
        )
    return table


def exchange_sentences(found: ExchangePlan) -> list[str]:
    """Return what the table says, and what it does not know."""
    paying = sum(kind.pays for kind in found.kinds)
    first = f"No gain: no kind saves {WORTH:.0%} of a step of all_reduce at this bandwidth."
    if paying:
        first = (
            f"{paying} kinds save {WORTH:.0%} of a step or more; each ends sooner only if it takes fewer steps to the "
            f"target than all_reduce times its factor."
        )
    own = (
        f"Steps of {1000 * found.compute_s:.3g} ms are the run's own, its own exchange included; bytes of all_reduce "
        f"are those of all floating-point entries of the model."
    )
    unknown = "How many steps a kind takes to a target is not known from this run: a short run of each kind tells."
    return [first, own, unknown]


def _below(kind: KindPlan) -> str:
    if kind.pays_below_mbit is None:
        return "–"
    return "any" if kind.pays_below_mbit >= FASTEST_MBIT else f"{kind.pays_below_mbit:,.0f} Mbit/s"
