"""The preference metrics: against numpy, in uneven batches, over two processes, and on their own corner cases."""

import pickle

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from lit_rlhf.metrics import PreferenceAccuracy, RewardMargin
from tests.metrics.test_metrics import free_port, near, plain

NAN = float("nan")
CHOSEN = torch.tensor([1.0, 0.5, 2.0, 3.0, NAN, -1.0, 1000.5, 0.0, 4.0])
REJECTED = torch.tensor([0.0, 0.5, 3.0, 1.0, 0.0, -2.0, 1000.0, NAN, 4.5])
BATCHES = (slice(0, 1), slice(4, 5), slice(1, 4), slice(5, 9), slice(0, 0))


def difference():
    d = (CHOSEN.double() - REJECTED.double()).numpy()
    return d[~np.isnan(d)]


CASES = {
    "accuracy": (PreferenceAccuracy, lambda: (difference() > 0).mean()),
    "margin": (
        RewardMargin,
        lambda: {"reward_margin": difference().mean(), "reward_margin_std": difference().std(ddof=1)},
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    make, expected = CASES[request.param]
    return make(), expected()


def test_all_at_once(case):
    metric, expected = case
    metric.update(CHOSEN, REJECTED)
    assert plain(metric.compute()) == near(expected)


def test_uneven_and_empty_batches_give_the_same(case):
    metric, expected = case
    for rows in BATCHES:
        metric.update(CHOSEN[rows], REJECTED[rows])
    assert plain(metric.compute()) == near(expected)


def test_nothing_counted_is_zero(case):
    metric, _ = case
    metric.update(CHOSEN[:0], REJECTED[:0])
    assert set(plain(metric.compute()).values()) == {0.0}


def test_pickle_clone_and_cast(case):
    metric, expected = case
    metric.update(CHOSEN[:6], REJECTED[:6])
    holder = torch.nn.ModuleList([metric.clone()]).half().to(torch.bfloat16).float()
    for copy in [pickle.loads(pickle.dumps(metric)), metric.clone(), *holder]:
        copy.update(CHOSEN[6:], REJECTED[6:])
        assert plain(copy.compute()) == near(expected)
        assert copy.sums.dtype == torch.float64
    assert metric.state_dict() == {}


def test_states_do_not_hold_the_graph(case):
    metric, _ = case
    metric.update(CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_())
    assert not metric.sums.requires_grad


def test_equal_rewards_are_not_right():
    metric = PreferenceAccuracy()
    metric.update(torch.ones(4), torch.ones(4))
    assert metric.compute() == 0


def test_rewards_of_another_number_of_pairs_are_refused(case):
    with pytest.raises(ValueError, match=r"the shape of chosen \(9,\), got \(8,\)"):
        case[0].update(CHOSEN, REJECTED[:8])


def on_a_rank(rank, port, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, (make, _) in CASES.items():
        uneven, one_sided = make(), make()
        for rows in ((slice(0, 1), slice(1, 2)), (slice(2, 9),))[rank]:
            uneven.update(CHOSEN[rows], REJECTED[rows])
        rows = slice(0, 9 if rank == 0 else 0)
        one_sided.update(CHOSEN[rows], REJECTED[rows])
        out[name, rank] = plain(uneven.compute()), plain(one_sided.compute())
    torch.distributed.destroy_process_group()


def test_two_processes_uneven_and_empty():
    with mp.get_context("fork").Manager() as manager:
        out = manager.dict()
        mp.start_processes(on_a_rank, (free_port(), out), nprocs=2, start_method="fork")
        out = dict(out)
    for (name, rank), results in out.items():
        for result in results:
            assert result == near(CASES[name][1]()), (name, rank)
    assert len(out) == 2 * len(CASES)
