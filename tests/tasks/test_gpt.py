"""The task `gpt`: what it reads, what it holds out, and what it refuses before a step is taken."""

from __future__ import annotations

import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.tasks import check_task
from dptrain.tasks.gpt import gpt
from tests.tasks.made_data import make_nanogpt_folder, make_text, make_tokenizer


def test_a_nanogpt_folder_holds_out_its_val_file(tmp_path):
    """Windows of context + 1 tokens, one token shared with the next; perplexity is a figure."""
    task = gpt(data=str(make_nanogpt_folder(tmp_path / "data", num_tokens=6000)), vocab_size=96, context=32)
    check_task(task)
    assert (len(task.train_data), len(task.eval_data)) == ((6000 - 33) // 32 + 1, (1200 - 33) // 32 + 1)
    assert task.train_data[0][-1] == task.train_data[1][0]
    assert task.eval_metrics["perplexity"](0.0) == 1.0


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_text_is_read_as_bytes_or_by_a_tokenizer(tmp_path, with_tokenizer):
    """The first window decodes to the beginning of the text, and the end of the text is held out."""
    text = make_text(4000)
    (tmp_path / "text.txt").write_text(text)
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json") if with_tokenizer else None
    task = gpt(data=str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "tokenizer.json") if with_tokenizer else None)
    tokens = task.train_data[0].tolist()
    found = tokenizer.decode(tokens) if tokenizer else bytes(tokens).decode()
    assert text.startswith(found)
    assert len(task.eval_data) >= 1
    assert set(task.eval_metrics) == ({"perplexity"} if with_tokenizer else {"bits_per_byte"})


@pytest.mark.parametrize("last", [10, 33, 40, 400])
def test_a_short_last_file_refuses_no_folder(tmp_path, last):
    """A twentieth of all tokens is held out, of as many files as hold it, and none of it is trained on."""
    lengths = {"a": 8000, "b": 500, "c": last}
    for name, length in lengths.items():
        start = ord(name) - ord("a")
        (tmp_path / f"{name}.txt").write_bytes(bytes(start * 64 + at % 64 for at in range(length)))
    task = gpt(data=str(tmp_path), context=32, width=8, heads=2, depth=1)
    share = sum(length for length in lengths.values() if length >= 33) // 20
    held_out = 32 * len(task.eval_data)
    assert share - 2 * 33 <= held_out <= share
    assert set(torch.stack(list(task.train_data)).flatten().tolist()) >= set(range(64))
    assert len(task.train_data) * 32 >= sum(lengths.values()) - share - last % 33 - 4 * 33


def test_text_for_one_window_is_refused_with_the_remedy(tmp_path):
    """Nothing would be left to train on."""
    (tmp_path / "a.txt").write_bytes(bytes(33))
    with pytest.raises(ConfigError, match="put a file with val in its name beside them, or lower the context"):
        gpt(data=str(tmp_path), context=32, width=8, heads=2, depth=1)


def test_the_balance_loss_of_experts_is_in_training_alone(tmp_path):
    """In eval mode the loss is that of the predictions; in train mode it is larger by the weighted balance loss."""
    data = str(make_nanogpt_folder(tmp_path / "data"))
    torch.manual_seed(0)
    task = gpt(data=data, vocab_size=96, context=32, num_experts=4)
    batch = torch.stack([task.train_data[index] for index in range(2)])
    balance, samples, tokens = task.model(batch[:, :-1]).routing
    found = task.loss(task.model.train(), batch)
    assert found["cross_entropy"] == task.loss(task.model.eval(), batch)
    assert found["load_balancing"] == balance
    difference = found["loss"] - found["cross_entropy"]
    assert difference.item() == pytest.approx(0.01 * balance.item(), rel=1e-3)
    assert samples.shape == tokens.shape == (2, 4)
    assert found["routed_samples/blocks.1.experts.2"] == samples[1, 2]
    assert found["routed_tokens/blocks.0.experts.3"] == tokens[0, 3]


def test_local_blocks_add_their_losses_in_training_alone(tmp_path):
    """The training loss is the sum of the blocks' and of the experts' balance; the held-out loss is the last one's."""
    data = str(make_nanogpt_folder(tmp_path / "data"))
    torch.manual_seed(0)
    task = gpt(data=data, vocab_size=96, context=32, num_experts=4, local_blocks=2)
    assert check_task(task).unused == frozenset()
    batch = torch.stack([task.train_data[index] for index in range(2)])
    found = task.loss(task.model.train(), batch)
    assert found["cross_entropy"] == task.loss(task.model.eval(), batch)
    own = found["cross_entropy/local_blocks.0"]
    assert own != found["cross_entropy"]
    expected = own + found["cross_entropy"] + 0.01 * found["load_balancing"]
    torch.testing.assert_close(found["loss"], expected)


def test_a_token_without_a_row_is_refused(tmp_path):
    """On a GPU it would end the run without a reason; a vocabulary that is not GPT-2's must be given."""
    folder = make_nanogpt_folder(tmp_path / "data", vocab_size=96)
    with pytest.raises(ConfigError, match="holds the token 95, but vocab_size is 64: give vocab_size of at least 96"):
        gpt(data=str(folder), vocab_size=64, context=32)
    (folder / "meta.pkl").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"has a meta\.pkl, so its vocabulary is not GPT-2's"):
        gpt(data=str(folder), context=32, width=8, heads=2, depth=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": "nowhere"}, "there is no nowhere to train on"),
        ({"size": "7b"}, "gpt has the sizes tiny, 124m, 350m, 1.5b, got '7b'"),
        ({"tokenizer": "tokenizer.json"}, "holds tokens already: leave it out"),
        (
            {"vocab_size": 128_256},
            r"vocab_size 128256 is more than uint16 holds, and .*: give dtype uint32, or uint16 if",
        ),
        ({"dtype": "int8"}, "uint16 or uint32, got 'int8'"),
        ({"positions": "alibi"}, "positions must be one of rotary, learned"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, options, sentence):
    """Each in one sentence with the value."""
    settings = {"data": str(make_nanogpt_folder(tmp_path / "data")), "vocab_size": 96, "context": 32}
    with pytest.raises(ConfigError, match=sentence):
        gpt(**{**settings, **options})
