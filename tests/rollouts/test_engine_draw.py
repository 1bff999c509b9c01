"""Drawing from many columns: blocks first, then one block."""

import pytest
import torch

from lit_rlhf.rollouts.engines import draw as draw_module
from lit_rlhf.types import SamplingConfig


def first_above(weights, uniform):
    """The running sum over all columns, in double precision."""
    cumulative = weights.double().cumsum(-1)
    return torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)


@pytest.mark.parametrize("columns", [2048, 4096, 5000, 32_001])
def test_many_columns_are_drawn_from_as_by_one_running_sum(columns):
    torch.manual_seed(0)
    logits, uniform = 3 * torch.randn(300, columns), torch.rand(300, dtype=torch.float64)
    token, logprob = draw_module.draw(logits, uniform, SamplingConfig())
    assert torch.equal(token, first_above(logits.softmax(-1), uniform))
    expected = logits.double().log_softmax(-1).gather(1, token.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprob.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("columns", [3000, 4096])
def test_ends_and_gaps_of_many_columns(columns):
    """Three tokens are possible: the first, one amid a block, and the last, in a block that may be cut short."""
    possible = [0, 1500, columns - 1]
    logits = torch.full((1, columns), float("-inf"))
    logits[0, possible] = torch.tensor([1.0, 2.0, 1.0]).log()
    for uniform, expected in ((0, 0), (0.2499, 0), (0.2501, 1), (0.7499, 1), (0.7501, 2), (1 - 2**-52, 2)):
        token, logprob = draw_module.draw(logits, torch.tensor([float(uniform)]).double(), SamplingConfig())
        assert token.item() == possible[expected]
        assert logprob.exp().item() == pytest.approx([0.25, 0.5, 0.25][expected])


def test_many_equal_columns_are_drawn_evenly():
    uniform = (torch.arange(4096).double() + 0.5) / 4096
    token, _ = draw_module.draw(torch.zeros(4096, 4096), uniform, SamplingConfig())
    assert torch.equal(token, torch.arange(4096))


def test_many_columns_that_are_not_finite_show_in_the_logprobs():
    logits = torch.zeros(2, 3000)
    logits[0, 7] = float("nan")
    token, logprob = draw_module.draw(logits, torch.tensor([0.3, 0.3]).double(), SamplingConfig())
    assert ((token >= 0) & (token < 3000)).all()
    assert logprob.isnan().tolist() == [True, False]
