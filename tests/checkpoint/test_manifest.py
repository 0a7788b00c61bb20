"""The JSON of a checkpoint gives back what it was given, to the bit, and refuses whatever it did not write."""

from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dptrain.checkpoint.manifest import (
    FORMAT,
    MANIFEST,
    FileDigest,
    decode_manifest,
    decode_state,
    encode_manifest,
    encode_state,
)
from dptrain.errors import CheckpointError

ANY_BITS = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", struct.pack(">Q", bits))[0])
SPECIAL = st.sampled_from([math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 2.2250738585072009e-308, 0.1])
KEYS = st.text(max_size=8).filter(lambda key: not key.startswith("$"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_BITS | SPECIAL | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=12,
)
DIGESTS = {
    "model.safetensors": FileDigest(size_bytes=12, sha256="ab" * 32),
    "state.json": FileDigest(size_bytes=3, sha256="cd" * 32),
}


def bits(value):
    """Make two values equal exactly where they are the same type for type and bit for bit."""
    match value:
        case float():
            return ("float", struct.pack(">d", value))
        case dict():
            return ("dict", [(key, bits(item)) for key, item in value.items()])
        case list() | tuple():
            return (type(value).__name__, [bits(item) for item in value])
    return (type(value).__name__, value)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_state_round_trips_bit_for_bit(state):
    """NaN payloads, infinities, -0.0, subnormals, tuples and the order of keys all survive strict JSON."""
    content = encode_state(state)
    json.loads(content, parse_constant=pytest.fail)
    assert bits(decode_state(content)) == bits(state)
    assert encode_state(decode_state(content)) == content


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": [1, {2, 3}]}, "state['a'][1] is a set"),
        ({"a": {1: 2}}, "state['a'] is a dict"),
        ({"a": {"$tuple": 1}}, "state['a'] is a dict"),
        ({"a": b"x"}, "state['a'] is a bytes"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place(state, where):
    """A value that would come back as another is refused when it is saved, and the text says where it stands."""
    with pytest.raises(CheckpointError) as caught:
        encode_state(state)
    assert where in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b'{"a": {"$float64": "00"}}',
        b'{"a": {"$float64": 1}}',
        b'{"a": {"$tuple": 1}}',
        b"\xff",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_our_json_is_refused(content):
    """Whatever the bytes, only a CheckpointError comes out, for state and manifest alike."""
    with pytest.raises(CheckpointError):
        decode_state(content)
    with pytest.raises(CheckpointError):
        decode_manifest(content)


def test_a_manifest_comes_back_as_it_was():
    """Step and digests survive."""
    content = encode_manifest(step=7, written_by="1.2.3", digests=DIGESTS)
    assert decode_manifest(content) == (7, DIGESTS)


def test_every_flipped_bit_of_a_manifest_is_detected():
    """Not one bit of a manifest, its blanks and the writer's version included, can change unnoticed."""
    content = encode_manifest(step=7, written_by="1.2.3", digests=DIGESTS)
    for position in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(CheckpointError):
            decode_manifest(bytes(flipped))


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(bits(value), default=repr).encode()))
def test_noise_is_no_manifest(content):
    """No bytes but our own decode, and no other exception leaves."""
    with pytest.raises(CheckpointError):
        decode_manifest(content)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "..", ".", ".hidden", "", "a\n", "a\0", MANIFEST, "a" * 200]
)
def test_a_name_that_is_no_plain_basename_is_refused(name):
    """A manifest with a right checksum still cannot point outside its folder, nor at itself."""
    content = encode_manifest(
        step=7, written_by="1.2.3", digests={**DIGESTS, name: FileDigest(size_bytes=1, sha256="00")}
    )
    with pytest.raises(CheckpointError, match="not a plain file name"):
        decode_manifest(content)


def test_a_future_format_names_its_writer():
    """The reader of a newer format learns which dptrain wrote it, not that the file is damaged."""
    content = json.dumps({"format": FORMAT + 1, "dptrain": "9.0.0", "something": "new"}).encode()
    with pytest.raises(
        CheckpointError, match=r"written by dptrain '9\.0\.0' in format 2 .* use the dptrain that wrote it"
    ):
        decode_manifest(content)
