"""EXPLAIN: what a finished or interrupted run found, drawn from its folder; nothing here trains or measures."""

from __future__ import annotations

from dptrain.explain.report import draw_report

__all__ = ["draw_report"]
