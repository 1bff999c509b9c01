"""Arguments without effect beside the others are warned of in one sentence each; those that have one are not."""

import warnings

import pytest

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.conservative_ppo import ConservativePPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.reinforce_pp import REINFORCEPlusPlus
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.errors import InputError
from tests import helpers
from tests.algorithms.settings import ON_POLICY_CLASSES
from tests.helpers import build

DISCOUNTING = [PPO, ConservativePPO, REINFORCE, REINFORCEPlusPlus]


def warned(algorithm, **arguments):
    """The sentences that a constructor warns with, every one of them at the line that called it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        build(algorithm, **arguments)
    assert {warning.filename for warning in caught} <= {helpers.__file__}
    return [str(warning.message) for warning in caught]


def no_effect(name, because):
    return f"algo.{name} has no effect with {because}; leave it out"


@pytest.mark.parametrize(
    ("algorithm", "arguments", "name", "because"),
    [
        (GRPO, {"kl_in": "loss"}, "kl_in", "algo.kl_coef=0"),
        (GRPO, {"kl_estimator": "k2"}, "kl_estimator", "algo.kl_coef=0"),
        (GRPO, {"kl_unbiased": True}, "kl_unbiased", "algo.kl_coef=0"),
        (GRPO, {"kl_horizon": 100}, "kl_horizon", "algo.kl_coef=0"),
        (RLOO, {"kl_coef": 0, "kl_in": "loss"}, "kl_in", "algo.kl_coef=0"),
        (RLOO, {"kl_unbiased": True}, "kl_unbiased", "algo.kl_in=reward"),
        (GRPO, {"kl_coef": 0.1, "kl_in": "reward", "kl_unbiased": True}, "kl_unbiased", "algo.kl_in=reward"),
        (GRPO, {"kl_coef": 0.1, "kl_horizon": 100}, "kl_horizon", "no algo.kl_target"),
        (GRPO, {"value_coef": 0.3}, "value_coef", "algo.value=none"),
        (GRPO, {"value_clip": 0.3}, "value_clip", "algo.value=none"),
        (REINFORCE, {"value_lr": 1e-4}, "value_lr", "algo.value=none"),
        (
            GRPO,
            {"importance_correction": "none", "staleness_decay": 0.9},
            "staleness_decay",
            "algo.importance_correction=none",
        ),
        (
            GRPO,
            {"importance_correction": "none", "importance_clip_max": 3.0},
            "importance_clip_max",
            "algo.importance_correction=none",
        ),
        (PPO, {"mask_truncated": True, "bootstrap_truncated": True}, "bootstrap_truncated", "algo.mask_truncated=true"),
    ],
)
def test_an_argument_without_effect_is_named(algorithm, arguments, name, because):
    assert warned(algorithm, **arguments) == [no_effect(name, because)]


def test_each_has_a_sentence_of_its_own():
    found = warned(GRPO, kl_in="loss", kl_estimator="k3", value_coef=0.1)
    names = [("kl_in", "algo.kl_coef=0"), ("kl_estimator", "algo.kl_coef=0"), ("value_coef", "algo.value=none")]
    assert found == [no_effect(*both) for both in names]


@pytest.mark.parametrize("algorithm", [RLOO, REINFORCE, ReMax])
def test_several_passes_over_samples_without_a_ratio_are_warned_of(algorithm):
    (sentence,) = warned(algorithm, update_epochs=2)
    assert sentence.startswith("algo.policy_loss=reinforce has no ratio: passes after the first train on samples of")
    for repaired in ({"update_epochs": 1}, {"importance_correction": "token"}, {"policy_loss": "sequence_clip"}):
        assert warned(algorithm, **{"update_epochs": 2, **repaired}) == []


@pytest.mark.parametrize(
    ("algorithm", "arguments", "epsilon", "usual"),
    [
        (GRPO, {"policy_loss": "gspo"}, 0.2, "about 4e-4"),
        (GRPO, {"policy_loss": "gspo_token"}, 0.2, "about 4e-4"),
        (DAPO, {"policy_loss": "gspo"}, 0.28, "about 4e-4"),
        (GSPO, {"policy_loss": "clip"}, 0.0004, "about 0.2"),
        (GRPO, {"clip_ratio_high": 4e-4}, 0.0004, "about 0.2"),
    ],
)
def test_a_clip_range_of_another_kind_of_ratio_is_warned_of(algorithm, arguments, epsilon, usual):
    loss = arguments.get("policy_loss", "clip")
    sentence = f"algo.clip_ratio_high={epsilon} is far from what algo.policy_loss={loss} clips at, {usual}; "
    assert warned(algorithm, **arguments) == [sentence + "give algo.clip_ratio_low and algo.clip_ratio_high"]
    fitting = 4e-4 if usual == "about 4e-4" else 0.2
    assert warned(algorithm, **arguments | {"clip_ratio_low": fitting, "clip_ratio_high": fitting}) == []


@pytest.mark.parametrize("algorithm", DISCOUNTING)
def test_a_discount_per_token_is_warned_of_and_one_above_1_is_refused(algorithm):
    assert warned(algorithm, gamma=0.9) == ["algo.gamma=0.9 discounts the reward at the end per token; 1 is usual"]
    assert warned(algorithm, gamma=1.0) == []
    for gamma in (2, -0.1):
        with pytest.raises(InputError, match=rf"^algo\.gamma={gamma} and .* must be from 0 to 1$"):
            build(algorithm, gamma=gamma)


def test_these_are_all_that_discount():
    assert [c for c in ON_POLICY_CLASSES if "gamma" in c.hyper_parameters or hasattr(build(c), "gamma")] == DISCOUNTING


@pytest.mark.parametrize("algorithm", [PPO, ConservativePPO])
def test_a_lambda_above_1_is_refused(algorithm):
    with pytest.raises(InputError, match=r"algo\.gae_lambda=1\.5 must be from 0 to 1"):
        build(algorithm, gae_lambda=1.5)


@pytest.mark.parametrize(
    "arguments", [{"kl_coef": 0.1, "kl_estimator": "k1", "kl_in": "loss"}, {"sampling": {"top_p": 0.9}}]
)
def test_what_trains_something_else_than_it_seems_is_one_sentence(arguments):
    (sentence,) = warned(GRPO, **arguments)
    assert sentence.startswith(("algo.kl_estimator=k1 as a loss", "rollout.top_p and rollout.top_k sample"))


@pytest.mark.parametrize("algorithm", ON_POLICY_CLASSES)
def test_an_algorithm_as_it_is_warns_of_nothing(algorithm):
    assert warned(algorithm) == []
    assert warned(algorithm, kl_coef=0) == []


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (GRPO, {"kl_coef": 0.1, "kl_in": "loss", "kl_estimator": "k2", "kl_unbiased": True}),
        (GRPO, {"kl_coef": 0.1, "kl_in": "both", "kl_unbiased": True, "kl_target": 1.0, "kl_horizon": 100}),
        (GRPO, {"kl_in": None, "kl_estimator": None, "kl_unbiased": False, "bootstrap_truncated": False}),
        (GRPO, {"value": "shared", "value_coef": 0.3, "value_clip": None, "value_lr": 1e-4}),
        (GRPO, {"staleness_decay": 0.9, "importance_clip_max": 3.0}),
        (PPO, {"bootstrap_truncated": True}),
        (PPO, {"mask_truncated": True}),
        (REINFORCEPlusPlus, {"group_baseline": True}),
        (REINFORCEPlusPlus, {"group_baseline": True, "kl_coef": 0}),
        (REINFORCEPlusPlus, {"group_baseline": True, "kl_in": "reward"}),
        (DrGRPO, {"update_epochs": 2}),
        (CISPO, {"update_epochs": 2}),
        (ImportanceSampling, {"update_epochs": 2}),
        (ImportanceSampling, {"importance_correction": "none"}),
        (ImportanceSampling, {"importance_clip_max": 3.0}),
    ],
)
def test_arguments_that_have_an_effect_are_not_warned_of(algorithm, arguments):
    assert warned(algorithm, **arguments) == []
