"""Which names are logged, with what, on ranks that counted different ones and in a run that was continued."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.callbacks.hooks import RLHFCallback
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.metrics import MaskedStats
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import SaveAt, fit_of, loop_in
from tests.algorithms.settings import setting, take_stats
from tests.helpers import build, prompt_rows, prompts, trainer


class TestAlign:
    def filled(self, **values):
        stats = MaskedStats(["shared"])
        stats.extend(values)
        stats.update({name: (torch.tensor(x), None) for name, x in values.items()})
        return stats

    def test_columns_move_with_their_names(self):
        stats = self.filled(shared=[1.0, 3.0], b=[5.0], a=[7.0, 8.0])
        stats.align(["a", "new", "shared", "b"])
        assert list(stats.wanted) == ["a", "new", "shared", "b"]
        assert {name: x.item() for name, x in stats.compute().items()} == {"a": 7.5, "shared": 2, "b": 5}
        stats.update({"new": (torch.tensor([4.0]), None), "b": (torch.tensor([6.0]), None)})
        assert {name: x.item() for name, x in stats.compute().items()} == {"a": 7.5, "new": 4, "shared": 2, "b": 5.5}

    def test_aligned_states_have_the_same_columns_also_after_a_reset(self):
        names = ["shared", "short", "long"]
        for stats in (self.filled(long=[1.0]), self.filled(short=[2.0]), self.filled()):
            stats.align(names)
            assert stats.sums.shape[1] == stats.highs.shape[1] == 3
            stats.reset()
            assert stats.sums.shape[1] == stats.highs.shape[1] == 3
            stats.update({"short": (torch.tensor([4.0]), None)})
            assert {name: x.item() for name, x in stats.compute().items()} == {"short": 4}

    def test_what_is_logged_of_a_name_stays(self):
        stats = MaskedStats({"ratio": ("mean", "max", "min"), "entropy": ("value",)})
        stats.update({"ratio": (torch.tensor([1.0, 3.0]), None), "entropy": (0.5, None)})
        before = stats.compute()
        stats.align(["mine", "entropy", "ratio"])
        assert {**stats.compute()} == before


OF_RANK = [{"long": 1.0, "both": 1.0, "once": 7.0}, {"short": 2.0, "both": 3.0}]


def tells_ranks_apart(old_logp, logp, advantages, mask):
    return -logp * advantages, OF_RANK[dist.get_rank()]


def kept(algorithm, folder=None):
    """The algorithm, keeping what it logs, rollout by rollout."""

    class Kept(algorithm):
        def derived(self, values):
            found = super().derived(values)
            self.rows = [*getattr(self, "rows", []), {name: float(value) for name, value in found.items()}]
            return found

        def on_fit_end(self):
            if folder is not None:
                torch.save(self.rows, folder / f"{self.rank}.pt")

    return Kept


def test_names_that_one_rank_alone_counted_are_logged_on_both(tmp_path):
    sizes = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=3)}
    module = build(kept(GRPO, tmp_path), policy_loss=tells_ranks_apart, **sizes)
    trainer(devices=2, epochs=2).fit(module, datamodule=RowsDataModule(prompt_rows(8)))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second
    assert len(first) == 2
    for row in first:
        own = {name.removeprefix("policy/"): x for name, x in row.items() if name.startswith("policy/")}
        assert own == {"long": 1, "both": 2, "once": 7, "short": 2}
        assert row["stability/ratio_mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("micro_batch", [9, 11], ids=["first step", "second step"])
def test_a_run_continued_from_within_an_optimiser_step_logs_what_one_without_a_break_does(micro_batch, tmp_path):
    """The rollout has four steps of two micro-batches; those before the checkpoint's step are not counted twice."""
    arguments = {
        "group_size": 2,
        "prompts_per_rollout": 8,
        "minibatches": 2,
        "update_epochs": 2,
        "sampling": SamplingConfig(max_new_tokens=4),
        "kl_coef": 0.1,
    }
    path = tmp_path / "odd.ckpt"
    whole, _ = fit_of(kept(GRPO), arguments, 2, 2, callbacks=[SaveAt(micro_batch, path)])
    assert loop_in(path)["position"] % 2 == 1, "the checkpoint is not from within a step"
    resumed, _ = fit_of(kept(GRPO), arguments, 2, 2, seed=1, ckpt_path=path)
    assert resumed.rows[-1].keys() == whole.rows[-1].keys()
    assert resumed.rows[-1] == pytest.approx(whole.rows[-1], rel=1e-12)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("algorithm", [REINFORCE, ReMax, PPO])
def test_what_groups_agree_on_is_logged_where_there_are_groups(algorithm, group_size):
    module = build(algorithm, group_size=group_size, sampling=SamplingConfig(max_new_tokens=3))
    module.collect(prompts(3))
    found = {"reward/zero_std_fraction", "reward/singleton_fraction"} & take_stats(module).keys()
    assert len(found) == (0 if group_size == 1 else 2)


class TestTheClipOfValues:
    @pytest.mark.parametrize(
        ("algorithm", "arguments", "expected"),
        [
            (PPO, {}, 0.2),
            (PPO, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.35}, 0.35),
            (PPO, {"clip_ratio_high": 0.35, "value_clip": 0.1}, 0.1),
            (PPO, {"clip_ratio_high": 0.35, "value_clip": "clip_ratio"}, 0.35),
            (PPO, {"clip_ratio_high": 0.35, "value_clip": None}, None),
            (ConservativePPO, {"clip_ratio_high": 0.3}, 0.3),
            (DAPO, {"value": "shared"}, 0.28),
            (GSPO, {"value": "shared"}, 4e-4),
            (REINFORCE, {"value": "shared"}, 0.2),  # it has no clip of its own
        ],
    )
    def test_it_is_the_algorithms_own_unless_given(self, algorithm, arguments, expected):
        assert build(algorithm, **arguments).critic.clip == expected

    @pytest.mark.parametrize("clip", ["clip_ratio", None])
    def test_it_is_what_the_loss_clips_at(self, clip):
        module, batch = setting("PPO shared", clip_ratio_high=0.05, value_clip=clip)
        scores = module.score(batch)
        new, old, returns = (x[batch.response_mask] for x in (scores.values, batch.values, batch.returns))
        error = (new - returns).square()
        if clip is not None:
            error = torch.maximum(error, (old + (new - old).clamp(-0.05, 0.05) - returns).square())
        terms = module.compute_loss(scores, batch)
        assert terms["value_loss"].item() == pytest.approx(0.1 * error.mean().item() / 2)
        stats = take_stats(module)
        if clip is None:
            assert "stability/value_clip_fraction" not in stats
        else:
            outside = ((new - old).abs() > 0.05).double().mean().item()
            assert stats["stability/value_clip_fraction"] == pytest.approx(outside) != 0


class Spread(RLHFCallback):
    """Keeps the histogram of the ratios, rollout by rollout, and leaves it in a folder for every rank."""

    def __init__(self, folder=None):
        self.folder, self.found = folder, []

    def on_metrics(self, trainer, module, values):
        self.found.append(module.ratios.compute()[0].tolist())
        if self.folder is not None:
            torch.save((self.found, module.ratios_seen), self.folder / f"{trainer.global_rank}.pt")


class Watched(GRPO):
    """Keeps every ratio that it trains on, and trains hard enough to move some of them beyond the bins."""

    def compute_loss(self, scores, batch):
        ratios = (scores.logprobs.detach() - batch.old_logprobs).exp()[batch.response_mask].tolist()
        self.ratios_seen = [*getattr(self, "ratios_seen", []), *ratios]
        return super().compute_loss(scores, batch)


RATIOS = {
    "group_size": 2,
    "prompts_per_rollout": 8,
    "minibatches": 2,
    "update_epochs": 2,
    "sampling": SamplingConfig(max_new_tokens=4),
    "lr": 0.05,
    "warmup_steps": 0,
}


def bins_of(ratios):
    """The bin of 1 reaches from 40/41 to 42/41: numbers near its middle are in it, however they are rounded."""
    return np.histogram(np.clip(ratios, 0, 2), bins=np.linspace(0, 2, 42))[0].tolist()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_ratios_of_all_tokens_trained_on_are_counted_once(accumulate):
    spread = Spread()
    module, _ = fit_of(Watched, RATIOS, 2, accumulate, callbacks=[spread])
    first, second = spread.found
    assert [a + b for a, b in zip(first, second, strict=True)] == bins_of(module.ratios_seen)
    assert first[20] > 0, "the first step is at the old policy"
    assert sum(x > 0 for x in first) > 5
    assert first[-1] > 0, "no ratio is above 2"


def test_the_ratios_of_all_ranks_are_counted(tmp_path):
    fit_of(Watched, RATIOS, 1, devices=2, callbacks=[Spread(tmp_path)])
    (first, seen), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second == [bins_of([*seen, *others])]
    assert seen != others


def test_the_ratios_before_a_break_are_counted_too(tmp_path):
    path, whole, rest = tmp_path / "odd.ckpt", Spread(), Spread()
    fit_of(Watched, RATIOS, 2, 2, callbacks=[SaveAt(11, path), whole])
    fit_of(Watched, RATIOS, 2, 2, seed=1, ckpt_path=path, callbacks=[rest])
    assert rest.found[-1] == whole.found[-1]
