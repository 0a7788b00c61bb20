"""`dptrain plan RUN`: what it writes, prints and refuses."""

from __future__ import annotations

import json

import pytest

from dptrain.cli.plan import duration, numbers, plan
from dptrain.errors import ConfigError
from tests.ideal_runs import write_ideal_run


@pytest.fixture
def run(tmp_path):
    return write_ideal_run(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """Spare the seconds that a picture takes."""
    monkeypatch.setattr("dptrain.cli.plan.draw_plan", lambda _plan, path: path.touch())


def test_it_writes_a_picture_and_a_record_and_tells(run, capsys):
    """One line per number of GPUs; the same figures in plan.json."""
    assert plan([str(run), "--gpus", "2,8,64", "--price-per-gpu-hour", "2.5"]) == 0
    out = capsys.readouterr().out
    found = json.loads((run / "plan.json").read_text())
    assert (run / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [point["num_devices"] for point in found["points"]] == [2, 8, 64]
    assert found["finding"].startswith("2 GPUs: ")
    assert "Time on 2 GPUs: " in out
    assert "noise scale is not the optimal batch size" in out
    for point in found["points"]:
        assert f"{point['micro_batch_size']} × {point['accumulation_steps']}" in out


@pytest.mark.usefixtures("undrawn")
def test_json_to_stdout_is_json_alone(run, capsys):
    """The table goes to stderr."""
    assert plan([str(run), "--gpus", "2", "--json", "-", "--flops-budget", "1e21"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((run / "plan.json").read_text())
    assert len(json.loads(out)["optimal_sizes"]) == 2
    assert "Compute-optimal by Besiroglu" in err


@pytest.mark.usefixtures("undrawn")
def test_json_to_a_file(run, tmp_path):
    """Beside the one in the run folder."""
    assert plan([str(run), "--gpus", "2", "--json", str(tmp_path / "copy.json")]) == 0
    assert (tmp_path / "copy.json").read_text() == (run / "plan.json").read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_size_of_the_gradients_is_that_of_the_run_or_of_its_newest_checkpoint(run, capsys):
    """Which a given bandwidth needs. A checkpoint has frozen weights too; without either it says so."""
    options = [str(run), "--gpus", "2,64", "--allreduce-gb-per-s", "1"]
    with pytest.raises(ConfigError, match="keep a checkpoint"):
        plan(options)
    for step, size in ((1, 10), (2, 2_000_000)):
        folder = run / "checkpoints" / f"step-{step:012}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(size))
    assert plan(options) == 0
    assert "2 MB at 1 GB/s, as given" in capsys.readouterr().out
    (run / "run.json").write_text('{"gradient_bytes": 40000}')
    assert plan(options) == 0
    assert "0.04 MB at 1 GB/s, as given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", [8]),
        ("1,2,4,...,64", [1, 2, 4, 8, 16, 32, 64]),
        ("1, 2, 4, …, 50", [1, 2, 4, 8, 16, 32, 50]),
        ("3,12,...,100,500", [3, 12, 48, 100, 500]),
    ],
)
def test_numbers_with_dots(text, expected):
    """The dots go on by the last factor."""
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--gpus", "a"),
        ("--gpus", "0"),
        ("--gpus", "1,...,8"),
        ("--gpus", "2,3,...,9"),
        ("--gpus", "1,2,..."),
        ("--price-per-gpu-hour", "-1"),
        ("--budget", "0"),
        ("--within", "6"),
        ("--within", "6 hours"),
        ("--minimum-rental", "0h"),
        ("--currency", "EUR 1"),
        ("--currency", "a currency"),
        ("--bandwidth-mbit-per-s", "fast"),
        ("--bandwidth-mbit-per-s", "0"),
        ("--delay-ms", "-1"),
    ],
)
def test_what_makes_no_sense_is_refused(run, option, value, capsys):
    """By the parser, with the value."""
    with pytest.raises(SystemExit) as ended:
        plan([str(run), option, value])
    assert ended.value.code == 2
    assert repr(value) in capsys.readouterr().err


def test_a_folder_that_takes_no_file_is_named(run):
    """A picture that cannot be written is the user's to repair."""
    (run / "plan.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*plan\.json"):
        plan([str(run), "--gpus", "2"])


FACTS = {"device_type": "cpu", "device_name": None, "num_parameters": 459_392, "tokens_per_sample": 64}


@pytest.fixture
def cpu_run(tmp_path):
    """A run on CPUs that tells its sizes."""
    summary = {"task": "gpt-tiny", "world_size": 2, "device": "cpu"}
    folder = write_ideal_run(tmp_path, summary=summary)
    (folder / "run.json").write_text(json.dumps(FACTS))
    return folder


def _plan_of(folder):
    return json.loads((folder / "plan.json").read_text())


@pytest.mark.usefixtures("undrawn")
def test_a_run_on_cpus_answers_three_questions_for_gpus(cpu_run, capsys):
    """Each in two sentences that name what is assumed; the trend and the sizes beside them."""
    assert plan([str(cpu_run), "--device", "H100,l4", "--gpus", "1,8", "--within", "90min", "--budget", "40"]) == 0
    out, found = " ".join(capsys.readouterr().out.split()), _plan_of(cpu_run)
    questions = [answer["question"] for answer in found["answers"]]
    assert questions == [
        "How long does it take on H100 GPUs, and what does it cost?",
        "What is the cheapest within 1.5 h?",
        "What is the fastest below 40 $?",
    ]
    for answer in found["answers"]:
        assert "utilisation 33 % [10, 50]" in answer["assumes"]
        assert "list of 20" in answer["assumes"]
        assert answer["answer"] in out
    assert found["device"] == "H100 GPU"
    assert [other["device"] for other in found["other_devices"]] == ["L4 GPU"]
    assert "petaflop/s-days: outside the trend of AI and Compute" in out
    assert "the nearest ready-made gpt is tiny" in out


@pytest.mark.usefixtures("undrawn")
def test_prices_of_the_user_and_a_currency(cpu_run, tmp_path, capsys):
    """4 EUR an hour, of which an hour at least is paid: 8 GPUs cost 32 EUR; in pounds at 0.85 it is 27."""
    prices = tmp_path / "mine.json"
    prices.write_text(json.dumps({"currency": "EUR", "minimum_rental_s": 3600, "prices": {"H100": 4}}))
    options = [str(cpu_run), "--device", "H100", "--gpus", "8", "--prices", str(prices)]
    assert plan(options) == 0
    assert _plan_of(cpu_run)["points"][0]["cost"] == pytest.approx(32)
    assert "32 EUR" in capsys.readouterr().out
    assert plan([*options, "--currency", "GBP=0.85"]) == 0
    assert "27 GBP" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"prices are in EUR: .*--currency GBP=0.92"):
        plan([*options, "--currency", "GBP"])
    assert plan([*options[:5], "--price-per-gpu-hour", "3600", "--mfu", "0.2"]) == 0
    found = _plan_of(cpu_run)["points"][0]
    assert found["cost"] == pytest.approx(8 * found["seconds"])
    assert "utilisation 20 % of 989.4 TFLOP/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "H10O"], r"no device 'H10O' is listed; did you mean H100"),
        (["--device", "H100", "--precision", "tf32", "--mfu", "2"], r"at most 1, got 2"),
        (["--device", "V100", "--precision", "bf16"], r"V100 has no bfloat16"),
        (["--device", "V100S"], r"no price of the V100S"),
        (["--device", "H100,L4", "--price-per-gpu-hour", "2"], r"one price for 2 devices"),
        (["--device", "H100", "--price-per-gpu-hour", "2", "--prices", "x.json"], r"leave one out"),
        (["--device", "H100", "--gpus", "1000000000"], r"no training has 1,000,000,000 devices"),
        (["--device", "H100", "--prices", "none.json"], r"cannot read prices from none.json"),
        (["--mfu", "0.3"], r"--mfu is for GPUs that the run was not on: add --device"),
        (["--budget", "100"], r"--budget needs a price"),
        (["--within", "6h"], r"--within needs a price"),
        (["--device", "H100", "--currency", "EUR"], r"--currency EUR=0.92"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(cpu_run, options, message):
    """With what to write instead."""
    with pytest.raises(ConfigError, match=message):
        plan([str(cpu_run), *options])


@pytest.mark.parametrize(("text", "seconds"), [("6h", 21_600), ("90min", 5400), ("1.5 d", 129_600), ("45s", 45)])
def test_times_with_their_units(text, seconds):
    """A bare number could be minutes or hours, and is refused."""
    assert duration(text) == seconds
