import numpy as np
import pytest
import torch

from lit_rlhf.functional import aggregate, aggregation_unit

NAN = float("nan")
LOSS = torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]])
MASK = torch.tensor([[True, True, True], [True, False, False]])
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def by_hand(loss, mask, mode, max_length):
    rows = [[float(loss[i, t]) for t in range(len(loss[i])) if mask[i, t]] for i in range(len(loss))]
    rows = [row for row in rows if row]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    divisor = {"seq-mean-token-mean": len, "seq-mean-token-sum": lambda _: 1}.get(mode, lambda _: max_length)
    return sum(sum(row) / divisor(row) for row in rows) / len(rows)


@pytest.mark.parametrize(
    ("mode", "max_length", "expected"),
    [
        ("token-mean", None, 2.5),
        ("seq-mean-token-mean", None, 3),
        ("seq-mean-token-sum", None, 5),
        ("seq-mean-token-sum-norm", 4, 1.25),
        ("seq-mean-token-sum-norm", 8, 0.625),
    ],
)
def test_oracles(mode, max_length, expected):
    # C7
    assert aggregate(LOSS, MASK, mode, max_length).item() == pytest.approx(expected, abs=1e-6)
    wider = torch.cat([torch.full((2, 5), NAN), LOSS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.bool), MASK], 1)
    assert aggregate(wider, mask, mode, max_length).item() == pytest.approx(expected, abs=1e-6)


def test_default_is_token_mean():
    assert aggregate(LOSS, MASK).item() == 2.5


@pytest.mark.parametrize(("mode", "expected"), [("seq-mean-token-mean", 0), ("token-mean", -0.5), (MODES[3], -0.25)])
def test_on_policy_values_of_grpo(mode, expected):
    # C20: A = [1, -1], lengths [3, 1], loss -A per token
    loss = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 0.0, 0.0]])
    assert aggregate(loss, MASK, mode, 4).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_ragged_rows_with_an_empty_one(mode):
    rng = np.random.default_rng(0)
    loss, mask = rng.normal(size=(5, 6)), rng.random((5, 6)) < 0.6
    mask[2] = False
    expected = by_hand(loss, mask, mode, 11)
    loss[~mask] = np.inf
    x = torch.tensor(loss, requires_grad=True)
    value = aggregate(x, torch.tensor(mask), mode, 11)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert torch.isfinite(x.grad).all()
    assert (x.grad[~torch.tensor(mask)] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_parts_with_the_steps_count_add_up_to_the_whole(mode):
    # C28: uneven split, one part fully masked
    loss = torch.randn(7, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 0, 0, 4, 2, 3])[:, None]
    count = mask.sum() if aggregation_unit(mode) == "tokens" else (mask.sum(1) > 0).sum()
    parts = (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 7))
    whole = loss.clone().requires_grad_()
    split = loss.clone().requires_grad_()
    aggregate(whole, mask, mode, 9).backward()
    values = [aggregate(split[p], mask[p], mode, 9, denominator=count) for p in parts]
    sum(values).backward()
    assert sum(v.item() for v in values) == pytest.approx(aggregate(loss, mask, mode, 9).item(), rel=1e-12)
    torch.testing.assert_close(split.grad, whole.grad, rtol=0, atol=1e-15)


def test_ddp_and_accumulation_oracles():
    # C7: ranks [1, 2, 3] and [4] must return 3 and 2, whose mean is 2.5
    for rank, expected in ((0, 3.0), (1, 2.0)):
        part = aggregate(LOSS[rank : rank + 1], MASK[rank : rank + 1], denominator=torch.tensor(4.0)) * 2
        assert part.item() == pytest.approx(expected)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_valid_is_zero_and_keeps_the_graph(mode):
    x = torch.full((2, 3), NAN, requires_grad=True)
    value = aggregate(x, torch.zeros(2, 3, dtype=torch.bool), mode, 4)
    value.backward()
    assert value.item() == 0
    assert x.grad.tolist() == torch.zeros(2, 3).tolist()


def test_row_order_does_not_matter():
    x, mask, order = torch.randn(6, 4), torch.rand(6, 4) < 0.7, torch.randperm(6)
    for mode in MODES:
        torch.testing.assert_close(aggregate(x[order], mask[order], mode, 4), aggregate(x, mask, mode, 4))


def test_units():
    assert [aggregation_unit(mode) for mode in MODES] == ["tokens", "rows", "rows", "rows"]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="'seq-mean-token-sum-norm', got 'mean'"):
        aggregate(LOSS, MASK, "mean")
    with pytest.raises(ValueError, match="needs max_length"):
        aggregate(LOSS, MASK, "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match=r"\[N, T\], got shape \(3,\)"):
        aggregate(LOSS[0], MASK[0])
