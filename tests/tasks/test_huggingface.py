"""The task `huggingface`: how long its texts may be, which tokens of given rows are trained on, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dptrain.errors import ConfigError
from dptrain.tasks import check_task
from dptrain.tasks.huggingface import huggingface
from tests.tasks.made_data import make_text, make_tokenizer

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def make_model(folder, config, *, longest_text=None):
    """Save a configuration and a tokenizer, as a model's folder without weights has them."""
    folder.mkdir(parents=True)
    special = {"eos_token": "<end>", "pad_token": "<end>"}
    if longest_text is not None:
        special["model_max_length"] = longest_text
    tokenizer = make_tokenizer(folder / "raw.json")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config(vocab_size=tokenizer.get_vocab_size()).save_pretrained(folder)
    return str(folder)


def make_rows(folder, **columns):
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return str(folder)


def long_texts(folder, *, labels=(0, 1)):
    """Texts of which the last ones, which no check reads, are longer than any of the models here takes."""
    texts = [make_text(3, seed=index) for index in range(38)] + [make_text(200, seed=index) for index in range(2)]
    return make_rows(folder, text=texts, label=[labels[index % len(labels)] for index in range(40)])


def roberta(**settings):
    return lambda vocab_size: transformers.RobertaConfig(
        vocab_size=vocab_size, max_position_embeddings=34, pad_token_id=1, **SMALL, **settings
    )


def mpnet(vocab_size):
    return transformers.MPNetConfig(vocab_size=vocab_size, max_position_embeddings=34, **SMALL)


def bert(vocab_size):
    return transformers.BertConfig(vocab_size=vocab_size, max_position_embeddings=32, pad_token_id=0, **SMALL)


def xlnet(vocab_size):
    return transformers.XLNetConfig(vocab_size=vocab_size, d_model=16, n_layer=1, n_head=2, d_inner=16)


@pytest.mark.parametrize(
    ("config", "longest_text", "expected"),
    [
        (roberta(), None, 33),  # the tokenizer's padding, <end>, is token 0, and positions begin after it
        (mpnet, None, 32),
        (bert, None, 32),
        (bert, 20, 20),
        (xlnet, 50, 50),
    ],
)
def test_a_long_text_is_cut_at_what_model_and_tokenizer_take(tmp_path, config, longest_text, expected):
    """All held-out texts, the long ones too, go through the model."""
    model = make_model(tmp_path / "model", config, longest_text=longest_text)
    task = huggingface(model=model, data=long_texts(tmp_path / "data"), kind="classification")
    batch = task.eval_data.read_batch(np.arange(len(task.eval_data)))
    assert batch["input_ids"].shape == (2, expected)
    assert torch.isfinite(task.loss(task.model, batch))


def test_a_causal_model_counts_positions_alike(tmp_path):
    """A window of RoBERTa as a decoder is as long as its positions, and a longer one is refused with the number."""
    model = make_model(tmp_path / "model", roberta(is_decoder=True))
    data = long_texts(tmp_path / "data")
    task = huggingface(model=model, data=data)
    assert task.tokens_per_sample == 32
    check_task(task)
    with pytest.raises(ConfigError, match="from 1 to the model's 32 positions, got 33"):
        huggingface(model=model, data=data, context=33)
    with pytest.raises(ConfigError, match="at least 1, got 0"):
        huggingface(model=model, data=data, context=0)


def gpt2(vocab_size):
    return transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )


ROWS = [[5, 6, 7], [8, 9], [10, 11, 12]] * 20


def filled_up(rows, value, *, length=4):
    return [[*row, *[value] * (length - len(row))] for row in rows]


def tokens_of(data):
    return torch.cat([data[index][:-1] for index in range(len(data))]).tolist()


def test_what_fills_a_row_up_is_not_trained_on(tmp_path):
    """Rows filled up to one length, with the labels that go with them, are the rows without what fills them up."""
    model = make_model(tmp_path / "model", gpt2)
    mask = filled_up([[1] * len(row) for row in ROWS], 0)
    bare = make_rows(tmp_path / "bare", input_ids=ROWS)
    padded = make_rows(
        tmp_path / "padded", input_ids=filled_up(ROWS, 0), attention_mask=mask, labels=filled_up(ROWS, -100)
    )
    expected = huggingface(model=model, data=bare, context=4)
    found = huggingface(model=model, data=padded, context=4)
    assert tokens_of(found.train_data) == tokens_of(expected.train_data)
    assert tokens_of(found.eval_data) == tokens_of(expected.eval_data)
    assert 0 not in tokens_of(found.train_data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("labels", [[-100, *row[1:]] for row in ROWS]),
        ("labels", [[token + 1 for token in row] for row in ROWS]),
        ("completion_mask", [[0] + [1] * (len(row) - 1) for row in ROWS]),
    ],
)
def test_rows_that_train_a_part_of_the_tokens_alone_are_refused(tmp_path, name, value):
    """Their prompts would be trained on without a word; the sentence names the column."""
    model = make_model(tmp_path / "model", gpt2)
    data = make_rows(tmp_path / "data", input_ids=ROWS, **{name: value})
    with pytest.raises(ConfigError, match=f"column '{name}' of .*: remove that column"):
        huggingface(model=model, data=data, context=4)


def test_a_class_beside_the_tokens_of_a_row_is_no_label_of_them(tmp_path):
    """A causal model has no use for it, whatever it is called."""
    model = make_model(tmp_path / "model", gpt2)
    data = make_rows(tmp_path / "data", input_ids=ROWS, labels=[1] * len(ROWS))
    assert len(huggingface(model=model, data=data, context=4).train_data) > 1


@pytest.mark.parametrize(
    ("labels", "complaint"), [((0, -1), r"training rows without a class \(label=-1\)"), ((0, None), "label=None")]
)
def test_texts_without_a_class_are_refused(tmp_path, labels, complaint):
    """They ended in torch's error at the first of them, or were left out of the mean for -100."""
    model = make_model(tmp_path / "model", bert)
    with pytest.raises(ConfigError, match=complaint):
        huggingface(model=model, data=long_texts(tmp_path / "data", labels=labels), kind="classification")
