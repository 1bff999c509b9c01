import pytest
import torch

from lit_rlhf.functional import overlong_penalty
from lit_rlhf.functional.shaping import terminal_rewards


def test_overlong_penalty():
    # C21
    got = overlong_penalty(torch.tensor([0, 79, 80, 81, 90, 99, 100, 101, 500]), 100, 20)
    assert got.tolist() == pytest.approx([0, 0, 0, -0.05, -0.5, -0.95, -1, -1, -1], abs=1e-7)
    assert got.is_floating_point()


def test_without_a_buffer_only_what_is_too_long_is_punished():
    assert overlong_penalty(torch.tensor([99, 100, 101]), 100, 0).tolist() == [0, 0, -1]


@pytest.mark.parametrize("buffer", [-1, 101])
def test_a_buffer_that_does_not_fit_is_named(buffer):
    with pytest.raises(ValueError, match=rf"between 0 and max_length \(100\), got {buffer}"):
        overlong_penalty(torch.tensor([1]), 100, buffer)


def test_terminal_rewards_land_on_the_last_valid_token():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    expected = [[0, 0, 5.0, 0], [0, 0, 0, 6.0], [0, 0, 0, 0], [8.0, 0, 0, 0]]
    assert terminal_rewards(torch.tensor([5.0, 6.0, 7.0, 8.0]), mask).tolist() == expected


def test_terminal_rewards_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3, 4\)"):
        terminal_rewards(torch.zeros(2), torch.ones(3, 4, dtype=torch.bool))
