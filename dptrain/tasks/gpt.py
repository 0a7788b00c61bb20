"""The task `gpt`: a decoder-only language model on token files, shard folders or plain text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional

from dptrain.data.text_files import Text, read_text
from dptrain.data.token_files import TokenFile, Tokens, TokenWindows, find_token_files, split_off
from dptrain.errors import ConfigError
from dptrain.models.experts import ExpertsConfig
from dptrain.models.gpt import SIZES, Gpt, GptConfig, Predictions
from dptrain.tasks.base import Loss, Suggestion, Task

_EVAL_TOKENS = 1 << 20
_HELD_OUT_SHARE = 20
_MOST_UINT16 = 1 << 16
_LARGEST_HELD_OUT = 1 << 22

SUGGESTIONS: Mapping[str, Suggestion] = MappingProxyType(
    {
        # Tuned on pysource.
        "tiny": Suggestion(
            learning_rate=2e-3,
            global_batch_size=16,
            micro_batch_size=8,
            max_samples=40_000,
            eval_every_samples=4_000,
        ),
        # Batches and rates of GPT-3's models of these sizes (Brown et al. 2020, arXiv 2005.14165, table 2.1), in
        # samples of 1,024 tokens; 20 tokens per parameter (Hoffmann et al. 2022, arXiv 2203.15556). Not tuned here.
        "124m": Suggestion(
            learning_rate=6e-4,
            global_batch_size=512,
            micro_batch_size=16,
            max_samples=2_400_000,
            eval_every_samples=100_000,
        ),
        "350m": Suggestion(
            learning_rate=3e-4,
            global_batch_size=512,
            micro_batch_size=8,
            max_samples=6_900_000,
            eval_every_samples=200_000,
        ),
        "1.5b": Suggestion(
            learning_rate=2e-4,
            global_batch_size=1024,
            micro_batch_size=4,
            max_samples=30_000_000,
            eval_every_samples=500_000,
        ),
    }
)
"""Settings to start from, by size."""


def gpt(
    *,
    data: str,
    size: str = "tiny",
    tokenizer: str | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
    width: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    positions: str | None = None,
    feed_forward: str | None = None,
    tied: bool | None = None,
    num_experts: int | None = None,
    top_k: int = 2,
    capacity_factor: float | None = None,
    local_blocks: int | None = None,
) -> Task:
    """Predict the next token.

    Token files are read where they lie, through a memory map. A folder may be nanoGPT's (`train.bin`, `val.bin`) or
    hold shards, of which those with `val` in their name are held out. Where nothing is held out by name, the end of all
    of them is: a twentieth of the tokens, at most 4 Mi. Text is read into memory by every replica.

    Args:
        data: a .bin file or a folder of them; or a text file or a folder of .txt files.
        size: shape of the model: tiny, 124m, 350m or 1.5b; the arguments below change single parts of it.
        tokenizer: file of a tokenizer of the package `tokenizers` (`tokenizer.json`), for text; bytes where not given.
        dtype: of raw .bin files, uint16 or uint32; uint16 where not given.
        vocab_size: number of token values. Bytes have 256, a tokenizer brings its own; .bin files do not say, and the
            default for them is GPT-2's, 50,304.
        context: tokens that are predicted in a sample.
        width: of the residual stream.
        depth: number of blocks.
        heads: number of attention heads.
        positions: rotary or learned.
        feed_forward: gelu, relu2 or swiglu.
        tied: one matrix for the embedding and the output.
        num_experts: of a mixture of experts in place of every feed-forward layer.
        top_k: experts per token, 1 or 2.
        capacity_factor: limits the tokens that an expert takes, see `ExpertsConfig`.
        local_blocks: parts of the model that are trained by losses of their own, without a backward pass between them.

    Returns:
        The task; a sample is a window of context + 1 tokens. Its loss is in nats per token; `perplexity`, or for bytes
        `bits_per_byte`, is among its figures.

    Raises:
        ConfigError: where the data cannot be read or an argument is out of bounds.
    """
    if size not in SIZES:
        raise ConfigError(f"gpt has the sizes {', '.join(SIZES)}, got {size!r}")
    path = Path(data).expanduser()
    text = None if _holds_tokens(path) else read_text(path, tokenizer=tokenizer)
    if text is None and tokenizer is not None:
        raise ConfigError(f"a tokenizer is for text, but {path} holds tokens already: leave it out")
    if text is not None and vocab_size is not None and vocab_size < text.vocab_size:
        raise ConfigError(f"vocab_size {vocab_size} is below the {text.vocab_size} values of the text's tokens")
    experts = None
    if num_experts is not None:
        experts = ExpertsConfig(num_experts=num_experts, top_k=top_k, capacity_factor=capacity_factor)
    shape: dict[str, object] = {
        "context": context,
        "width": width,
        "depth": depth,
        "heads": heads,
        "tied": tied,
        "experts": experts,
        "local_blocks": local_blocks,
    }
    shape |= {"positions": positions, "feed_forward": feed_forward}
    shape["vocab_size"] = vocab_size or (50304 if text is None else text.vocab_size)
    config = replace(SIZES[size], **{key: value for key, value in shape.items() if value is not None})  # type: ignore[arg-type]
    train, held_out = _token_windows(path, dtype, config=config) if text is None else _text_windows(text, config=config)
    if text is None:
        _check_tokens(train, held_out, path=path, vocab_size=vocab_size, largest=config.vocab_size)
    return language_task(
        f"gpt-{size}",
        Gpt(config),
        train=train,
        held_out=held_out.spread(max(1, _EVAL_TOKENS // config.context)),
        suggestion=SUGGESTIONS[size],
        is_bytes=text is not None and tokenizer is None,
    )


def language_task(
    name: str,
    model: nn.Module,
    *,
    train: TokenWindows,
    held_out: TokenWindows,
    suggestion: Suggestion,
    is_bytes: bool,
) -> Task:
    """Return the task of a model on windows of context + 1 tokens."""
    experts = model.config.experts if isinstance(model, Gpt) else None
    metrics: Mapping[str, Callable[[float], float]] = (
        {"bits_per_byte": nats_to_bits} if is_bytes else {"perplexity": perplexity}
    )
    return Task(
        name=name,
        model=model,
        train_data=train,
        eval_data=held_out,
        loss=partial(next_token_loss, balance_weight=0.0 if experts is None else experts.balance_weight),
        eval_metrics=metrics,
        suggestion=suggestion,
        tokens_per_sample=train.size - 1,
    )


def next_token_loss(model: nn.Module, windows: Tensor, *, balance_weight: float = 0.0) -> Loss:
    """Mean cross-entropy of the next token, in nats; windows are integers of shape (samples, context + 1).

    All windows are equally long, so the mean over tokens is the mean over samples of each one's mean over tokens. In
    training, the balance loss of experts is added, and both are parts beside the sum, with the shares of the samples
    and of the tokens that each expert processes. So are the losses of local blocks: the gradient of their sum is for
    each block that of its own. The held-out loss is that of the model's output alone.
    """
    windows = windows.long()
    found = model(windows[:, :-1])
    logits, routing, local_logits = found if isinstance(found, tuple) else Predictions(found)
    loss = _cross_entropy(logits, windows)
    if (routing is None and not local_logits) or not model.training:
        return loss
    local = {f"cross_entropy/local_blocks.{at}": _cross_entropy(own, windows) for at, own in enumerate(local_logits)}
    parts = {"loss": sum(local.values(), start=loss), "cross_entropy": loss, **local}
    if routing is not None:
        parts["loss"] = parts["loss"] + balance_weight * routing.balance
        parts["load_balancing"] = routing.balance
        parts |= {**_shares("routed_samples", routing.samples), **_shares("routed_tokens", routing.tokens)}
    return parts


def _cross_entropy(logits: Tensor, windows: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def _shares(name: str, shares: Tensor) -> dict[str, Tensor]:
    """Name the share of each expert, from shape (depth, num_experts), as `noise.groups=experts` names its group."""
    num_experts = shares.shape[1]
    groups = (f"blocks.{at // num_experts}.experts.{at % num_experts}" for at in range(shares.numel()))
    return {f"{name}/{group}": share for group, share in zip(groups, shares.flatten().unbind(), strict=True)}


def nats_to_bits(nats: float) -> float:
    """Convert a loss per byte."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """Convert a loss per token."""
    return math.exp(min(nats, 700.0))  # the largest double is e^709; a run that diverged must still end with a figure


def _holds_tokens(path: Path) -> bool:
    if not path.exists():
        raise ConfigError(f"there is no {path} to train on, as seen from {Path.cwd()}")
    return path.suffix == ".bin" if path.is_file() else any(path.glob("*.bin"))


def _token_windows(path: Path, dtype: str | None, *, config: GptConfig) -> tuple[TokenWindows, TokenWindows]:
    train, held_out = find_token_files(path, dtype=dtype)
    raw = next((file for file in (*train, *held_out) if not file.offset_bytes), None)
    if raw is not None and dtype is None and config.vocab_size > _MOST_UINT16:
        raise ConfigError(
            f"vocab_size {config.vocab_size} is more than uint16 holds, and {raw.path} does not say its type: "
            "give dtype uint32, or uint16 if that is what the file holds"
        )
    return _windows(list(train), list(held_out), config=config)


def _text_windows(text: Text, *, config: GptConfig) -> tuple[TokenWindows, TokenWindows]:
    return _windows(list(text.train), list(text.held_out), config=config)


def _windows(
    train: list[TokenFile | Tokens], held_out: list[TokenFile | Tokens], *, config: GptConfig
) -> tuple[TokenWindows, TokenWindows]:
    size = config.context + 1
    if not held_out:
        num_tokens = sum(len(part) for part in train if len(part) >= size)
        num_held_out = min(_LARGEST_HELD_OUT, num_tokens // _HELD_OUT_SHARE)
        train, held_out = split_off(train, num_tokens=max(size, num_held_out), shortest=size)
    # Windows overlap by one token, so that each token but a file's first is predicted once.
    return tuple(TokenWindows(part, size=size, stride=config.context) for part in (train, held_out))  # type: ignore[return-value]


def _check_tokens(*parts: TokenWindows, path: Path, vocab_size: int | None, largest: int) -> None:
    """Refuse tokens that the model has no row for: on a GPU they would end the run without a reason."""
    found = max(part.largest_token() for part in parts)
    if found >= largest:
        raise ConfigError(
            f"{path} holds the token {found}, but vocab_size is {largest}: give vocab_size of at least {found + 1}, or "
            f"the right dtype of the file (uint16 or uint32)"
        )
    if vocab_size is None and path.is_dir() and (path / "meta.pkl").exists():
        raise ConfigError(
            f"{path} has a meta.pkl, so its vocabulary is not GPT-2's: give vocab_size, which is at least {found + 1} "
            f"(the file is a pickle, and none is read)"
        )
