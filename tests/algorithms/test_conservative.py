"""The penalty of ConservativePPO (C19): its value, its gradient, its K over the whole step, its coefficient."""

import pytest
import torch

from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import checkpointed, fit_of, loop_in
from tests.algorithms.settings import SPLITS, loss_gradients_stats, setting, split, take_stats
from tests.algorithms.toys import rollout_of
from tests.helpers import build, gradients, prompt_rows, trainer


class TestConservativePenalty:
    """C19: c = .1, K = .05, kappa = .01."""

    def penalty(self, kl, **arguments):
        module = build(ConservativePPO, **arguments)
        kl = torch.tensor([kl], dtype=torch.float64).requires_grad_()
        zeros = torch.zeros_like(kl).detach()
        rollout = rollout_of([0.0], [kl.shape[1]], values=zeros, ref_logprobs=zeros)
        loss = module.compute_loss(Scores(zeros, None, kl, zeros), module.experience(rollout))["kl_penalty"]
        return loss.item(), torch.autograd.grad(loss, kl)[0][0].tolist(), take_stats(module)

    def test_value_and_gradient(self):
        value, slopes, stats = self.penalty([0.03, 0.07])
        assert value == pytest.approx(1.6e-4, abs=1e-12)
        assert slopes == pytest.approx([0.004, 0.004], abs=1e-12)  # dL/dK = .008, over two tokens
        assert stats["stability/kl_violation"] == 1
        assert stats["stability/max_kl_threshold"] == pytest.approx(0.01)
        assert stats["stability/conservative_coef"] == pytest.approx(0.1)

    def test_below_the_threshold_there_is_none(self):
        value, slopes, stats = self.penalty([0.002, 0.008])
        assert value == 0
        assert slopes == [0, 0]
        assert stats["stability/kl_violation"] == 0

    def test_the_penaltys_kl_is_the_one_asked_for_beside_another_in_the_loss(self):
        module, batch = setting("ConservativePPO k2", kl_estimator="full")
        scores = module.score(batch)
        assert scores.kl is not None
        k2 = ((scores.logprobs - batch.ref_logprobs).square() / 2)[batch.response_mask].mean()
        penalty = module.compute_loss(scores, batch)["kl_penalty"].item()
        assert penalty == pytest.approx(2.0 * (k2.item() - 0.02) ** 2)

    @pytest.mark.parametrize("estimator", ["k2", "k3"])
    def test_the_losss_kl_is_the_one_asked_for_beside_the_penaltys_exact_one(self, estimator):
        module, batch = setting("ConservativePPO", kl_coef=0.3, kl_in="loss", kl_estimator=estimator)
        scores = module.score(batch)
        delta = (scores.logprobs - batch.ref_logprobs)[batch.response_mask]
        estimate = {"k2": delta.square() / 2, "k3": (-delta).exp() - 1 + delta}[estimator].mean().item()
        exact = scores.kl[batch.response_mask].mean().item()
        assert abs(estimate - exact) > 0.01
        terms = module.compute_loss(scores, batch)
        assert terms["kl_loss"].item() == pytest.approx(0.3 * estimate)
        assert terms["kl_penalty"].item() == pytest.approx(2.0 * (exact - 0.02) ** 2)

    @pytest.mark.parametrize("parts", SPLITS.values(), ids=SPLITS)
    def test_without_the_other_micro_batches_it_would_be_another(self, parts):
        """Of the parts' own K the gradient differs from the whole's: `begin_step` is what makes them one."""
        module, batch = setting("ConservativePPO")
        _, expected, _ = loss_gradients_stats(module, batch)
        loss_gradients_stats(module, *split(batch, parts))
        assert module._step_kl is not None
        module._step_kl = None
        found = gradients(module, *[module.training_step(part) for part in split(batch, parts)])
        assert max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items()) > 1e-3

    def test_a_step_of_one_micro_batch_has_a_k_of_its_own(self):
        module, batch = setting("ConservativePPO")
        first = batch[:3]
        loss, _, _ = loss_gradients_stats(module, first)
        loss_gradients_stats(module, *split(batch, SPLITS["uneven"]))
        module.begin_step([first])
        assert module.training_step(first).item() == pytest.approx(loss, abs=1e-12)

    @pytest.mark.parametrize(("kl", "expected"), [(0.05, 0.2), (0.012, 0.1), (0.008, 0.1), (0.005, 0.05), (None, 0.15)])
    def test_c_doubles_and_halves_once_per_step(self, kl, expected):
        bounds = (1e-3, 1e3) if kl else (0.08, 0.15)
        module = build(ConservativePPO, adaptive=True, conservative_coef_range=bounds)
        module.loop.numbers["conservative_coef"], module._last_kl = 0.1, kl or 0.05
        module.on_before_optimizer_step(torch.optim.SGD(module.models.parameters(), 0.1))
        assert module.loop.numbers["conservative_coef"] == pytest.approx(expected)

    def test_c_stays_unless_it_adapts_and_where_no_step_is_taken(self):
        for arguments, numbers in (({}, {}), ({"adaptive": True}, {"stopped": 1.0})):
            module = build(ConservativePPO, **arguments)
            module.loop.numbers |= {"conservative_coef": 0.1, **numbers}
            module._last_kl = 5.0
            module.on_before_optimizer_step(torch.optim.SGD(module.models.parameters(), 0.1))
            assert module.loop.numbers["conservative_coef"] == 0.1

    @pytest.mark.parametrize("accumulate", [1, 2, 4])
    def test_in_a_run_k_is_of_all_tokens_of_the_step(self, accumulate):
        seen = []

        class Watched(ConservativePPO):
            def on_before_optimizer_step(self, optimizer):
                super().on_before_optimizer_step(optimizer)
                seen.append((self._last_kl, [p.grad.clone() for p in self.models.policy.parameters()]))

        sizes = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=6)}
        for parts in (1, accumulate):
            module, _ = setting("ConservativePPO", **sizes, update_epochs=1)
            module.__class__ = Watched
            module.engine.end_token_ids = list(range(1, 30))
            trainer(accumulate=parts).fit(module, datamodule=RowsDataModule(prompt_rows(4)))
        (expected, gradient), (found, other) = seen
        assert expected > 0.02
        assert found == pytest.approx(expected, rel=1e-9)
        for a, b in zip(gradient, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)

    def test_a_batch_of_its_own_after_a_run_has_its_own_k(self):
        """The K of the run's last step belongs to that step."""
        sizes = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=6)}
        module, batch = setting("ConservativePPO", **sizes, update_epochs=1)
        trainer(accumulate=2).fit(module, datamodule=RowsDataModule(prompt_rows(4)))
        assert module._step_kl is not None
        take_stats(module)
        assert batch.step_tokens is None
        K = module.score(batch).kl[batch.response_mask].mean().item()
        assert abs(K - float(module._step_kl)) > 1e-3
        module.training_step(batch)
        assert module._last_kl == pytest.approx(K)
        assert take_stats(module)["loss/kl_penalty"] == pytest.approx(2.0 * (K - 0.02) ** 2)


class Reported(ConservativePPO):
    """Keeps what it logged, rollout by rollout."""

    def derived(self, values):
        self.rows = [*getattr(self, "rows", []), {name: float(value) for name, value in values.items()}]
        return super().derived(values)


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_resumed_run_takes_a_fixed_coefficient_from_its_arguments_and_an_adaptive_one_from_the_checkpoint(
    adaptive, tmp_path
):
    arguments = {
        "group_size": 2,
        "prompts_per_rollout": 8,
        "sampling": SamplingConfig(max_new_tokens=4),
        "update_epochs": 1,
        "value": "shared",
        "adaptive": adaptive,
    }
    saved = checkpointed(tmp_path, every_n_epochs=1)
    first, _ = fit_of(Reported, {**arguments, "conservative_coef": 0.1}, 1, callbacks=[saved])
    (checkpoint,) = tmp_path.glob("*.ckpt")
    numbers = loop_in(checkpoint)["numbers"]
    assert ("conservative_coef" in numbers) == adaptive
    assert first.current_coef == (0.05 if adaptive else 0.1)  # the first step's KL is 0

    resumed, _ = fit_of(Reported, {**arguments, "conservative_coef": 5.0}, 2, ckpt_path=checkpoint)
    assert resumed.rows[0]["stability/conservative_coef"] == pytest.approx(0.05 if adaptive else 5.0)
