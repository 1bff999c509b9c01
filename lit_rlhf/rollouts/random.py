"""Random numbers that are a function of what they are for, not of when they are drawn.

A rollout's number `u[g, t]` depends on the prompt's seed, the sample `g` and the step `t` only. The
batch it is drawn in, the order of the prompts, rows that end early, the number of ranks, `group_size`
and `max_new_tokens` change nothing. `torch.Generator` would not do: on the CPU it keeps 32 bits of its
seed, so that two prompts in a hundred thousand share their numbers.

The mixing function is the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014); a row's numbers are a SplitMix64 stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GAMMA, _MUL_1, _MUL_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS_64 = (1 << 64) - 1


def mix_seed(*values: int) -> int:
    """Mix integers into one seed in `[0, 2**63)`; the order counts, and neighbours give unrelated seeds.

    >>> mix_seed(7, 0), mix_seed(7, 1)
    (4524403860604507531, 444632489918090439)
    """
    state = 0
    for value in values:
        state = _finalise((state + _GAMMA & _BITS_64) ^ (value & _BITS_64))
    return state >> 1


def uniforms(seeds: Sequence[int], group_size: int, steps: int) -> Tensor:
    """Uniform numbers for sampling: float64 `[B * G, T]` in `[0, 1 - 2**-52]`, rows prompt by prompt.

    Args:
        seeds: B seeds, one per prompt.
        group_size: G, samples per prompt. Rows of a smaller group are the first rows of a larger one.
        steps: T. Columns of fewer steps are the first columns of more.
    """
    rows = [mix_seed(seed, sample) for seed in seeds for sample in range(group_size)]
    counter = torch.arange(1, steps + 1) * _signed(_GAMMA)
    bits = _finalise_tensor(torch.tensor(rows, dtype=torch.long).unsqueeze(1) + counter)
    return _shift(bits, 12).double() * 2.0**-52


def permutation(count: int, *seed: int) -> Tensor:
    """A random order of `count` rows that depends on the seed integers alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(*seed)))


def _finalise(z: int) -> int:
    z = (z ^ z >> 30) * _MUL_1 & _BITS_64
    z = (z ^ z >> 27) * _MUL_2 & _BITS_64
    return z ^ z >> 31


def _finalise_tensor(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MUL_1)
    z = (z ^ _shift(z, 27)) * _signed(_MUL_2)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right without the sign: int64 holds the 64 bits of an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
