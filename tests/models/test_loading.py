"""Loading models and tokenizers, and the sentence each that cannot be used gets."""

import pytest
from torch import nn
from transformers import Gemma3Config

from lit_rlhf.models.loading import max_positions
from tests.helpers import tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_longest_sequence_is_read_off_the_configuration(kind):
    assert max_positions(tiny_model(kind)) == 128
    assert max_positions(nn.Linear(1, 1)) is None


def test_the_longest_sequence_of_a_model_that_also_sees_is_that_of_its_text():
    model = nn.Module()
    model.config = Gemma3Config(text_config={"max_position_embeddings": 77})
    assert max_positions(model) == 77
