"""The atlas: problems of all sizes, each charted from its critical batch size to its noise scale."""

from benchmarks.atlas.chart import STAGES, chart
from benchmarks.atlas.figures import draw, is_placed, tasks_of
from benchmarks.atlas.problems import absent, atlas

__all__ = ["STAGES", "absent", "atlas", "chart", "draw", "is_placed", "tasks_of"]
