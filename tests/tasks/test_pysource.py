"""The source-text task: what is held out, how windows lie, what the loss is, and that the models see no future."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dptrain.data.token_files import TokenWindows
from dptrain.errors import ConfigError, TaskError
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.tasks import check_task, pysource
from dptrain.tasks.gpt import next_token_loss
from dptrain.tasks.pysource import ByteLstm, is_held_out, read_source

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return pysource()


def _files(text):
    return set(bytes(text.tolist()).split(b"\0")[:-1])


def _write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _names(*, held_out, count):
    names = (f"module_{number}.py" for number in range(10_000))
    return [name for name in names if is_held_out(Path(name)) is held_out][:count]


def ByteTransformer(**sizes):  # noqa: N802 - stands for a class below
    return Gpt(GptConfig(**sizes))


def _mixing_model(kind=ByteTransformer, **sizes):
    """A model whose layers already mix: an untrained transformer is the identity and looks at no other byte."""
    torch.manual_seed(1)
    model = kind(width=32, depth=2, **sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_each_file_is_on_one_side():
    """No file of the library is in both texts, and about one byte in twenty is held out."""
    train, held_out = read_source(STDLIB)
    # Equal files (empty __init__.py) may be on both sides; none of them has anything to remember.
    assert {text for text in _files(train) & _files(held_out) if len(text) > 200} == set()
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.10


def test_reading_is_deterministic():
    """Two readings give the same bytes in the same order."""
    first, second = read_source(STDLIB), read_source(STDLIB)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_text_is_files_in_order_of_their_paths(tmp_path):
    """A file of the training side comes whole, in the order of paths, closed by a zero byte."""
    first, second = _names(held_out=False, count=2)
    (held_out_name,) = _names(held_out=True, count=1)
    _write(tmp_path, {second: "second", first: "first", held_out_name: "kept apart"})
    train, held_out = read_source(tmp_path)
    assert bytes(train.tolist()) == b"first\0second\0"
    assert bytes(held_out.tolist()) == b"kept apart\0"


def test_packages_and_tests_are_left_out(tmp_path):
    """Installed packages, test folders and files that are not source do not enter the text."""
    first, second = _names(held_out=False, count=2)
    (held_out_name,) = _names(held_out=True, count=1)
    _write(tmp_path, {first: "in", held_out_name: "in", "data.txt": "out"})
    _write(tmp_path / "site-packages", {second: "out"})
    _write(tmp_path / "json" / "tests", {second: "out"})
    assert bytes(read_source(tmp_path)[0].tolist()) == b"in\0"


def test_python_without_source_is_refused(tmp_path):
    """A library folder without source files gives a sentence, not an empty data set."""
    with pytest.raises(TaskError, match="too little Python source"):
        read_source(tmp_path)


def test_windows_tile_the_text():
    """Windows are consecutive and do not overlap, and what does not fill one is left out."""
    windows = TokenWindows([np.arange(23, dtype=np.uint8)], size=5)
    assert [windows[index].tolist() for index in range(len(windows))] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [10, 11, 12, 13, 14],
        [15, 16, 17, 18, 19],
    ]
    with pytest.raises(IndexError, match="0 … 3, got 4"):
        windows[4]


@pytest.mark.parametrize("at_most", [1, 2, 3, 4, 7, 8, 100])
def test_spread_windows_are_some_of_all(at_most):
    """A spread set is no larger than asked, starts at the first window and keeps equal distances."""
    windows = TokenWindows([np.arange(40, dtype=np.uint8)], size=5)
    spread = windows.spread(at_most)
    starts = [int(spread[index][0]) for index in range(len(spread))]
    assert 1 <= len(starts) <= at_most
    assert starts == list(range(0, 40, 5 * math.ceil(8 / at_most)))


def test_loss_is_the_cross_entropy_of_the_next_byte(task):
    """The loss equals minus the mean log-probability of each byte given those before it, summed by hand."""
    windows = torch.stack([task.train_data[index] for index in range(3)])
    logs = task.model(windows[:, :-1].long()).log_softmax(-1).detach()
    by_hand = torch.stack(
        [
            -torch.stack([logs[s, t, int(windows[s, t + 1])] for t in range(windows.shape[1] - 1)]).mean()
            for s in range(3)
        ]
    )
    torch.testing.assert_close(task.loss(task.model, windows).detach(), by_hand.mean())
    assert task.eval_metrics["bits_per_byte"](math.log(2)) == pytest.approx(1.0)


MIXING = [(ByteTransformer, {"heads": 4}), (ByteLstm, {})]


@pytest.mark.parametrize(("kind", "sizes"), MIXING)
def test_model_sees_no_future(kind, sizes):
    """Changing a byte leaves all logits before it unchanged, and changes those from it on."""
    model = _mixing_model(kind, **sizes)
    text = torch.randint(256, (2, 16))
    changed = text.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(text), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=0)
    assert (before[:, 9:] != after[:, 9:]).any(-1).all()


@pytest.mark.parametrize(("kind", "sizes"), MIXING)
def test_model_sees_order(kind, sizes):
    """Exchanging two earlier bytes changes the prediction: positions are not ignored."""
    model = _mixing_model(kind, **sizes)
    text = torch.arange(16)[None]
    exchanged = text.clone()
    exchanged[0, [2, 5]] = text[0, [5, 2]]
    assert not torch.allclose(model(text)[0, -1], model(exchanged)[0, -1], rtol=1e-3)


@pytest.mark.parametrize("model", ["transformer", "lstm"])
def test_untrained_model_knows_nothing(model):
    """At initialisation the held-out loss is that of a uniform guess, 8 bits per byte, within 2 %."""
    torch.manual_seed(0)
    task = pysource(model=model)
    check_task(task)
    windows = torch.stack([task.eval_data[index] for index in range(32)])
    bits = task.eval_metrics["bits_per_byte"](task.loss(task.model, windows).item())
    assert bits == pytest.approx(8.0, rel=0.02)


@pytest.mark.parametrize(("kind", "sizes"), [(ByteTransformer, {"depth": 2, "heads": 4}), (ByteLstm, {"depth": 1})])
def test_model_learns(task, kind, sizes):
    """A few steps of AdamW on one micro-batch at least halve its loss."""
    torch.manual_seed(0)
    model = kind(width=64, **sizes)
    windows = torch.stack([task.train_data[index] for index in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = next_token_loss(model, windows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"context": 0}, "context of pysource must be a whole number of at least 1, got 0"),
        ({"depth": "3"}, "depth of pysource must be a whole number"),
        ({"width": 130, "heads": 4}, "multiple of 2 × heads = 8"),
        ({"context": 1 << 20}, "at most"),
        ({"model": "gru"}, "pysource has the models 'transformer', 'lstm', got 'gru'"),
        ({"model": "lstm", "heads": 4}, "leave out heads=4"),
        ({"model": "lstm", "width": 0}, "width of pysource must be a whole number of at least 1, got 0"),
    ],
)
def test_sizes_out_of_bounds_are_refused(options, sentence):
    """A size that no model can have gives one sentence with the value."""
    with pytest.raises(ConfigError, match=sentence):
        pysource(**options)
