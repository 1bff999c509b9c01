import numpy as np
import pytest
import torch

from lit_rlhf.metrics import MaskedStats

NAN = float("nan")


def values(stats):
    return {name: value.item() for name, value in stats.compute().items()}


def test_names_and_their_order():
    stats = MaskedStats({"ratio": ("mean", "max", "min"), "entropy": ("value",), "advantage": ["mean", "std"]})
    stats.update(dict.fromkeys(("advantage", "ratio", "entropy"), (1.0, None)))
    assert list(stats.compute()) == [
        "ratio_mean",
        "ratio_max",
        "ratio_min",
        "entropy",
        "advantage_mean",
        "advantage_std",
    ]
    stats = MaskedStats(["a", "b"])
    stats.update({"b": (1.0, None), "a": (2.0, None)})
    assert list(stats.compute()) == ["a", "b"]


def test_every_statistic_over_batches_of_any_shape():
    stats = MaskedStats({"x": ("value", "mean", "std", "max", "min"), "other": ("mean",)})
    rng, seen = np.random.default_rng(0), []
    for shape in ((3, 4), (5, 2), (0, 4), (7,), ()):
        x, mask = rng.normal(size=shape) + 50, rng.random(shape) < 0.6
        seen.append(np.atleast_1d(x)[np.atleast_1d(mask)])
        x = np.where(mask, x, rng.choice([NAN, np.inf, -np.inf], size=shape))
        stats.update({"x": (torch.tensor(x), torch.tensor(mask))})
    seen = np.concatenate(seen)
    expected = {
        "x": seen.mean(),
        "x_mean": seen.mean(),
        "x_std": seen.std(ddof=1),
        "x_max": seen.max(),
        "x_min": seen.min(),
    }
    assert values(stats) == pytest.approx(expected, rel=1e-9)


def test_each_name_keeps_to_itself():
    stats = MaskedStats(["a", "b", "c"])
    stats.update({"c": (torch.tensor([1.0, 3.0]), None)})
    stats.update({"a": (4, None), "c": (torch.tensor([8.0]), None)})
    assert values(stats) == {"a": 4, "c": 4}  # nothing was counted of b


def test_negative_values_have_negative_extremes():
    stats = MaskedStats({"x": ("max", "min")})
    stats.update({"x": (torch.tensor([-3.0, -2.0, 7.0]), torch.tensor([True, True, False]))})
    assert values(stats) == {"x_max": -2, "x_min": -3}


def test_equal_values_have_a_deviation_of_exactly_zero():
    for value in (0.1, 1 / 3, 1e-3, 123.456, 1e6 / 7):  # some of whose sums are not exact
        stats = MaskedStats({"x": ("std",)})
        for n in (3, 4, 10):
            stats.update({"x": (torch.full((n,), value, dtype=torch.float64), None)})
        assert values(stats) == {"x_std": 0}
    one = MaskedStats({"x": ("std",)})
    one.update({"x": (5.0, None)})
    assert values(one) == {"x_std": 0}


def test_many_small_numbers_beside_a_large_one_are_not_lost():
    stats = MaskedStats({"x": ("mean",)})
    stats.update({"x": (2.0**26, None)})
    for _ in range(100):
        stats.update({"x": (torch.ones(1), None)})
    assert values(stats)["x_mean"] * 101 == 2**26 + 100


def test_integers_booleans_and_half_precision_count_as_numbers():
    stats = MaskedStats(["i", "b", "h"])
    stats.update(
        {
            "i": (torch.tensor([1, 2]), None),
            "b": (torch.tensor([True, False]), None),
            "h": (torch.full((3000,), 100.0, dtype=torch.float16), None),
        }
    )
    assert values(stats) == {"i": 1.5, "b": 0.5, "h": 100}


def test_a_nan_that_counts_shows():
    stats = MaskedStats({"x": ("mean", "std", "max")})
    stats.update({"x": (torch.tensor([1.0, NAN]), None)})
    assert all(np.isnan(v) for v in values(stats).values())


def test_reset_forgets():
    stats = MaskedStats({"x": ("mean", "max")})
    stats.update({"x": (9.0, None)})
    stats.reset()
    stats.update({"x": (1.0, None)})
    assert values(stats) == {"x_mean": 1, "x_max": 1}


def test_bad_names_are_named():
    with pytest.raises(ValueError, match="among value, mean, std, max, min, ess, ci, got median"):
        MaskedStats({"x": ("mean", "median")})
    with pytest.raises(ValueError, match="unknown name y: this metric knows x, z"):
        MaskedStats(["x", "z"]).update({"y": (1.0, None)})


def test_the_effective_share_is_of_raw_weights_over_all_batches():
    # C10: (.2 + 1 + 5)^2 / (3 (.04 + 1 + 25))
    stats = MaskedStats({"ess": ("ess",)})
    stats.update({"ess": (torch.tensor([0.2, NAN]), torch.tensor([True, False]))})
    stats.update({"ess": (torch.tensor([1.0, 5.0]), None)})
    assert values(stats) == {"ess": pytest.approx(0.4920635, abs=1e-7)}
    stats.reset()
    stats.update({"ess": (torch.full((7,), 3.0), None)})
    assert values(stats) == {"ess": pytest.approx(1)}
    stats.update({"ess": (torch.zeros(3), None)})
    assert values(stats)["ess"] == pytest.approx(0.7)
    stats.reset()
    stats.update({"ess": (torch.zeros(3), None)})
    assert values(stats) == {"ess": 0}


def test_names_that_come_later_are_logged_too():
    stats = MaskedStats({"a": ("mean", "max")})
    stats.update({"a": (torch.tensor([1.0, 3.0]), None)})
    stats.extend(["a", "mine", "yours"])
    stats.update({"yours": (torch.tensor([-5.0, -7.0]), None)})
    assert values(stats) == {"a_mean": 2, "a_max": 3, "yours": -6}
    stats.extend(["mine"])
    stats.update({"mine": (1.0, None), "a": (torch.tensor(8.0), None)})
    assert values(stats) == {"a_mean": 4, "a_max": 8, "mine": 1, "yours": -6}
    stats.reset()
    assert values(stats) == {}
    stats.update({"mine": (2.0, None), "a": (1.0, None)})
    assert values(stats) == {"a_mean": 1, "a_max": 1, "mine": 2}
    other = MaskedStats({"a": ("mean", "max")})
    other.extend(["mine", "yours"])
    for state in ("sums", "highs"):
        setattr(other, state, getattr(stats, state))
    assert values(other) == values(stats)
