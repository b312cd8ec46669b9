# SPDX-License-Identifier: Apache-2.0
"""A tiny model to measure."""

from __future__ import annotations

import pytest

from tests.unit.byte_tokenizer import byte_tokenizer
from tests.unit.tiny_llama import tiny_llama


@pytest.fixture(scope="package")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights that reads bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(vocab_size=257).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
