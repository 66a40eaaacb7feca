"""Equal keys for equal KV, different keys for everything else."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specbackend.radix.keys import Layout, checksum, fingerprint

TOKENS = st.lists(st.integers(0, 3), max_size=14)
LAYOUT = Layout(b"a model", bytes_per_token=8, block_tokens=3, successor=False)


@given(first=TOKENS, second=TOKENS, successor=st.booleans())
def test_keys_are_equal_as_far_as_the_texts_are(first, second, successor):
    layout = replace(LAYOUT, successor=successor)
    pairs = list(zip(layout.token_keys(first), layout.token_keys(second), strict=False))
    for block, (mine, theirs) in enumerate(pairs):
        end = 3 * (block + 1) + successor
        assert (mine == theirs) == (first[:end] == second[:end])
    assert len(layout.token_keys(first)) == max(len(first) - successor, 0) // 3


def test_longer_texts_have_the_keys_of_their_starts():
    assert LAYOUT.keys(range(20))[:4] == LAYOUT.keys(range(12))


@pytest.mark.parametrize(
    "other",
    [
        replace(LAYOUT, fingerprint=b"another"),
        replace(LAYOUT, bytes_per_token=16),
        replace(LAYOUT, successor=True),
    ],
    ids=["fingerprint", "bytes", "successor"],
)
def test_other_models_have_other_keys(other):
    assert not set(LAYOUT.token_keys(range(12))) & set(other.token_keys(range(12)))


def test_salts_have_keys_of_their_own():
    salted = [set(LAYOUT.keys(range(12), salt)) for salt in (None, "", "a", "b", "ab")]
    assert len(set.union(*salted)) == sum(map(len, salted))


def test_a_salt_cannot_pass_for_a_part_of_another_layout():
    """The origin of the chain is unambiguous: nothing moves between its parts."""
    assert LAYOUT.keys(range(9), "x")[0] != replace(LAYOUT, fingerprint=b"a modelx").keys(range(9))[0]


def test_checksums_belong_to_a_place():
    assert checksum(b"a" * 16, b"payload") != checksum(b"b" * 16, b"payload")
    assert checksum(b"a" * 16, b"payload") != checksum(b"a" * 16, b"pazload")


def test_fingerprint_of_files_and_facts(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint([tmp_path], dtype="float32")
    assert first == fingerprint([tmp_path], dtype="float32")
    assert first != fingerprint([tmp_path], dtype="bfloat16")
    assert first != fingerprint([], dtype="float32")
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    assert first != fingerprint([tmp_path], dtype="float32")
