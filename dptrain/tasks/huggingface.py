"""The task `huggingface`: any causal or sequence-classification model of transformers on a local data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from dptrain.data.local_datasets import Rows, check_columns, load_splits, read_classes
from dptrain.data.token_files import Tokens, TokenWindows
from dptrain.errors import ConfigError
from dptrain.tasks.base import Suggestion, Task, loss_and_accuracy
from dptrain.tasks.gpt import perplexity

Foreign = Any
"""An object of transformers, which has no types here."""

_DEFAULT_CONTEXT = 1024
_EVAL_TOKENS = 1 << 20
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def huggingface(
    *,
    model: str,
    data: str,
    kind: str = "causal",
    context: int | None = None,
    pretrained: bool = True,
    text_column: str = "text",
    label_column: str = "label",
) -> Task:
    """Train a model of the package `transformers`; model, tokenizer and data come from local folders.

    Args:
        model: folder of a model (`config.json`, and what `save_pretrained` wrote beside it), or a `config.json`.
        data: folder of a data set that `datasets` saved or reads. Rows hold text, or `input_ids` of a tokenizer.
        kind: `causal`, which predicts the next token in windows cut from all texts in a row; or `classification`.
        context: tokens in a window; for classification, at which longer texts are cut. Where not given, what the model
            was made for, at most 1,024.
        pretrained: start from the folder's weights, which must be safetensors; else, or without any, from random ones.
        text_column: name of the column of texts.
        label_column: name of the column of classes.

    Returns:
        The task. Its loss is cross-entropy in nats, per token or per text; `perplexity` is among the figures of a
        causal model, `accuracy` of a classifier.

    Raises:
        ConfigError: where a package, the model, its tokenizer or a column is missing.
    """
    if kind not in ("causal", "classification"):
        raise ConfigError(f"kind must be causal or classification, got {kind!r}")
    folder, root = Path(model).expanduser(), Path(data).expanduser()
    config = _load_config(folder)
    rows = load_splits(root)
    _check_context(context)
    if kind == "causal":
        return _causal(folder, config, rows=rows, root=root, context=context, pretrained=pretrained, text=text_column)
    return _classification(
        folder,
        config,
        rows=rows,
        root=root,
        context=context,
        pretrained=pretrained,
        columns=(text_column, label_column),
    )


def _causal(
    folder: Path,
    config: Foreign,
    *,
    rows: tuple[Rows, Rows],
    root: Path,
    context: int | None,
    pretrained: bool,
    text: str,
) -> Task:
    token_rows = [_token_row(part, folder=folder, root=root, text=text) for part in rows]
    for tokens in token_rows:
        if len(tokens) and int(tokens.max()) >= config.vocab_size:
            raise ConfigError(
                f"{root} holds the token {tokens.max()}, but the model's vocab_size is {config.vocab_size}"
            )
    network = _build("AutoModelForCausalLM", folder, config, pretrained=pretrained)
    context = _context(context, longest=_num_positions(network, config))
    train, held_out = (TokenWindows([tokens], size=context + 1, stride=context) for tokens in token_rows)
    return Task(
        name=f"huggingface-{config.model_type}",
        model=network,
        train_data=train,
        eval_data=held_out.spread(max(1, _EVAL_TOKENS // context)),
        loss=causal_loss,
        eval_metrics={"perplexity": perplexity},
        suggestion=_suggestion(len(train), pretrained=_has_weights(folder) and pretrained),
        tokens_per_sample=context,
    )


def causal_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats; windows of shape (samples, context + 1)."""
    windows = windows.long()
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def _token_row(rows: Rows, *, folder: Path, root: Path, text: str) -> Tokens:
    """Return the tokens of all rows one after the other; texts are closed by the end-of-sequence token."""
    if "input_ids" in rows.column_names:
        return _tokenised_row(rows, root=root)
    check_columns(rows, text, path=root)
    tokenizer = _tokenizer(folder)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = [
        np.asarray(ids + end, dtype=np.int32)
        for batch in rows.iter(batch_size=1000)
        for ids in tokenizer(batch[text], add_special_tokens=False, verbose=False)["input_ids"]
    ]
    return np.concatenate(found)


def _tokenised_row(rows: Rows, *, root: Path) -> Tokens:
    """Return the tokens of rows that a tokenizer has made; what fills a row up, by its mask, is no token."""
    names = [name for name in ("attention_mask", "labels", *_PARTS_TRAINED) if name in rows.column_names]
    found = []
    for batch in rows.select_columns(["input_ids", *names]).iter(batch_size=1000):
        for number, ids in enumerate(batch["input_ids"]):
            row = np.asarray(ids, dtype=np.int32)
            others = {name: np.asarray(batch[name][number]) for name in names}
            mask = others.pop("attention_mask", np.ones_like(row))
            for name, of_tokens in others.items():
                _check_all_trained(row, name, of_tokens, mask=mask, root=root)
            found.append(row[mask != 0])
    return np.concatenate(found)


_PARTS_TRAINED = ("completion_mask", "assistant_masks", "loss_mask")
"""Columns by which other trainers leave tokens out of the loss."""


def _check_all_trained(row: Tokens, name: str, of_tokens: NDArray[Any], *, mask: NDArray[Any], root: Path) -> None:
    """Refuse rows of which other trainers would train a part of the tokens alone, or to predict something else."""
    if of_tokens.shape != row.shape:  # such as one class for a row, of which a causal model has no use
        return
    expected = row if name == "labels" else 1
    if ((of_tokens != expected) & (mask != 0)).any():
        raise ConfigError(
            f"the column {name!r} of {root} leaves tokens out of the loss or asks for others than input_ids, and kind="
            f"causal trains on each next token: remove that column to train on all of them, or write a task of your own"
        )


class LabelledTexts(Dataset[dict[str, Tensor]]):
    """Tokenised texts with their classes, all filled up to the length of the longest.

    One length for all, so that neither the replicas' shapes nor the rounding of a loss depend on who shares a
    micro-batch with whom.

    Args:
        input_ids: shape (texts, length).
        attention_mask: 1 for tokens, 0 for what fills up; the same shape.
        labels: shape (texts,).
    """

    def __init__(self, *, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> None:
        self._columns = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def __len__(self) -> int:
        return len(self._columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self._columns.items()}

    def read_batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return a micro-batch at once."""
        chosen = torch.from_numpy(indices)
        return {name: column[chosen] for name, column in self._columns.items()}


def _classification(
    folder: Path,
    config: Foreign,
    *,
    rows: tuple[Rows, Rows],
    root: Path,
    context: int | None,
    pretrained: bool,
    columns: tuple[str, str],
) -> Task:
    text, label = columns
    for part in rows:
        check_columns(part, text, label, path=root)
    config.num_labels, classes = read_classes(rows, label, path=root)
    tokenizer = _tokenizer(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = tokenizer.pad_token_id
    network = _build("AutoModelForSequenceClassification", folder, config, pretrained=pretrained)
    context = _context(context, longest=_num_positions(network, config), default=tokenizer.model_max_length)
    train, held_out = (
        _encoded(part, tokenizer, context=context, text=text, classes=of)
        for part, of in zip(rows, classes, strict=True)
    )
    return Task(
        name=f"huggingface-{config.model_type}",
        model=network,
        train_data=train,
        eval_data=held_out,
        loss=classification_loss,
        eval_loss=classification_figures,
        suggestion=_suggestion(len(train), pretrained=_has_weights(folder) and pretrained),
    )


def classification_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the class, in nats."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(logits.float(), batch["labels"])


def classification_figures(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean cross-entropy and accuracy of held-out texts."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return loss_and_accuracy(logits.float(), batch["labels"])


def _encoded(rows: Rows, tokenizer: Foreign, *, context: int, text: str, classes: list[int]) -> LabelledTexts:
    found = tokenizer(
        list(rows[text]), truncation=True, max_length=context, padding="longest", return_tensors="pt", verbose=False
    )
    return LabelledTexts(
        input_ids=found["input_ids"],
        attention_mask=found["attention_mask"],
        labels=torch.tensor(classes),
    )


def _transformers() -> Foreign:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"this task needs transformers: pip install 'dptrain[tasks]' ({error})") from error
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call] # one on each replica
    return transformers


def _load_config(path: Path) -> Foreign:
    if not path.exists():
        raise ConfigError(f"there is no model {path}, as seen from {Path.cwd()}; nothing is downloaded")
    try:
        return _transformers().AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} holds no model of transformers: {' '.join(str(error).split())}") from error


def _tokenizer(folder: Path) -> Foreign:
    source = folder if folder.is_dir() else folder.parent
    try:
        return _transformers().AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{source} holds no tokenizer: save one there, or give a data set with a column input_ids "
            f"({' '.join(str(error).split())})"
        ) from error


def _build(kind: str, folder: Path, config: Foreign, *, pretrained: bool) -> nn.Module:
    auto = getattr(_transformers(), kind)
    try:
        if pretrained and _has_weights(folder):
            # As float32, whatever they were saved in: the trainer's precision decides what is computed in less.
            model: nn.Module = auto.from_pretrained(
                str(folder), config=config, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        else:
            model = auto.from_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} cannot be built as {kind}: {' '.join(str(error).split())}") from error
    return model.train()


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).exists() for name in _WEIGHTS)


def _check_context(context: int | None) -> None:
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise ConfigError(f"context must be a whole number of tokens of at least 1, got {context!r}")


def _context(context: int | None, *, longest: int | None, default: int = _DEFAULT_CONTEXT) -> int:
    """Return the tokens that the model is given at most.

    Args:
        context: as it was asked for.
        longest: positions that the model has, None for no limit.
        default: what the tokenizer was made for.
    """
    if context is None:
        return min(_DEFAULT_CONTEXT, default, longest or _DEFAULT_CONTEXT)
    if longest is not None and context > longest:
        raise ConfigError(f"context must be from 1 to the model's {longest} positions, got {context!r}")
    return context


def _num_positions(model: nn.Module, config: Foreign) -> int | None:
    """Return the positions that a model has a row for, None where it has no limit, for which XLNet says -1."""
    longest: object = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return None
    # RoBERTa and its kin number positions from that of padding on, plus one: a table of 514 rows is for 512 tokens.
    left: list[int] = [
        len(module.weight) - 1 - module.padding_idx
        for name, module in model.named_modules()
        if name.endswith(_POSITIONS)
        and isinstance(getattr(module, "weight", None), Tensor)
        and isinstance(getattr(module, "padding_idx", None), int)
    ]
    return min([longest, *left])


_POSITIONS = ("position_embeddings", "embed_positions")
"""Names that tables of positions have in transformers."""


def _suggestion(num_samples: int, *, pretrained: bool) -> Suggestion:
    """Common values of fine-tuning and of small models from scratch; tuned on no data."""
    return Suggestion(
        learning_rate=2e-5 if pretrained else 5e-4,
        global_batch_size=32,
        micro_batch_size=8,
        max_samples=3 * num_samples,
        eval_every_samples=max(1, num_samples // 2),
    )
