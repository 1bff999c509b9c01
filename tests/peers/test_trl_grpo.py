"""GRPO's family against TRL's `GRPOTrainer`: the same rows, the same loss, the same gradient."""

import math

import pytest
import torch

from lit_rlhf.algorithms.cispo import CISPO
from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.dr_grpo import DrGRPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.functional import aggregate, clipped_policy_loss, group_normalize
from lit_rlhf.models.scoring import score
from lit_rlhf.registry import get_policy_loss
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, plain_logprobs, tiny_model
from tests.peers.trl_peers import (
    GROUP_SIZE,
    LONGEST,
    assert_agree,
    assert_differ,
    experience,
    in_parts,
    ours,
    policy,
    replaced,
    rows,
    scaled,
    scored,
    theirs,
    trainer_of,
    with_old_logprobs,
    with_trl_reference,
)

pytestmark = pytest.mark.peer
KL = {"beta": 0.1, "use_bias_correction_kl": False}, {"kl_coef": 0.1}
SEQUENCES = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1}


def loss_with(name, **fixed):
    """A registered loss with hyper-parameters that the algorithm has no argument for."""
    return lambda old_logp, logp, advantages, mask: get_policy_loss(name)(old_logp, logp, advantages, mask, **fixed)


# TRL's configuration, our class, our arguments
CASES = {
    "grpo": ({"loss_type": "grpo"}, GRPO, {}),
    "grpo, asymmetric": (
        {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3},
        GRPO,
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3},
    ),
    "grpo, temperature": (
        {"loss_type": "grpo", "temperature": 0.9},
        GRPO,
        {"sampling": SamplingConfig(max_new_tokens=LONGEST, temperature=0.9)},
    ),
    "grpo, two-sided": (  # TRL's delta is the dual clip's c
        {"loss_type": "grpo", "delta": 1.3},
        GRPO,
        {"policy_loss": loss_with("clip", dual_clip=1.3)},
    ),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, DAPO, {}),
    "bnpo": ({"loss_type": "bnpo"}, GRPO, {"loss_agg": "token-mean"}),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
        DrGRPO,
        {"sampling": SamplingConfig(max_new_tokens=LONGEST)},
    ),
    # TRL's epsilon_high is the cap of the weight itself here, not 1 + eps
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, CISPO, {"clip_min": 0.0, "clip_max": 1.2}),
    "gspo": (SEQUENCES, GSPO, {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1}),
    "gspo_token": (SEQUENCES, GSPO, {"policy_loss": "gspo_token", "clip_ratio_low": 0.05, "clip_ratio_high": 0.1}),
    "luspo": (  # GSPO's loss of a row times its length
        {**SEQUENCES, "loss_type": "luspo"},
        GSPO,
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "loss_agg": "seq-mean-token-sum"},
    ),
    "entropy bonus": ({"loss_type": "dapo", "entropy_coef": 0.1}, DAPO, {"clip_ratio_high": 0.2, "entropy_coef": 0.1}),
}


def both(tmp_path, config, algorithm, arguments, micro_batches=1, counted=True):
    """Our side and TRL's, the module and the trainer."""
    batch = rows()
    trainer = trainer_of("GRPO", tmp_path, micro_batches=micro_batches, **config)
    inputs = with_old_logprobs(scored(trainer, batch), batch)
    module = build(algorithm, group_size=GROUP_SIZE, **arguments)
    if config.get("beta"):
        with_trl_reference(module)
    found = ours(module, experience(module, batch), micro_batches, counted)
    return found, theirs(trainer, *in_parts(inputs, micro_batches)), module, trainer


@pytest.mark.parametrize("with_kl", [False, True], ids=["", "kl"])
@pytest.mark.parametrize(("config", "algorithm", "arguments"), CASES.values(), ids=CASES)
def test_loss_and_gradient(config, algorithm, arguments, with_kl, tmp_path):
    if with_kl:
        config, arguments = {**config, **KL[0]}, {**arguments, **KL[1]}
    found, expected, _, trainer = both(tmp_path, config, algorithm, arguments)
    assert_agree(found, expected)
    names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "cispo_clip_ratio")
    clipped = [trainer._metrics["train"][name][-1] for name in names if name in trainer._metrics["train"]]
    assert clipped
    assert all(0 < share < 1 for share in clipped)  # some tokens are, on either side, and some are not


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        ("grpo", "seq-mean-token-mean"),
        ("dapo", "token-mean"),
        ("bnpo", "token-mean"),
        ("dr_grpo", "seq-mean-token-sum-norm"),
    ],
)
def test_the_functions_without_a_module(loss_type, mode, tmp_path):
    batch, model = rows(), policy()
    trainer = trainer_of("GRPO", tmp_path, loss_type=loss_type)
    advantages = batch.spread(group_normalize(batch.rewards, batch.group_ids))
    per_token = clipped_policy_loss(score(model, batch).logprobs, batch.old_logprobs, advantages)
    loss = aggregate(per_token, batch.response_mask, mode, max_length=LONGEST)
    loss.backward()
    found = loss.item(), {name: p.grad for name, p in model.named_parameters()}
    assert_agree(found, theirs(trainer, with_old_logprobs(scored(trainer, batch), batch)))


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_two_micro_batches_of_a_step(name, tmp_path):
    config, algorithm, arguments = CASES[name]
    found, expected, *_ = both(tmp_path, {**config, **KL[0]}, algorithm, {**arguments, **KL[1]}, micro_batches=2)
    assert_agree(found, expected)


def test_bnpo_averages_over_the_tokens_of_each_micro_batch(tmp_path):
    """TRL departs from DAPO's mean over the step's tokens, deliberately; ours does only where no counts are known."""
    config, algorithm, arguments = CASES["bnpo"]
    found, expected, *_ = both(tmp_path, config, algorithm, arguments, micro_batches=2, counted=False)
    assert_agree(found, expected)

    counted, _, *_ = both(tmp_path, config, algorithm, arguments, micro_batches=2)
    _, whole, *_ = both(tmp_path, config, algorithm, arguments)
    assert_differ(counted, expected)
    assert_agree(counted, whole)


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo"])
def test_the_unbiased_kl(name, tmp_path):
    """rho k3, with the ratio's gradient (DeepSeek-V3.2): TRL's default, and no part of GRPO's eq. 3, which is ours."""
    assert trainer_of("GRPO", tmp_path).args.use_bias_correction_kl
    config, algorithm, arguments = CASES[name]
    config = {**config, **KL[0], "use_bias_correction_kl": True}
    found, expected, *_ = both(tmp_path, config, algorithm, {**arguments, **KL[1], "kl_unbiased": True})
    assert_agree(found, expected)
    plain, *_ = both(tmp_path, config, algorithm, {**arguments, **KL[1]})
    assert_differ(plain, expected)


def test_metrics(tmp_path):
    config, algorithm, arguments = CASES["grpo, asymmetric"]
    _, _, module, trainer = both(tmp_path, {**config, **KL[0]}, algorithm, {**arguments, **KL[1]})
    found, expected = module.pop_metrics(), trainer._metrics["train"]
    names = {
        "kl_divergence": "kl",
        "entropy": "entropy",
        "clip_fraction_low": "clip_ratio/low_mean",
        "clip_fraction_high": "clip_ratio/high_mean",
        "clip_fraction": "clip_ratio/region_mean",
    }
    for mine, trls in names.items():
        assert found[mine] == pytest.approx(expected[trls][-1], rel=1e-5), mine


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo"])
def test_tokens_that_the_policy_did_not_sample(name, tmp_path):
    """A tool's output in the middle of a completion is read and not scored."""
    config, algorithm, arguments = CASES[name]
    batch = rows()
    trainer = trainer_of("GRPO", tmp_path, **config)
    inputs = with_old_logprobs(scored(trainer, batch), batch)
    hole = torch.ones_like(batch.response_mask)
    hole[1, 2:4], hole[3, 0] = False, False
    inputs |= {"tool_mask": hole.long(), "num_items_in_batch": (batch.response_mask & hole).sum()}
    module = build(algorithm, group_size=GROUP_SIZE, **arguments)
    masked = replaced(batch, response_mask=batch.response_mask & hole)
    assert_agree(ours(module, experience(module, masked)), theirs(trainer, inputs))


@pytest.mark.parametrize(("name", "share"), [("dapo", 1), ("grpo", 6 / 5), ("dr_grpo", 6 / 5)])
def test_a_truncated_completion_left_out_of_the_loss(name, share, tmp_path):
    """TRL goes on counting it as a row: its mean over completions is ours times 5/6. The mean over tokens is equal."""
    config, algorithm, arguments = CASES[name]
    batch = rows()
    cut = torch.arange(6) == 2  # the third completion, one token that is no EOS
    batch = replaced(batch, response_ids=torch.where(cut.unsqueeze(1), 5, batch.response_ids), truncated=cut)
    trainer = trainer_of("GRPO", tmp_path, mask_truncated_completions=True, **config)
    inputs = with_old_logprobs(scored(trainer, batch), batch)
    assert inputs["completion_mask"].sum(1).tolist() == [3, 7, 0, 5, 2, 6]

    module = build(algorithm, group_size=GROUP_SIZE, mask_truncated=True, **arguments)
    assert_agree(ours(module, experience(module, batch)), scaled(theirs(trainer, inputs), share))


# Advantages

GROUPS = {
    "uneven": [1.0, 0.25, -0.5, 0.5, 2.0, 0.125],
    "binary": [1.0, 0.0, 0.0, 1.0, 1.0, 0.0],
    "one group equal": [0.5, 0.5, 0.5, 0.0, 1.0, 0.0],
    "one not scorable": [1.0, math.nan, -0.5, 0.5, 2.0, 0.125],
}


@pytest.mark.parametrize("rewards", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("scale", "ours_scale"), [("group", "std"), ("batch", "batch"), ("none", "none")])
def test_advantages(scale, ours_scale, rewards, tmp_path):
    batch = rows()
    rewards = torch.tensor(rewards, dtype=torch.float64)
    batch = replaced(batch, rewards=rewards)
    expected = scored(trainer_of("GRPO", tmp_path, scale_rewards=scale), batch)["advantages"].double()
    found = group_normalize(rewards, batch.group_ids, ours_scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    module = build(GRPO, group_size=GROUP_SIZE, scale_rewards=ours_scale)
    torch.testing.assert_close(module.compute_advantages(batch)[0][:, 0], expected, rtol=1e-5, atol=1e-6)


def test_equal_rewards_that_float32_cannot_hold(tmp_path):
    """The mean of three times 0.9 is not 0.9: TRL divides the rounding error by eps = 1e-4. Ours is exactly 0."""
    batch = rows()
    rewards = torch.tensor([0.9] * 3 + [0.0, 1.0, 0.0])
    batch = replaced(batch, rewards=rewards)
    expected = scored(trainer_of("GRPO", tmp_path), batch)["advantages"]
    assert (expected[:3] != 0).any()
    assert (group_normalize(rewards, batch.group_ids)[:3] == 0).all()


# Where TRL is not an oracle


def test_left_padding_of_a_model_with_absolute_positions(tmp_path):
    """TRL passes no position ids, so GPT-2 reads a left-padded prompt shifted; ours scores it as without padding."""
    trainer = trainer_of("GRPO", tmp_path, model=tiny_model("gpt2").double(), loss_type="grpo")
    batch = rows()
    inputs = scored(trainer, batch)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    width = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width)[0].double()
    module = build(GRPO, model=tiny_model("gpt2").double())
    plain = plain_logprobs(module.models.policy, batch)
    mine = module.models.score(batch).logprobs
    short, longest = 0, int(batch.prompt_mask.sum(1).argmax())
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(found[longest], plain[longest], rtol=0, atol=1e-5)
    assert (found[short] - plain[short]).abs().max() > 1e-2


def test_the_policy_of_both_sides_is_one():
    torch.testing.assert_close(policy().state_dict(), build(GRPO).models.policy.state_dict(), rtol=0, atol=0)
