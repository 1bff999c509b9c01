"""The KL coefficient that follows a target (C16), and the distance at which updates stop (C15)."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import SamplingConfig
from tests.algorithms.settings import setting, take_stats
from tests.algorithms.toys import rollout_of
from tests.helpers import build, prompt_rows, trainer

NAN = float("nan")


class TestAdaptiveKL:
    """C16."""

    def kl_of(self, kl, rows, lengths=None, **arguments):
        module = build(RLOO, **{"kl_coef": 0.2, "kl_target": 6.0, **arguments})
        lengths = lengths or [2] * rows
        old = torch.zeros(rows, 2).double()
        ref = old - torch.tensor([[kl / max(n, 1)] * n + [NAN] * (2 - n) for n in lengths]).double()
        experience = module.experience(rollout_of([0.0] * rows, lengths, logprobs=old, ref_logprobs=ref, width=2))
        return module, experience

    @pytest.mark.parametrize(("kl", "expected"), [(9.0, 0.201024), (5.7, 0.199744), (-9.0, 0.198976)])
    def test_it_moves_towards_the_target_after_the_rollout_was_shaped(self, kl, expected):
        module, experience = self.kl_of(kl, 256, lengths=[2, 1] * 128)
        assert module.current_kl_coef == pytest.approx(expected, abs=1e-9)
        assert experience.rewards[0].tolist() == pytest.approx([-0.2 * kl / 2] * 2)
        assert take_stats(module)["stability/kl_coef"] == pytest.approx(0.2)
        again = module.experience(rollout_of([0.0], [1], logprobs=torch.zeros(1, 1), ref_logprobs=torch.ones(1, 1)))
        assert float(again.rewards[0, 0]) == pytest.approx(expected, abs=1e-6)

    def test_rows_without_tokens_are_no_episodes(self):
        module, _ = self.kl_of(9.0, 4, lengths=[2, 2, 0, 0], kl_horizon=100)
        assert module.current_kl_coef == pytest.approx(0.2 * (1 + 0.2 * 2 / 100))

    def test_without_a_target_it_stays(self):
        module, _ = self.kl_of(9.0, 4, kl_target=None)
        assert module.current_kl_coef == 0.2

    def test_in_the_loss_it_is_the_coefficient_of_now(self):
        module, batch = setting("GRPO", kl_coef=0.3)
        module.training_step(batch)
        before = take_stats(module)["loss/kl_loss"]
        module.loop.numbers["kl_coef"] = 0.6
        module.training_step(batch)
        assert take_stats(module)["loss/kl_loss"] == pytest.approx(2 * before)

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"kl_coef": 0.0, "kl_target": 6.0}, "algo.kl_target moves algo.kl_coef, which is 0"),
            ({"kl_target": 0.0}, "algo.kl_target must be above 0"),
            ({"kl_horizon": 0}, "algo.kl_horizon must be above 0"),
            ({"kl_estimator": "full"}, "algo.kl_estimator=full has no gradient in the reward"),
        ],
    )
    def test_what_cannot_be_is_refused(self, arguments, sentence):
        with pytest.raises(InputError, match=sentence):
            build(RLOO, **arguments)


class TestTargetKL:
    """C15: k3 of the step's tokens above 1.5 times the target."""

    def stopped(self, d, splits=((0,),), **arguments):
        module = build(GRPO, **{"target_kl": 0.01, **arguments})
        old = torch.zeros(len(d), len(d[0])).double()
        rollout = rollout_of([0.0] * len(d), [sum(x == x for x in row) for row in d], logprobs=old)
        experience = module.experience(replace(rollout, group_ids=torch.arange(len(d))))
        logprobs = torch.tensor(d).double()
        for rows in splits:
            rows = list(rows)
            module.score = lambda batch, rows=rows: Scores(logprobs[rows].clone().requires_grad_())
            module.training_step(experience[torch.tensor(rows)])
        optimizer = torch.optim.SGD(module.models.parameters(), 0.1)
        for p in module.models.parameters():
            p.grad = torch.ones_like(p)
        module.on_before_optimizer_step(optimizer)
        gone = all(p.grad is None for p in module.models.parameters())
        assert gone == ("stopped" in module.loop.numbers)
        return gone, take_stats(module)

    def test_the_worked_numbers(self):
        stopped, stats = self.stopped([[0.2, -0.2]])
        assert stopped
        assert stats["stability/approx_kl"] == pytest.approx(0.02006676, abs=1e-8)
        assert stats["stability/stopped_fraction"] == 1
        stopped, stats = self.stopped([[0.1, -0.1]])
        assert not stopped
        assert stats["stability/stopped_fraction"] == 0
        assert self.stopped([[0.2, -0.2]], target_kl=0.0134)[0] is False  # 1.5 * .0134 = .0201
        assert self.stopped([[0.2, -0.2]], target_kl=None)[0] is False

    def test_it_is_of_all_micro_batches_of_the_step(self):
        rows = [[0.2, -0.2], [0.0, NAN], [0.0, 0.0]]  # .0201 on two of five tokens, .00803 per token
        assert self.stopped(rows, splits=([0], [1], [2]), target_kl=0.006)[0] is False
        assert self.stopped(rows, splits=([0], [1], [2]), target_kl=0.005)[0] is True
        assert self.stopped(rows, splits=([0, 1, 2],), target_kl=0.005)[0] is True

    def test_a_step_does_not_count_the_one_before(self):
        module = build(GRPO, target_kl=0.01)
        ones = torch.ones(1, 1).bool()
        module.target_kl.add(torch.tensor([[0.016]]), ones)
        assert module.target_kl.exceeded()
        module.target_kl.add(torch.tensor([[0.014]]), ones)
        assert not module.target_kl.exceeded()
        assert not module.target_kl.exceeded()

    def test_the_rest_of_the_rollout_is_left_out_and_the_next_is_not(self):
        stopped, weights = [], []

        class Watched(PPO):
            def on_train_batch_end(self, outputs, batch, batch_idx):
                super().on_train_batch_end(outputs, batch, batch_idx)
                stopped.append("stopped" in self.loop.numbers)
                weights.append(torch.cat([p.detach().flatten() for p in self.models.parameters()]))

            def publish(self, stats, extra=None):
                self.row = {name: float(value) for name, value in stats.compute().items()} | extra
                super().publish(stats, extra)

        sizes = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=4)}
        module = build(Watched, target_kl=1e-5, lr=1e-2, weight_decay=0.1, value="shared", update_epochs=3, **sizes)
        trainer(epochs=2).fit(module, datamodule=RowsDataModule(prompt_rows(8)))
        assert stopped == [False, True, True] * 2  # the first step of a rollout is at ratio 1
        same = [torch.equal(a, b) for a, b in pairwise(weights)]
        assert same == [True, True, False, True, True]
        assert module.row["stability/stopped_fraction"] == pytest.approx(2 / 3)
        assert 0 < module.row["perf/update_seconds"] < 60

    def test_a_target_that_cannot_be_is_refused(self):
        with pytest.raises(InputError, match=r"algo\.target_kl must be above 0"):
            build(PPO, target_kl=0.0)
