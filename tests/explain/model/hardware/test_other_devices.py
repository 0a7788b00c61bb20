"""Step times on devices that the run was not on, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dptrain.batch import BatchPlan
from dptrain.cost.device_peaks import DEVICES
from dptrain.errors import ConfigError
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.hardware.other_devices import OtherDevices, other_devices
from tests.ideal_runs import branch_of, ideal_record

PARAMETERS = 1_000_000
PER_SAMPLE = 5e7
"""FLOPs, of the ideal run."""


def cpu_run(**facts):
    record = ideal_record(summary={"task": "gpt-tiny", "world_size": 2, "device": "cpu"})
    return replace(record, facts={"device_name": None, "num_parameters": PARAMETERS, **facts})


def gpu_run(device_name="NVIDIA A100-SXM4-80GB", *, peak=312e12):
    record = ideal_record(summary={"task": "ideal", "world_size": 2, "device": "cuda", "peak_flops_per_s": peak})
    return replace(
        record, facts={"device_name": device_name, "num_parameters": PARAMETERS}, config={"precision": "bf16"}
    )


def planned(record=None, *, name="H100", **options):
    record = cpu_run() if record is None else record
    return other_devices(record, devices(record), name=name, **options)


def shape(micro=8, accumulation=2, world_size=1):
    return BatchPlan(micro_batch_size=micro, accumulation_steps=accumulation, world_size=world_size)


def test_a_sample_takes_its_flops_over_the_share_of_the_peak():
    """5e7 FLOPs at 33 % of 989.4 TFLOP/s take 0.153 µs: 2 × 2^20 samples 0.321 s, beside 5 ms of host time."""
    found = planned()
    assert found.seconds(shape(micro=2**20)) == pytest.approx(0.005 + 2 * 2**20 * 5e7 / (0.33 * 989.4e12))
    assert found.seconds(shape(micro=2**20)) == pytest.approx(0.3262, rel=1e-3)


def test_a_sample_of_a_run_that_branched_off_takes_as_long():
    """Its FLOPs are divided by the samples that they were counted on."""
    branch = branch_of(cpu_run(), at=300)
    for one in (cpu_run(), branch):
        assert planned(one).planned.sample_s == pytest.approx(PER_SAMPLE / (0.33 * 989.4e12))


def test_a_small_pass_takes_its_launches():
    """8 samples are 1.2 µs of compute; the pass takes the host's 5 ms, or the run's own fixed cost where it is less."""
    found, model = planned(), devices(cpu_run()).model
    host = min(0.005, model.per_micro_batch_s) * 2 + min(0.005, model.per_step_s)
    assert found.seconds(shape()) == pytest.approx(host)


def test_a_small_model_is_bound_by_the_host():
    """8 samples are; 2^20 of them are not."""
    found = planned()
    assert found.is_bound_by_host(shape())
    assert not found.is_bound_by_host(shape(micro=2**20))


def test_the_all_reduce_goes_by_the_link_in_a_host_and_by_the_network_beyond():
    """4 MB: 2·7/8 × 4e6/450e9 s + 2·3 × 10 µs on 8 devices, 2·15/16 × 4e6/12.5e9 s + 2·4 × 10 µs on 16."""
    found = planned()
    alone, on_8, on_16 = (found.seconds(shape(world_size=number)) for number in (1, 8, 16))
    assert on_8 - alone == pytest.approx(2 * 7 / 8 * 4e6 / 450e9 + 6e-5)
    assert on_16 - alone == pytest.approx(2 * 15 / 16 * 4e6 / 12.5e9 + 8e-5)


def test_a_given_bandwidth_holds_everywhere():
    """4 MB at 1 GB/s: 4 ms to send once."""
    found = planned(gb_per_s=1.0)
    for number, hops in ((8, 3), (16, 4)):
        extra = found.seconds(shape(world_size=number)) - found.seconds(shape())
        assert extra == pytest.approx(2 * (1 - 1 / number) * 4e-3 + 2 * hops * 1e-5)


def test_a_step_moves_its_parameters_through_the_memory():
    """10^9 parameters in float32 are 4 GB: seven times through 300 GB/s for Adam, three times a pass."""
    found = planned(cpu_run(num_parameters=10**9), name="L4")
    assert found.seconds(shape()) == pytest.approx((7 + 2 * 3) * 4e9 / 300e9, rel=1e-6)


def test_frozen_parameters_are_read_and_nothing_more():
    """5·10^9 parameters of which 10^9 are trained: 20 + 3 × 4 GB; twice 20 and 4 GB a pass, seven times 4 GB a step."""
    record = cpu_run(num_parameters=5 * 10**9, num_trained_parameters=10**9)
    found = planned(record, name="L40S")
    rate = 1e9 * DEVICES["L40S"].memory_gb_per_s
    assert found.seconds(shape()) == pytest.approx((7 * 4e9 + 2 * (2 * 20e9 + 4e9)) / rate, rel=1e-6)
    assert found.gradient_bytes == 4e9
    with pytest.raises(ConfigError, match=r"at least 32 GB .* 5,000,000,000 parameters, 1,000,000,000 of them trained"):
        planned(record, name="L4")


def test_the_range_encloses_the_plan():
    """With what it may be by utilisation, host and network; a given utilisation leaves the others."""
    for found in (planned(), planned(utilisation=0.2), planned(gpu_run())):
        for world_size in (1, 8, 64):
            for micro in (8, 4096):
                low, high = found.seconds_range(shape(micro=micro, world_size=world_size))
                assert 0 < low < found.seconds(shape(micro=micro, world_size=world_size)) < high
    low, high = planned().seconds_range(shape(micro=2**24))
    assert high / low == pytest.approx(0.5 / 0.1, rel=0.01)


def test_from_a_listed_gpu_the_time_of_a_sample_is_scaled_by_peak_and_memory():
    """A100 → H100: between 312/989.4 and 2039/3350, which is 0.315 to 0.609; 0.438 is planned."""
    record = gpu_run()
    found, own = planned(record), devices(record).model.per_sample_s
    assert found.fastest.sample_s / own == pytest.approx(312 / 989.4)
    assert found.slowest.sample_s / own == pytest.approx(2039 / 3350)
    assert found.planned.sample_s / own == pytest.approx((312 / 989.4 * 2039 / 3350) ** 0.5)
    assert found.micro_batch_sizes == devices(record).micro_batch_sizes


def test_the_run_s_own_device_keeps_the_run_s_own_times():
    """Nothing is assumed where all was measured; another precision there is another matter."""
    record = gpu_run()
    here = devices(record)
    assert other_devices(record, here, name="A100") is here
    assert isinstance(other_devices(record, here, name="A100", precision="float32"), OtherDevices)


@pytest.mark.parametrize(("name", "precision"), [("H100", "bfloat16"), ("V100", "float16"), ("T4", "float16")])
def test_a_cpu_run_is_planned_in_16_bits(name, precision):
    """bfloat16 where the device has it: a run in float32 on a CPU says nothing of what a GPU would train with."""
    found = planned(name=name)
    assert found.precision == precision
    assert found.peak_flops_per_s == DEVICES[name].flops_per_s(precision)
    assert precision in found.assumptions[0]


def test_a_run_in_bf16_goes_to_fp16_where_there_is_no_bf16():
    """A V100 has none."""
    assert planned(gpu_run(), name="V100").precision == "float16"


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (cpu_run(), {"name": "V100", "precision": "bfloat16"}, "V100 has no bfloat16 .it has float16, float32."),
        (cpu_run(num_parameters=None), {}, "does not tell its number of parameters"),
        (cpu_run(num_parameters=10**11), {}, "needs at least 1,600 GB .* H100 has 80 GB"),
        (cpu_run(), {"utilisation": 1.5}, "a share of the peak, above 0 and at most 1, got 1.5"),
    ],
)
def test_what_cannot_be_planned_is_refused(record, options, message):
    """With the figure and the remedy."""
    with pytest.raises(ConfigError, match=message):
        planned(record, **options)


def test_a_run_without_counted_flops_is_refused():
    """Peaks are worth nothing without them."""

    def uncounted(rows, _evals):
        for row in rows:
            row["ledger/flops"] = None

    record = replace(ideal_record(edit=uncounted), facts={"num_parameters": PARAMETERS})
    with pytest.raises(ConfigError, match="did not count its FLOPs"):
        planned(record)
