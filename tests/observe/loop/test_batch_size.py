"""The batch size is read off inputs that leave no doubt; others are refused with the remedy."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dptrain.errors import ObservationError
from dptrain.observe.loop.batch_size import batch_size, output_is_in_doubt, refuse_second_dimension

IMAGE = torch.ones(3, 4, 4)


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    name: str = "a batch"


@pytest.mark.parametrize(
    "argument",
    [
        [{"image": IMAGE, "id": 1} for _ in range(8)],
        tuple({"image": [IMAGE]} for _ in range(8)),
        dict.fromkeys(range(8), IMAGE),
        deque([IMAGE] * 8),
        {"images": [IMAGE] * 8},
        SimpleNamespace(images=[IMAGE] * 8),
    ],
    ids=["list of dicts", "tuple of nested dicts", "dict by number", "deque", "list in a dict", "list in a namespace"],
)
def test_collections_of_samples_are_refused(argument):
    """Eight images of three colours are eight samples, which no first dimension says."""
    with pytest.raises(ObservationError, match="micro_batch_size="):
        batch_size(None, (argument,), {})


@pytest.mark.parametrize("record", [Batch(torch.ones(5, 2)), SimpleNamespace(x=torch.ones(5, 2))])
def test_records_of_one_batch_are_looked_into(record):
    """A data class and a namespace count by their tensors, and disagree with others as plain arguments do."""
    assert batch_size(None, (record,), {}) == 5
    with pytest.raises(ObservationError, match="ambiguous"):
        batch_size(None, (record, torch.ones(1)), {})


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_count_their_parts(layout):
    """In either layout the number of ragged rows."""
    rows = [torch.ones(n, 2) for n in (1, 3, 2)]
    assert batch_size(None, (torch.nested.nested_tensor(rows, layout=layout),), {}) == 3


def test_a_function_counts_what_no_dimension_says():
    """Its result may be a tensor of the host."""
    assert batch_size(len, ([IMAGE] * 8,), {}) == 8
    assert batch_size(lambda x: torch.tensor(len(x)), ([IMAGE] * 7,), {}) == 7
    assert batch_size(6, (nn.Identity(),), {}) == 6


NODES = (torch.ones(12, 6), torch.arange(4).repeat_interleave(3))
TOKENS = torch.ones(8, 16, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "output"),
    [
        (NODES, torch.ones(4, 1)),
        ((torch.ones(8, 6),), torch.ones(4, 1)),
        ((torch.ones(6),), torch.ones(1)),
        ((torch.ones(6),), torch.ones(())),
        ((torch.ones(3, 8, 8),), torch.ones(10)),
        ((torch.ones(5, dtype=torch.long),), torch.ones(1)),
        ((torch.ones(6, 4),), torch.ones(1, 4)),
        ((torch.ones(6, 4),), torch.ones(10, 4)),
    ],
    ids=[
        "nodes to graphs",
        "views to pairs",
        "one vector",
        "loss of one vector",
        "one image",
        "one text",
        "features first",
        "features first, more of them",
    ],
)
def test_an_output_with_other_rows_leaves_the_batch_in_doubt(inputs, output):
    """The inputs agree on a first dimension, and yet it is not the batch."""
    assert output_is_in_doubt(inputs, {}, [output], num_samples=batch_size(None, inputs, {}))


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ((torch.ones(8, 6),), [torch.ones(8, 1)]),
        ((torch.ones(8, 6), torch.ones(8, 1)), [torch.ones(())]),
        ((torch.ones(8, 6), torch.ones(8, 1)), [torch.ones(1)]),
        ((TOKENS,), [torch.ones(128, 50)]),
        ((TOKENS,), [torch.ones(19, 50)]),
        ((TOKENS,), [torch.ones(()), torch.ones(4)]),
        ((TOKENS,), [torch.ones(4, 2), torch.ones(8, 16, 50)]),
        ((torch.ones(8, 3, 6),), [torch.ones(24)]),
        ((torch.ones(8),), [torch.ones(8)]),
        ((torch.ones(8, dtype=torch.long), torch.ones(8)), [torch.ones(())]),
        ((TOKENS,), []),
    ],
    ids=[
        "as many",
        "a loss",
        "a loss of one element",
        "all tokens",
        "masked tokens",
        "a loss and the load of experts",
        "a memory and the batch",
        "crops",
        "scalars",
        "ratings",
        "none",
    ],
)
def test_an_output_that_agrees_leaves_no_doubt(inputs, outputs):
    """Losses, tokens and statistics say nothing against the batch."""
    assert not output_is_in_doubt(inputs, {}, outputs, num_samples=batch_size(None, inputs, {}))


def test_inputs_that_name_the_batch_are_believed():
    """Of a transformers model the batch is known, however few rows come out."""
    assert not output_is_in_doubt((), {"input_ids": TOKENS}, [torch.ones(3)], num_samples=8)


FLAT, ENDS = torch.ones(1, 9, dtype=torch.long), torch.tensor([0, 4, 6, 9], dtype=torch.int32)
ANEW = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])


@pytest.mark.parametrize(
    ("inputs", "samples"),
    [
        ({"input_ids": FLAT, "cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}, 3),
        ({"input_ids": FLAT, "position_ids": ANEW}, 3),
        ({"input_ids": FLAT, "position_ids": ANEW + 2}, 3),
        ({"inputs_embeds": torch.ones(1, 9, 4), "position_ids": ANEW.expand(3, 1, 9)}, 3),
        ({"input_ids": FLAT, "seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2]])}, 3),
        ({"input_ids": FLAT.expand(2, 9), "position_ids": ANEW.expand(2, 9)}, 6),
        ({"input_ids": FLAT.expand(2, 9), "position_ids": ANEW}, 6),
        ({"input_ids": FLAT, "position_ids": torch.tensor([[5, 6, 7, 0, 1, 2, 3, 0, 1]])}, 3),
        ({"input_ids": FLAT, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 0, 0]])}, 2),
        ({"input_ids": FLAT, "cu_seq_lens_q": torch.tensor([0, 4, 6, 7, 8, 9])}, 2),
        ({"input_ids": FLAT.expand(2, 9), "position_ids": torch.arange(9)[None]}, 2),
        ({"input_ids": FLAT.expand(2, 9), "position_ids": torch.arange(9)}, 2),
        ({"input_ids": FLAT.expand(2, 9), "position_ids": torch.zeros(2, 9)}, 2),
        ({"input_ids": FLAT, "position_ids": torch.tensor([[0, 1, 2, 2, 2, 2, 3, 4, 5]])}, 1),
        ({"input_ids": FLAT, "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5, 6]]), "attention_mask": FLAT}, 1),
    ],
    ids=[
        "ends",
        "positions",
        "positions from two on",
        "positions on three axes",
        "numbers",
        "two packed rows",
        "positions for all rows",
        "a sequence goes on from the row before",
        "padded positions",
        "padded ends",
        "one row of positions",
        "positions without rows",
        "no positions",
        "an image at one position",
        "padding on the left, with its mask",
    ],
)
def test_packed_sequences_are_counted(inputs, samples):
    """Whatever keeps the sequences of a row apart counts them, padding excepted; other positions leave a row one."""
    assert batch_size(None, (), inputs) == samples
    positional = {key: value for key, value in inputs.items() if key not in ("input_ids", "inputs_embeds")}
    if samples > 2 and "cu_seq_lens_q" not in inputs:
        assert batch_size(None, (next(iter(inputs.values())),), positional) == samples


def test_packed_sequences_speak_for_themselves():
    """An output by tokens begins with the second dimension of the inputs, or with one row: neither is in doubt."""
    packed = {"position_ids": ANEW}
    refuse_second_dimension((FLAT,), packed, [torch.ones(9, 5)], num_samples=3)
    assert not output_is_in_doubt((FLAT,), packed, [torch.ones(1, 9, 5)], num_samples=3)


def test_the_remedy_is_that_of_the_caller():
    """A monitor of a framework has another argument than `attach`."""
    with pytest.raises(ObservationError, match=r"dimensions .* ambiguous: give a number$"):
        batch_size(None, (torch.ones(3), torch.ones(4)), {}, remedy="give a number")
