"""What an error quotes stays within its sentence, whatever was given."""

from __future__ import annotations

import torch
from torch import nn

from dptrain.error_text import shown


def test_a_long_value_is_cut_and_a_tall_one_named_by_its_type():
    """A text is shown as Python writes it up to 80 characters; a module or a matrix would take several lines."""
    assert shown(["x"]) == "['x']"
    assert shown("two\nlines") == r"'two\nlines'"
    assert len(shown("x" * 5000)) == 80
    assert shown(nn.Sequential(nn.Linear(2, 2))) == "a Sequential"
    assert shown(torch.eye(2)) == "a Tensor"
    assert shown(10**5000) == "a number with thousands of digits"
