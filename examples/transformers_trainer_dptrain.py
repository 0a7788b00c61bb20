"""The training of `transformers_trainer.py` with a batch that follows the noise scale."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from dptrain.integrations.transformers import BatchAdapterMixin

vocabulary, length = 32, 16


class Sentences(Dataset):
    """Each token is the one before plus 1, 2 or 3; each sentence ends at a place of its own."""

    def __len__(self) -> int:
        return 512

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, 4, (length,), generator=draw).cumsum(0) % vocabulary
        end = torch.randint(4, length + 1, (), generator=draw)
        return {"input_ids": tokens, "labels": tokens.where(torch.arange(length) < end, -100)}


class AdaptiveTrainer(BatchAdapterMixin, Trainer):
    """The Trainer, with the batch in dptrain's hands; to measure alone, NoiseScaleMonitor is enough."""


set_seed(0)
sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": length, "vocab_size": vocabulary}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
args = TrainingArguments(
    output_dir="runs/transformers",
    use_cpu=True,
    per_device_train_batch_size=4,
    num_train_epochs=1,
    learning_rate=1e-2,
    logging_steps=10,
    save_strategy="no",
    disable_tqdm=True,
)
trainer = AdaptiveTrainer(model=model, args=args, train_dataset=Sentences())
trainer.train()
