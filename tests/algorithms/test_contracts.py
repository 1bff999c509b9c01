"""What a user's own hooks, losses and subclasses may return and state, and what is said where they do not."""

import warnings
from dataclasses import replace

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.errors import InputError
from tests.algorithms.settings import rows_for
from tests.algorithms.toys import rollout_of
from tests.helpers import build, random_experience


def advantages_from(hook):
    """What becomes of the advantages and returns of a hook, on rows of one and of three tokens."""

    class Own(GRPO):
        def compute_advantages(self, rollout):
            return hook(rollout)

    return build(Own).experience(rollout_of([1.0, -2.0], [1, 3]))


class TestTheHookOfAdvantages:
    def test_it_may_return_one_number_per_row(self):
        experience = advantages_from(lambda rollout: (rollout.rewards, 2 * rollout.rewards))
        assert experience.advantages.tolist() == [[1, 0, 0], [-2, -2, -2]]
        assert experience.returns.tolist() == [[2, 0, 0], [-4, -4, -4]]
        experience = advantages_from(lambda rollout: (rollout.rewards, None))
        assert experience.advantages.tolist() == [[1, 0, 0], [-2, -2, -2]]
        assert experience.returns is None

    def test_one_number_per_token_stays_as_it_is(self):
        A = torch.arange(6.0).view(2, 3)
        experience = advantages_from(lambda rollout: (A, -A))
        assert torch.equal(experience.advantages, A)
        assert torch.equal(experience.returns, -A)

    @pytest.mark.parametrize(
        ("found", "got"),
        [
            (torch.ones(2, 4), r"\(2, 4\)"),
            (torch.ones(3), r"\(3,\)"),
            (torch.ones(2, 1), r"\(2, 1\)"),
            (torch.tensor(1.0), r"\(\)"),
            (torch.ones(2, 3, 1), r"\(2, 3, 1\)"),
            ([1.0, 2.0], "list"),
            (0.5, "float"),
        ],
    )
    @pytest.mark.parametrize("place", [0, 1])
    def test_anything_else_is_refused(self, found, got, place):
        given = [torch.ones(2, 3), torch.ones(2, 3)]
        given[place] = found
        with pytest.raises(InputError, match=rf"^compute_advantages: expected tensors \[N, T\] or \[N\].*got {got}$"):
            advantages_from(lambda rollout: tuple(given))
        with pytest.raises(InputError, match=rf"^compute_advantages: .*got {got}$"):
            build(GRPO, advantage_estimator=lambda rewards, mask: tuple(given)).experience(
                rollout_of([1.0, -2.0], [1, 3])
            )


class TestWhatALossReturns:
    def step(self, found_of):
        module = build(GRPO, policy_loss=lambda old_logp, logp, advantages, mask: found_of(-logp * advantages))
        return module.training_step(random_experience(model=module.models.policy))

    @pytest.mark.parametrize(
        "found_of",
        [
            lambda loss: loss,
            lambda loss: (loss,),
            lambda loss: (loss, None),
            lambda loss: (loss, {}, {}),
            lambda loss: [loss, {}],
            lambda loss: None,
        ],
        ids=["the loss alone", "one", "None for metrics", "three", "a list", "nothing"],
    )
    def test_it_is_a_loss_and_metrics(self, found_of):
        with pytest.raises(InputError, match=r"^policy_loss must return \(loss, metrics\), the metrics a dictionary"):
            self.step(found_of)

    @pytest.mark.parametrize(
        ("found_of", "got"),
        [
            (lambda loss: loss.sum(1), r"\(6,\)"),
            (lambda loss: loss[:, :1], r"\(6, 1\)"),
            (lambda loss: loss[:1], r"\(1, 7\)"),
            (lambda loss: 0.5, "float"),
        ],
        ids=["per row", "a column", "a row", "a number"],
    )
    def test_a_loss_of_another_shape_is_refused(self, found_of, got):
        with pytest.raises(InputError, match=rf"^policy_loss must return a loss \[N, T\], here \(6, 7\).*got {got}$"):
            self.step(lambda loss: (found_of(loss), {}))


class TestAScalarLoss:
    def step(self, ages, **arguments):
        scalar = lambda old_logp, logp, advantages, mask: ((-logp * advantages)[mask].mean(), {})  # noqa: E731
        module = build(GRPO, policy_loss=scalar, **arguments)
        module.training_step(replace(rows_for("", module.models.policy), staleness=torch.tensor(ages)))

    def test_on_stale_rows_it_is_refused(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(InputError, match=r"^policy_loss: a scalar cannot be weighed.*importance_correction=no"):
                self.step([0, 0, 2, 0, 0, 0])

    @pytest.mark.parametrize(
        ("ages", "arguments"), [([0] * 6, {}), ([0, 0, 2, 0, 0, 0], {"importance_correction": "none"})]
    )
    def test_where_nothing_is_weighed_it_is_warned_of(self, ages, arguments):
        with pytest.warns(UserWarning, match=r"^the policy loss returns a scalar.*averages them exactly$") as caught:
            self.step(ages, **arguments)
        assert len(caught) == 1


IGNORED = {
    "kl_coef": 0.1,
    "loss_agg": "token-mean",
    "lr": 1e-3,
    "group_size": 2,
    "prompts_per_rollout": 4,
    "target_kl": 0.1,
    "entropy_coef": 0.1,
    "entropy": "none",
    "truncation_penalty": 1.0,
    "mask_truncated": True,
    "skip_zero_advantage": True,
    "kl_estimator": "k2",
    "kl_unbiased": True,
    "value_coef": 1.0,
    "value_clip": None,
    "staleness_decay": 1.0,
    "normalize_rewards": True,
    "reward_clip": 5.0,
    "importance_clip_max": 3.0,
    "weight_decay": 0.1,
    "sampling": {"max_new_tokens": 4},
    "seed": 1,
}
OF_THE_PAPER = {
    "advantage_estimator": "rloo",
    "policy_loss": "cispo",
    "kl_in": "reward",
    "value": "shared",
    "whiten_advantages": True,
    "importance_correction": "none",
    "minibatches": 2,
    "update_epochs": 3,
}


class TestClassAttributes:
    @pytest.mark.parametrize("name", list(IGNORED))
    @pytest.mark.parametrize("parent", [OnPolicyModule, GRPO, PPO])
    def test_one_that_would_be_ignored_is_refused(self, parent, name):
        with pytest.raises(TypeError, match=rf"^M\.{name} would have no effect as a class attribute; pass it to the"):
            type("M", (parent,), {name: IGNORED[name]})

    @pytest.mark.parametrize("name", list(OF_THE_PAPER))
    @pytest.mark.parametrize("parent", [OnPolicyModule, GRPO])
    def test_those_that_a_paper_states_take_effect_and_give_way_to_arguments(self, parent, name):
        M = type("M", (parent,), {name: OF_THE_PAPER[name]})
        assert getattr(build(M, kl_coef=0.1), name) == OF_THE_PAPER[name]
        other = getattr(GRPO, name)
        assert other != OF_THE_PAPER[name]
        assert getattr(build(M, kl_coef=0.1, **{name: other}), name) == other

    def test_what_is_not_an_argument_is_the_subclasss_own(self):
        class M(GRPO):
            margin = 0.1
            progress_keys = ("reward/reward_mean",)

        assert build(M).margin == 0.1


@pytest.mark.parametrize("returned", [None, (None, None), (torch.ones(2),), torch.ones(2, 2)])
def test_an_estimator_that_returns_no_pair_is_refused(returned):
    module = build(GRPO, advantage_estimator=lambda rewards, mask, **kw: returned)
    with pytest.raises(InputError, match=r"expected a tuple \(advantages, returns\)"):
        module.experience(rollout_of([1.0, 2.0], [2, 2]))
