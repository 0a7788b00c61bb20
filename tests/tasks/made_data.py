"""Makes small data sets and models on disk, of the forms that users have."""

from __future__ import annotations

import numpy as np

_TEXT = """the model learns from noisy gradients while a batch grows and the loss falls below what was measured"""
_WORDS = _TEXT.split()


def make_text(num_words, *, seed=0):
    """Sentences of a small vocabulary in which some words follow others more often."""
    random = np.random.default_rng(seed)
    index, words = 0, []
    for _ in range(num_words):
        step = int(random.choice([1, 2, 7], p=[0.7, 0.2, 0.1]))
        index = (index + step) % len(_WORDS)
        words.append(_WORDS[index])
    return " ".join(words)


def make_nanogpt_folder(folder, *, num_tokens=6000, vocab_size=96):
    """`train.bin` and `val.bin` of uint16, as nanoGPT's prepare.py writes them; each token mostly follows the last."""
    folder.mkdir(parents=True)
    for seed, (name, length) in enumerate((("train", num_tokens), ("val", num_tokens // 5))):
        steps = np.random.default_rng(seed).choice([1, 2, 11], p=[0.8, 0.1, 0.1], size=length)
        (steps.cumsum() % vocab_size).astype(np.uint16).tofile(folder / f"{name}.bin")
    return folder


def make_tokenizer(path, *, vocab_size=160):
    """Train a byte-level BPE tokenizer on the text and save it as tokenizer.json; return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=[], show_progress=False
    )
    tokenizer.train_from_iterator([make_text(2000)], trainer)
    tokenizer.save(str(path))
    return tokenizer


def make_hf_model(folder, *, kind="causal"):
    """Save a GPT-2 (or BERT, for classification) of 30,000 parameters with its tokenizer, as save_pretrained does."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BertConfig,
        GPT2Config,
        PreTrainedTokenizerFast,
    )

    folder.mkdir(parents=True)
    tokenizer = make_tokenizer(folder / "raw.json")
    end = "<end>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    torch.manual_seed(3)
    if kind == "causal":
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(vocab_size=len(fast), n_positions=32, n_embd=32, n_layer=2, n_head=2, **ends)
        model = AutoModelForCausalLM.from_config(config)
    else:
        config = BertConfig(
            vocab_size=len(fast),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_texts(folder, *, labelled=False, num_texts=120):
    """Save a data set of texts with `save_to_disk`; a label tells whether a text has an odd number of words."""
    import datasets

    texts = [make_text(4 + index % 9, seed=index) for index in range(num_texts)]
    columns = {"text": texts}
    if labelled:
        columns["label"] = [len(text.split()) % 2 for text in texts]
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder))
    return folder


def make_png_folder(folder, *, num_images=24, size=24):
    """A folder of PNG files for each of three classes, which differ by their colour."""
    from PIL import Image

    random = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for number in range(num_images):
            pixels = random.integers(0, 120, size=(size, size + number % 5, 3), dtype=np.uint8)
            pixels[..., 2 - label] += 100
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder
