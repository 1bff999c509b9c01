"""Counts by bins are numpy's, of any batches, and wait for no device."""

import numpy as np
import pytest
import torch

from lit_rlhf.errors import InputError
from lit_rlhf.metrics import Histogram

NAN = float("nan")


def test_counts_are_numpys_over_batches_of_any_shape():
    histogram, seen = Histogram(-1.0, 2.0, bins=7), []
    rng = np.random.default_rng(0)
    for shape in ((3, 40), (5, 2), (0, 4), (70,)):
        x, mask = 2 * rng.normal(size=shape), rng.random(shape) < 0.6
        seen.append(x[mask])
        odd = np.where(mask, x, rng.choice([NAN, np.inf, -np.inf, 0.5], size=shape))
        histogram.update(torch.tensor(odd), torch.tensor(mask))
    counts, edges = histogram.compute()
    expected, expected_edges = np.histogram(np.concatenate(seen).clip(-1, 2), bins=7, range=(-1, 2))
    assert counts.tolist() == expected.tolist()
    assert expected[0] > 10
    assert expected[-1] > 10, "nothing lies beyond"
    np.testing.assert_allclose(edges, expected_edges, rtol=1e-12)


def test_what_is_not_finite_counts_nowhere():
    histogram = Histogram(0.0, 1.0, bins=2)
    histogram.update(torch.tensor([NAN, float("inf"), 0.7]), torch.ones(3, dtype=torch.bool))
    assert histogram.compute()[0].tolist() == [0, 1]


def test_counts_stay_exact_in_a_module_of_half_precision():
    module = torch.nn.Module()
    module.histogram = Histogram(0.0, 1.0, bins=2)
    module.to(torch.bfloat16)
    for _ in range(3):
        module.histogram.update(torch.zeros(333, dtype=torch.bfloat16), torch.ones(333))
    assert module.histogram.compute()[0].tolist() == [999, 0]


@pytest.mark.parametrize(("low", "high", "bins"), [(1.0, 1.0, 3), (2.0, 1.0, 3), (0.0, 1.0, 0)])
def test_bins_that_are_none(low, high, bins):
    with pytest.raises(InputError, match="needs low < high and at least one bin"):
        Histogram(low, high, bins)
