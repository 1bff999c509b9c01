import pytest
import torch

from lit_rlhf.rollouts import random
from lit_rlhf.rollouts.random import mix_seed, uniforms

GAMMA = 0x9E3779B97F4A7C15
# The first numbers of the published SplitMix64 generator seeded with 1234567.
SPLITMIX64 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def test_the_mixing_function_is_splitmix64():
    states = [(1234567 + (k + 1) * GAMMA) % 2**64 for k in range(5)]
    assert [random._finalise(state) for state in states] == SPLITMIX64
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    assert [value % 2**64 for value in random._finalise_tensor(signed).tolist()] == SPLITMIX64


def test_mixed_seeds_fit_and_do_not_collide():
    seeds = [mix_seed(seed, i) for seed in range(-50, 50) for i in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_order_and_number_of_values_count():
    assert len({mix_seed(), mix_seed(0), mix_seed(0, 0), mix_seed(1, 2), mix_seed(2, 1), mix_seed(2**64 - 5)}) == 6


def test_neighbouring_seeds_differ_in_half_of_the_bits():
    flipped = [(mix_seed(i) ^ mix_seed(i + 1)).bit_count() for i in range(2000)]
    assert sum(flipped) / len(flipped) == pytest.approx(63 / 2, abs=0.4)  # standard error 0.09


def test_uniforms_stay_below_one_and_are_uniform():
    u = uniforms(range(200), group_size=10, steps=100)
    assert u.shape == (2000, 100)
    assert u.dtype == torch.float64
    assert u.min() >= 0
    assert u.max() <= 1 - 2**-52
    counts = torch.histc(u, bins=100, min=0, max=1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 99 + 4 * (2 * 99) ** 0.5


@pytest.mark.parametrize("axis", ["steps", "samples", "prompts"])
def test_neighbours_are_independent(axis):
    u = uniforms(range(100), group_size=20, steps=50).view(100, 20, 50)
    dim = {"prompts": 0, "samples": 1, "steps": 2}[axis]
    first, second = u.narrow(dim, 0, u.shape[dim] - 1).flatten(), u.narrow(dim, 1, u.shape[dim] - 1).flatten()
    cells = torch.bincount((first * 10).long() * 10 + (second * 10).long(), minlength=100).double()
    expected = len(first) / 100
    assert ((cells - expected) ** 2 / expected).sum() < 99 + 4 * (2 * 99) ** 0.5


def test_more_samples_and_more_steps_keep_the_earlier_numbers():
    small, large = uniforms([3, 2**70, -1], 2, 5), uniforms([3, 2**70, -1], 4, 9)
    assert torch.equal(small.view(3, 2, 5), large.view(3, 4, 9)[:, :2, :5])
    assert torch.equal(uniforms([-1, 3], 2, 5).view(2, 2, 5), small.view(3, 2, 5)[[2, 0]])
