"""Token files: every token once, in order, without a copy of the file, and at the speed of nanoGPT's loader."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest
import torch

from dptrain.data import token_files
from dptrain.data.token_files import TokenWindows, find_token_files, split_off, token_file
from dptrain.errors import ConfigError


def write(path, tokens, dtype="uint16", header=None):
    head = b"" if header is None else np.array([header, 1] + [0] * 254, dtype="<i4").tobytes()
    path.write_bytes(head + np.asarray(tokens, dtype=dtype).tobytes())
    return path


def test_windows_hold_every_token_once_as_a_target(tmp_path):
    """Windows of 5 tokens, 4 apart: their last four tokens, one after the other, are the file without its first."""
    files = [token_file(write(tmp_path / "a.bin", range(1000, 1021)))]
    windows = TokenWindows(files, size=5, stride=4)
    assert len(windows) == 5
    assert torch.cat([window[1:] for window in windows]).tolist() == list(range(1001, 1021))


def test_no_window_reaches_from_one_file_into_the_next(tmp_path):
    """Shards of 7, 3 and 8 tokens hold one, none and two windows of 4."""
    for name, tokens in (("a", range(7)), ("b", range(100, 103)), ("c", range(200, 208))):
        write(tmp_path / f"{name}.bin", tokens)
    windows = TokenWindows(find_token_files(tmp_path)[0], size=4)
    found = windows.read_batch(np.arange(len(windows)))
    assert found.tolist() == [[0, 1, 2, 3], [200, 201, 202, 203], [204, 205, 206, 207]]


@pytest.mark.parametrize(("header", "dtype"), [(20240520, "uint16"), (20240801, "uint32")])
def test_a_header_says_what_the_tokens_are(tmp_path, header, dtype):
    """The header of llm.c's tools is left out, and its number decides between uint16 and uint32."""
    file = token_file(write(tmp_path / "a.bin", [7, 8, 9, 60000], dtype=dtype, header=header))
    assert (file.dtype, len(file)) == (dtype, 4)
    assert TokenWindows([file], size=4)[0].tolist() == [7, 8, 9, 60000]
    other = "uint32" if dtype == "uint16" else "uint16"
    with pytest.raises(ConfigError, match=f"says {dtype}, but dtype is {other}"):
        token_file(file.path, dtype=other)


@pytest.mark.parametrize("vocab_size", [256, 50_257, 128_256])
def test_raw_uint32_tokens_without_a_type_are_refused(tmp_path, vocab_size):
    """Each would be read as two, every second of them 0 or 1; the type, if it is given, is believed."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=5_000)
    file = write(tmp_path / "a.bin", tokens, dtype="uint32")
    with pytest.raises(ConfigError, match=r"look like uint32.*: give dtype uint32, or uint16 if"):
        token_file(file)
    assert token_file(file, dtype="uint32").open().tolist() == tokens.tolist()
    assert len(token_file(file, dtype="uint16")) == 10_000


@pytest.mark.parametrize("vocab_size", [4, 8, 96, 50_257])
def test_raw_uint16_tokens_are_read_as_such(tmp_path, vocab_size):
    """Of a vocabulary as small as that of bases, too."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=5_000)
    assert token_file(write(tmp_path / "a.bin", tokens)).open().tolist() == tokens.tolist()


def test_a_batch_is_its_windows(tmp_path):
    """Read at once or one by one, in any order, also beyond the number of files that stay open."""
    for shard in range(5):
        write(tmp_path / f"{shard}.bin", range(shard * 100, shard * 100 + 40))
    windows = TokenWindows(find_token_files(tmp_path)[0], size=8, every=2)
    order = np.random.default_rng(0).permutation(len(windows))
    expected = torch.stack([windows[int(index)] for index in order])
    assert torch.equal(windows.read_batch(order), expected)
    assert torch.equal(torch.stack(windows.__getitems__(order.tolist())), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_files, "_MAX_OPEN_FILES", 2)
        assert torch.equal(TokenWindows(find_token_files(tmp_path)[0], size=8, every=2).read_batch(order), expected)


def test_a_loading_process_gets_no_copy_of_the_file(tmp_path):
    """Pickled after reading, windows of a file of 2 MB take less than 10 kB and read the same."""
    windows = TokenWindows([token_file(write(tmp_path / "a.bin", np.arange(1_000_000) % 60000))], size=64)
    before = windows[77]
    packed = pickle.dumps(windows)
    assert len(packed) < 10_000
    assert torch.equal(pickle.loads(packed)[77], before)  # noqa: S301 - made above


def test_held_out_files_are_those_with_val_in_their_name(tmp_path):
    """NanoGPT's folder, and shards by name."""
    for name in ("train", "val", "shard_train_01", "shard_val_00"):
        write(tmp_path / f"{name}.bin", range(8))
    train, held_out = find_token_files(tmp_path)
    assert [file.path.stem for file in train] == ["shard_train_01", "train"]
    assert [file.path.stem for file in held_out] == ["shard_val_00", "val"]


@pytest.mark.parametrize("from_file", [True, False])
def test_the_end_of_the_last_source_can_be_held_out(tmp_path, from_file):
    """What is split off and what stays are together the whole, in order."""
    source = token_file(write(tmp_path / "a.bin", range(10))) if from_file else np.arange(10, dtype=np.uint16)
    train, held_out = split_off([source], num_tokens=4)
    assert TokenWindows(train, size=6)[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert TokenWindows(held_out, size=4)[0].tolist() == [6, 7, 8, 9]
    with pytest.raises(ConfigError, match="10 tokens cannot be held out of the 10"):
        split_off([source], num_tokens=10)


def test_the_largest_token_of_a_small_file_is_exact(tmp_path):
    """A token that has no row in the model is found wherever it stands."""
    tokens = np.zeros(3_000_000, dtype=np.uint16)
    tokens[1_234_567] = 50256
    assert TokenWindows([token_file(write(tmp_path / "a.bin", tokens))], size=8).largest_token() == 50256


def test_files_that_are_no_tokens_are_refused(tmp_path):
    """Half a token, an empty folder, a text too short: one sentence each."""
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(ConfigError, match="3 bytes, no whole number of uint16 tokens"):
        token_file(tmp_path / "a.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no token file to train on"):
        find_token_files(tmp_path / "empty")
    with pytest.raises(ConfigError, match="4 tokens are too few for one window of 5"):
        TokenWindows([np.arange(4, dtype=np.uint16)], size=5)
    with pytest.raises(ConfigError, match="cannot be read"):
        token_file(tmp_path / "missing.bin")


def nanogpt_batch(path, *, batch_size, block_size):
    """What nanoGPT does for a batch: a new map, and one copy for inputs and one for targets of each sample."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - block_size, (batch_size,))
    inputs = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in starts])
    targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in starts])
    return inputs, targets


def test_reading_costs_no_more_than_nanogpts_loader(tmp_path):
    """A micro-batch of 12 × 1,025 tokens takes at most 1.5 × the time of nanoGPT's batch, best of 60."""
    path = write(tmp_path / "train.bin", np.arange(2_000_000) % 50257)
    windows = TokenWindows([token_file(path)], size=1025, stride=1024)
    random = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(60):
        began = time.process_time()
        windows.read_batch(random.integers(0, len(windows), 12))
        ours.append(time.process_time() - began)
        began = time.process_time()
        nanogpt_batch(path, batch_size=12, block_size=1024)
        theirs.append(time.process_time() - began)
    assert min(ours) <= 1.5 * min(theirs)
