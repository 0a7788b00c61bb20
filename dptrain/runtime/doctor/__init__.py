"""Checks of machines, network and folder before a run; each problem with its remedy."""

from dptrain.runtime.doctor.examination import Request, examine
from dptrain.runtime.doctor.finding import Finding, Status
from dptrain.runtime.doctor.machine import wants_gpu
from dptrain.runtime.doctor.place import Place, places_of_host, run_ranks
from dptrain.runtime.doctor.report import EXIT_PROBLEM, Report

__all__ = [
    "EXIT_PROBLEM",
    "Finding",
    "Place",
    "Report",
    "Request",
    "Status",
    "examine",
    "places_of_host",
    "run_ranks",
    "wants_gpu",
]
