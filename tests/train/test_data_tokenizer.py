"""The byte tokenizer: every text comes back, ids stay in the vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.train.data.tokenizer import ByteTokenizer, Tokenizer


@given(st.binary(max_size=300))
def test_bytes_come_back_from_their_ids(text: bytes) -> None:
    tokenizer: Tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert len(ids) == len(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


def test_strings_are_encoded_as_utf_8() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve Größe 語")).decode() == "naïve Größe 語"


def test_end_of_document_and_padding_stand_for_no_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode(np.array([104, 105, tokenizer.eos_id, tokenizer.pad_id])) == b"hi"


@pytest.mark.parametrize("ids", [[-1], [258], [5, 1000]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="258"):
        ByteTokenizer().decode(np.array(ids))
