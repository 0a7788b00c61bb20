"""What a run cost: measured figures with their units, and a reason where there is none."""

from __future__ import annotations

import json

import pytest

from dptrain.explain.record import read_run
from dptrain.explain.text.account import NOT_MEASURED, account, duration
from tests.explain.made_runs import write_run


def _account(folder):
    return {entry.name: entry for entry in account(read_run(folder))}


def test_a_run_without_a_ledger_is_reported_what_is_missing(tmp_path):
    """Nothing is guessed; each line says why it is not known. Time on devices follows from what every log has."""
    found = _account(write_run(tmp_path))
    assert found["Work"].value == "17,280 samples in 300 optimizer steps"
    assert found["Time"].value == "3 min 32 s"
    assert found["Device-hours"].value == "0.118"
    assert "kept no ledger" in found["Device-hours"].note
    for name, why in (("Compute", "not counted"), ("Utilisation (MFU)", "not counted"), ("Energy", "no energy")):
        assert found[name].value == NOT_MEASURED
        assert why in found[name].note
    assert (found["Money"].value, "is not set" in found["Money"].note) == ("not known", True)


def test_figures_come_with_their_units(tmp_path):
    """FLOP and petaflop/s-days, device-hours, utilisation, kilowatt-hours and money, each from the summary."""
    folder = write_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    ledger = {"flops": 8.64e19, "device_s": 7200.0, "mfu": 0.412, "energy_j": 7.2e6, "cost": 12.5}
    (folder / "summary.json").write_text(json.dumps(summary | ledger))
    found = _account(folder)
    assert found["Compute"].value == "8.64e+19 FLOP = 1 petaflop/s-days"
    assert found["Device-hours"].value == "2"
    assert found["Utilisation (MFU)"].value == "41.2%"
    assert found["Energy"].value == "2 kWh"
    assert found["Money"].value == "12.5"


def test_a_run_that_goes_on_is_counted_by_its_last_row(tmp_path):
    """Without a summary, the last row that has a figure tells it; an unknown device has no utilisation."""
    ledger = {"ledger/flops": 1e12, "ledger/device_s": 36.0, "ledger/mfu": None}
    found = _account(write_run(tmp_path, finished=False, edit=lambda rows: rows[-2].update(ledger)))
    assert found["Compute"].value.startswith("1e+12 FLOP")
    assert found["Device-hours"].value == "0.01"
    assert found["Utilisation (MFU)"].note == "the peak of this device is not known"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.8084, "0.808 s"), (119, "119 s"), (120, "2 min 0 s"), (7199, "119 min 59 s"), (11_990, "3 h 20 min")],
)
def test_a_time_has_the_unit_that_suits_it(seconds, text):
    """Seconds, then minutes, then hours."""
    assert duration(seconds) == text
