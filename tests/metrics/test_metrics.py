"""Every metric the same way: against numpy on all valid cells at once, in uneven batches, and over two processes."""

import pickle
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torchmetrics import MetricCollection

from lit_rlhf.functional import explained_variance, generalized_advantage_estimation, group_normalize
from lit_rlhf.metrics import (
    ApproxKL,
    ClipFraction,
    ExplainedVariance,
    GeneralizedAdvantageEstimation,
    GroupNormalization,
    ImportanceRatio,
    KLDivergence,
    LengthStatistics,
    MaskedStats,
    PolicyEntropy,
    RewardStatistics,
)

NAN = float("nan")
N, T = 12, 6
MASK = torch.arange(T) < torch.tensor([6, 1, 3, 0, 0, 0, 5, 2, 6, 4, 0, 1])[:, None]
EMPTY = slice(3, 6)  # rows without a valid token
BATCHES = (slice(0, 1), EMPTY, slice(1, 3), slice(6, 12), slice(0, 0))


def cells(seed, scale=1.0):
    """`[N, T]` float32, NaN outside the mask."""
    x = torch.randn(N, T, generator=torch.Generator().manual_seed(seed)) * scale
    return torch.where(MASK, x, NAN)


LP, OLD, ADV, RETURNS = cells(0, 0.3) - 1, cells(1, 0.3) - 1, cells(2), cells(3) + 1000
VALUES = RETURNS + cells(4, 0.5)
IDS = torch.tensor([0, 8, 8, 3, 3, 3, 1, 5, 1, 5, 1, 5])  # no group is split by BATCHES
REWARDS = torch.tensor([1.0, 0.5, -2.0, NAN, NAN, NAN, 3.0, 1.0, 0.0, 1.0, 1.0, NAN])
TRUNCATED = MASK.sum(1) == T


def flat(x):
    return x[MASK].double().numpy()


def expected_approx_kl():
    d = flat(LP) - flat(OLD)
    return (np.exp(d) - 1 - d).mean()


def expected_kl():
    delta = flat(LP) - flat(OLD)
    return (np.exp(-delta) - 1 + delta).mean()


def expected_clip():
    ratio, a = np.exp(flat(LP) - flat(OLD)), flat(ADV)
    low, high = (ratio < 0.9) & (a < 0), (ratio > 1.3) & (a > 0)
    outside = (ratio < 0.9) | (ratio > 1.3)
    return {
        "clip_fraction": low.mean() + high.mean(),
        "clip_fraction_low": low.mean(),
        "clip_fraction_high": high.mean(),
        "ratio_out_of_range": outside.mean(),
    }


def expected_ratio():
    w = np.exp(flat(LP) - flat(OLD))
    return {
        "ratio_mean": w.mean(),
        "ratio_max": w.max(),
        "ratio_min": w.min(),
        "ess": w.sum() ** 2 / (len(w) * (w @ w)),
    }


def expected_rewards():
    r = REWARDS[~REWARDS.isnan()].double().numpy()
    return {"reward_mean": r.mean(), "reward_std": r.std(ddof=1), "reward_max": r.max(), "reward_min": r.min()}


def expected_lengths():
    lengths = MASK.sum(1).double().numpy()
    return {
        "response_length_mean": lengths.mean(),
        "response_length_max": lengths.max(),
        "truncated_fraction": TRUNCATED.double().mean().item(),
    }


def expected_gae():
    a = flat(generalized_advantage_estimation(ADV, LP, MASK, 0.9, 0.7)[0])
    return {"advantage_mean": a.mean(), "advantage_std": a.std(ddof=1)}


def expected_groups():
    a = group_normalize(REWARDS, IDS, "none")[~REWARDS.isnan()].double().numpy()
    return {"advantage_mean": a.mean(), "advantage_std": a.std(ddof=1)}


CASES = {
    "approx_kl": (ApproxKL, (LP, OLD, MASK), expected_approx_kl),
    "approx_kl_k1": (lambda: ApproxKL("k1"), (LP, OLD, MASK), lambda: (flat(OLD) - flat(LP)).mean()),
    "kl": (KLDivergence, (LP, OLD, MASK), expected_kl),
    "kl_k1": (lambda: KLDivergence("k1"), (LP, OLD, MASK), lambda: (flat(LP) - flat(OLD)).mean()),
    "clip": (lambda: ClipFraction(0.1, 0.3), (LP, OLD, ADV, MASK), expected_clip),
    "entropy": (PolicyEntropy, (ADV, MASK), lambda: flat(ADV).mean()),
    "ratio": (ImportanceRatio, (LP, OLD, MASK), expected_ratio),
    "explained_variance": (
        ExplainedVariance,
        (VALUES, RETURNS, MASK),
        lambda: 1 - np.var(flat(RETURNS) - flat(VALUES)) / np.var(flat(RETURNS)),
    ),
    "rewards": (RewardStatistics, (REWARDS,), expected_rewards),
    "lengths": (LengthStatistics, (MASK.sum(1), TRUNCATED), expected_lengths),
    "gae": (lambda: GeneralizedAdvantageEstimation(0.9, 0.7), (ADV, LP, MASK), expected_gae),
    "groups": (lambda: GroupNormalization("none"), (REWARDS, IDS), expected_groups),
}


def plain(result):
    return {k: v.item() for k, v in result.items()} if isinstance(result, dict) else {"": result.item()}


def near(expected):
    return pytest.approx(expected if isinstance(expected, dict) else {"": expected}, rel=1e-5, abs=1e-7)


@pytest.fixture(params=CASES)
def case(request):
    make, inputs, expected = CASES[request.param]
    return make(), inputs, expected()


def test_all_at_once(case):
    metric, inputs, expected = case
    metric.update(*inputs)
    assert plain(metric.compute()) == near(expected)


def test_uneven_and_empty_batches_give_the_same(case):
    metric, inputs, _ = case
    metric.update(*inputs)
    whole = plain(metric.compute())
    metric.reset()
    for rows in BATCHES:
        metric.update(*(x[rows] for x in inputs))
    assert plain(metric.compute()) == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_nothing_counted_is_zero(case):
    metric, inputs, _ = case
    metric.update(*(x[:0] for x in inputs))
    assert set(plain(metric.compute()).values()) == {0.0}


def test_forward_accumulates_like_update(case):
    metric, inputs, expected = case
    for rows in (slice(0, 6), slice(6, 12)):
        metric(*(x[rows] for x in inputs))
    assert plain(metric.compute()) == near(expected)


def test_pickle_clone_cast_and_empty_state_dict(case):
    metric, inputs, _ = case
    metric.update(*(x[:6] for x in inputs))
    copies = [pickle.loads(pickle.dumps(metric)), metric.clone()]
    holder = torch.nn.ModuleList([metric.clone()]).half().to(torch.bfloat16).float()
    copies += list(holder)
    metric.update(*(x[6:] for x in inputs))
    for copy in copies:
        copy.update(*(x[6:] for x in inputs))
        assert plain(copy.compute()) == plain(metric.compute())
        assert copy.sums.dtype == torch.float64
    assert metric.state_dict() == {}
    metric.reset()
    assert metric.sums.abs().sum() == 0
    assert metric.sums.dtype == torch.float64


def test_states_do_not_hold_the_graph(case):
    metric, inputs, _ = case
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    metric.update(*inputs)
    result = metric(*inputs)  # where torchmetrics lets gradients through
    if isinstance(result, dict):
        assert not any(value.requires_grad for value in result.values())
    assert not metric.sums.requires_grad
    assert not metric.highs.requires_grad


def test_the_explained_variance_is_the_functions():
    metric = ExplainedVariance()
    metric.update(VALUES, RETURNS, MASK)
    # both at an offset of 1000; the function works in the dtype of its input
    expected = explained_variance(VALUES.double(), RETURNS.double(), MASK)
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-9)
    constant = ExplainedVariance()
    for _ in range(3):
        constant.update(torch.randn(1, 7), torch.full((1, 7), 0.1), torch.ones(1, 7))
    assert constant.compute().item() == 0


def test_estimators_return_advantages_from_forward():
    gae = GeneralizedAdvantageEstimation()
    advantages, returns = generalized_advantage_estimation(ADV, LP, MASK, bootstrap=torch.ones(N))
    torch.testing.assert_close(gae(ADV, LP, MASK, torch.ones(N)), advantages, rtol=0, atol=0)
    torch.testing.assert_close(gae.returns, returns, rtol=0, atol=0)
    got = GroupNormalization(scale="batch", eps=0.1)(REWARDS, IDS)
    torch.testing.assert_close(got, group_normalize(REWARDS, IDS, "batch", 0.1), rtol=0, atol=0)
    got = GroupNormalization()(REWARDS, IDS)
    torch.testing.assert_close(got, group_normalize(REWARDS, IDS), rtol=0, atol=0)


def test_ess_of_the_oracle_and_of_one_heavy_sample():
    # C10, C32
    for ratio, expected in (([0.2, 1, 5], 0.4920635), ([0.5, 1, 2], 0.7777778), ([1, 1, 1], 1), ([1e6, 1e-6], 0.5)):
        metric = ImportanceRatio()
        lp = torch.tensor([ratio]).log()
        metric.update(lp, torch.zeros_like(lp), torch.ones_like(lp))
        assert metric.compute()["ess"].item() == pytest.approx(expected, abs=1e-6)
    metric.reset()
    metric.update(torch.tensor([2.0, 3.0]), torch.zeros(2), torch.ones(2))  # sequences, and raw: no clip
    assert metric.compute()["ratio_max"].item() == pytest.approx(np.exp(3), rel=1e-6)


def test_on_policy_nothing_has_moved():
    # C29
    kl, clip = ApproxKL(), ClipFraction()
    kl.update(LP, LP, MASK)
    clip.update(LP, LP, ADV, MASK)
    assert kl.compute().item() == 0
    assert set(plain(clip.compute()).values()) == {0.0}


def test_a_collection_without_compute_groups_keeps_them_apart():
    both = MetricCollection({"kl": KLDivergence(), "approx": ApproxKL()}, compute_groups=False)
    for policy in (OLD, LP):  # all states are equal after the first, on-policy batch
        both["kl"].update(policy, OLD, MASK)
        both["approx"].update(policy, OLD, MASK)
    got = both.compute()
    assert got["kl"].item() == pytest.approx(expected_kl() / 2, rel=1e-5)
    assert got["approx"].item() == pytest.approx(expected_approx_kl() / 2, rel=1e-5)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(12, 6\), got \(12, 1\)"):
        PolicyEntropy().update(ADV, torch.ones(N, 1))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_a_rank(rank, port, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    # rank 0 sees one row, then two; rank 1 only the rest, and of the second metric nothing at all
    for name, (make, inputs, _) in CASES.items():
        uneven, one_sided = make(), make()
        for rows in ((slice(0, 1), slice(1, 3)), (slice(3, 12),))[rank]:
            uneven.update(*(x[rows] for x in inputs))
        one_sided.update(*(x if rank == 0 else x[:0] for x in inputs))
        out[name, rank] = plain(uneven.compute()), plain(one_sided.compute())
    stats = MaskedStats({"x": ("value", "std", "max", "min"), "y": ("mean",)})
    if rank == 0:
        stats.update({"x": (ADV[:2], MASK[:2])})
    else:
        stats.update({"x": (ADV[2:], MASK[2:]), "y": (torch.tensor(3.0), None)})
    out["masked_stats", rank] = plain(stats.compute()), None
    torch.distributed.destroy_process_group()


def test_two_processes_uneven_and_empty():
    with mp.get_context("fork").Manager() as manager:
        out = manager.dict()
        mp.start_processes(on_a_rank, (free_port(), out), nprocs=2, start_method="fork")
        out = dict(out)
    for name, (_, _, expected) in CASES.items():
        for rank in (0, 1):
            for result in out[name, rank]:
                assert result == near(expected()), (name, rank)
    a = flat(ADV)
    expected = {"x": a.mean(), "x_std": a.std(ddof=1), "x_max": a.max(), "x_min": a.min(), "y_mean": 3.0}
    for rank in (0, 1):
        assert out["masked_stats", rank][0] == near(expected)
