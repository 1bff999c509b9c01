"""The two documents that the library began with: their examples run, and every name of theirs has one of ours."""

import inspect
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import lit_rlhf
from lit_rlhf import registry
from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.schedule import check_learning_rate, learning_rate_range, recommended_lr
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.config import conf_dir, signature_of
from lit_rlhf.models.scoring import Scores
from lit_rlhf.rollouts.importance import ImportanceArgs, ImportanceCorrection
from lit_rlhf.train import check_run
from lit_rlhf.types import Experience, PreferenceBatch
from tests.helpers import build, prompts
from tests.runs import QUIET, config_of, fork
from tests.test_algorithm_pages import default_of
from tests.test_dicts import groups
from tests.test_readme import documented

TEXT = (Path(__file__).parents[1] / "docs" / "names.md").read_text()
HEADER, _, *LINES = (
    [cell.strip(" `=") for cell in line.split("|")[1:-1]] for line in TEXT.splitlines() if line.startswith("|")
)
TABLE = [dict(zip(HEADER, (cell.replace("`", "") for cell in line), strict=True)) for line in LINES]
PRESETS = {
    f"{file.parent.name}/{file.stem}": OmegaConf.to_container(OmegaConf.load(file))
    for folder in ("flux", "signal")
    for file in (conf_dir() / "experiment" / folder).glob("*.yaml")
}


def rows(kind):
    return [row for row in TABLE if row["kind"] == kind]


def named(*kinds):
    return {(row["document"], row["name"]) for row in TABLE if row["kind"] in kinds}


# the examples


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch):
    monkeypatch.setattr(registry.names, "_ADV_ESTIMATORS", dict(registry.names._ADV_ESTIMATORS))
    monkeypatch.setattr(registry.names, "_POLICY_LOSSES", dict(registry.names._POLICY_LOSSES))


FLUX = """
from flux.training.algorithms.base import (
    register_adv_estimator,
    register_policy_loss,
)

@register_adv_estimator("my_advantage")
def compute_my_advantage(rewards, mask, **kwargs):
    advantages = rewards - rewards.mean()
    returns = rewards
    return advantages, returns

@register_policy_loss("my_loss")
def compute_my_loss(old_logp, logp, advantages, mask, **kwargs):
    ratio = torch.exp(logp - old_logp)
    loss = -(ratio * advantages * mask).sum() / mask.sum()
    metrics = {"loss": loss.item()}
    return loss, metrics
"""


def run_flux():
    exec(FLUX.replace("flux.training.algorithms.base", "lit_rlhf.registry"), {"torch": torch})


@pytest.mark.filterwarnings("ignore:the policy loss returns a scalar")
def test_the_custom_algorithm_of_fluxs_document_trains_as_printed():
    run_flux()
    module = build(GRPO, policy_loss="my_loss", advantage_estimator="my_advantage", group_size=2)
    batch = groups()
    scores = module.score(module.experience_from(batch)).logprobs
    mask, old = batch["response_masks"].flatten(0, 1), batch["old_log_probs"].flatten(0, 1)
    per_row = [1.0 - 0.875, 0.5 - 0.875, 0.0 - 0.875, 2.0 - 0.875]
    terms = [a * (scores[i, t] - old[i, t]).exp() for i, a in enumerate(per_row) for t in range(4) if mask[i, t]]
    loss = module.training_step(batch)
    torch.testing.assert_close(loss, -sum(terms) / len(terms), atol=1e-12, rtol=1e-10)
    assert module.pop_metrics()["loss"] == pytest.approx(loss.item())
    sampled = module.collect(prompts(2))
    expected = -(sampled.raw_rewards - sampled.raw_rewards.mean()) @ sampled.lengths.float() / sampled.lengths.sum()
    torch.testing.assert_close(module.training_step(sampled).float(), expected, atol=1e-5, rtol=1e-5)


def test_a_name_is_registered_once():
    run_flux()
    with pytest.raises(lit_rlhf.InputError, match="advantage estimator 'my_advantage' is already registered"):
        run_flux()


# the names


SIGNAL_METRICS = """policy_loss value_loss entropy kl_divergence approx_kl clip_fraction advantage_mean advantage_std
    explained_variance value_mean return_mean reward_mean implicit_reward chosen_reward rejected_reward reward_margin
    preference_accuracy is_ratio_mean is_ratio_max is_ratio_min clipped_fraction kl_violation kl_penalty
    max_kl_threshold chosen_reward_mean rejected_reward_mean chosen_reward_std rejected_reward_std"""
SIGNAL_BATCH = """input_ids attention_mask old_log_probs rewards values old_values prompt_ids response_ids
    response_masks num_samples behavior_log_probs advantages chosen_input_ids chosen_attention_mask rejected_input_ids
    rejected_attention_mask"""
SIGNAL_ARGUMENTS = """use_gae gamma gae_lambda clip_epsilon value_loss_coef entropy_coef beta clip_value_loss
    learning_rate label_smoothing clip_ratio conservative_coef max_kl_divergence margin temperature"""
SIGNAL_CALLS = "loss_fn loss_kwargs batch_data forward_backward optim_step get_training_client reference_model"
SIGNAL_ALGORITHMS = "enhanced_ppo dpo grpo importance_sampling conservative_ppo reward_modeling causal_lm"
FLUX_ARGUMENTS = """clip_ratio kl_penalty target_kl baseline baseline_decay clip_ratio_low clip_ratio_high
    dynamic_sampling token_level_loss importance_weight decay advantage_estimator"""
FLUX_BATCH = "rewards mask old_logp logp advantages returns current_logprobs behavior_logprobs version_gap"
FLUX_CALLS = "FluxConfig algorithm algorithm_config register_adv_estimator register_policy_loss"


@pytest.mark.parametrize(
    ("document", "kind", "expected"),
    [
        ("Signal", "algorithm", SIGNAL_ALGORITHMS),
        ("Signal", "argument", SIGNAL_ARGUMENTS),
        ("Signal", "batch", SIGNAL_BATCH),
        ("Signal", "metric", SIGNAL_METRICS),
        ("Signal", "call", SIGNAL_CALLS),
        ("Flux", "algorithm", "ppo grpo dpo reinforce dapo rloo gspo"),
        ("Flux", "argument", FLUX_ARGUMENTS),
        ("Flux", "batch", FLUX_BATCH),
        ("Flux", "call", FLUX_CALLS),
    ],
)
def test_every_name_of_the_documents_has_a_row(document, kind, expected):
    assert {(document, name) for name in expected.split()} <= named(kind)


THERE = {  # the documents' own values
    "ppo": """use_gae=True gamma=0.99 gae_lambda=0.95 clip_epsilon=0.2 value_loss_coef=0.5 entropy_coef=0.01 beta=0.01
        clip_value_loss=True learning_rate=1e-5 clip_ratio=0.2 kl_penalty=0.1 target_kl=0.01""",
    "dpo": "beta=0.1 label_smoothing=0.0",
    "grpo": "beta=0.01 clip_epsilon=0.2",
    "importance_sampling": "beta=0.1 clip_ratio=10.0",
    "conservative_ppo": "conservative_coef=0.1 max_kl_divergence=0.01 clip_epsilon=0.2",
    "reward_modeling": "margin=1.0 temperature=0.1",
    "reinforce": 'baseline="moving_average" baseline_decay=0.99',
    "dapo": "clip_ratio_low=0.2 clip_ratio_high=0.28 dynamic_sampling=True token_level_loss=True",
}


def test_the_documents_values_are_theirs():
    found = {(row["algo"], f"{row['name']}={row['there']}") for row in rows("argument")}
    assert {(name, value) for name, values in THERE.items() for value in values.split()} <= found


def algorithm(name):
    return OmegaConf.load(conf_dir() / "algo" / f"{name}.yaml")


def test_algorithms_are_those_that_the_table_says():
    for row in rows("algorithm"):
        assert algorithm(row["algo"])["_target_"].endswith(f".{row['ours']}")
        assert row["ours"] in lit_rlhf.__all__
    assert {row["preset"] for row in rows("algorithm")} - {""} == set(PRESETS)


def same(value, text):
    return str(value).lower() == text or (value is None and text == "none") or float(value) == float(text)


@pytest.mark.parametrize("row", rows("argument"), ids=lambda row: f"{row['document']} {row['algo']} {row['name']}")
def test_an_argument_exists_and_has_the_values_that_the_table_says(row):
    config = algorithm(row["algo"])
    for name in row["ours"].split(", "):
        assert name in signature_of(config["_target_"]).parameters
        own = inspect.signature(ImportanceCorrection).parameters
        assert same(
            own[name].default if name in ImportanceArgs.__annotations__ else default_of(config, name), row["default"]
        )
        if row["preset"]:
            assert same(PRESETS[row["preset"]]["algo"][name], row["with it"])


def test_batches_and_metrics_are_those_that_the_table_says():
    ours = {field.name for kind in (Experience, PreferenceBatch) for field in fields(kind)} | {*Scores._fields}
    assert {name for row in rows("batch") for name in row["ours"].split(", ")} <= ours
    for row in rows("metric"):
        assert row["ours"] in documented()
        assert row["ours"].split("/")[1] == row["name"]


# the presets


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_what_the_table_says_and_no_more(name):
    known = {ours for row in rows("argument") if row["preset"] == name for ours in row["ours"].split(", ")}
    assert set(PRESETS[name].get("algo", {})) == known
    assert set(PRESETS[name]) <= {"defaults", "algo"}
    (row,) = [row for row in rows("algorithm") if row["preset"] == name]
    for others in ((), ("model.path=somewhere", "data.path=somewhere.jsonl")):
        config = config_of(f"experiment={name}", *others)
        check_run(OmegaConf.to_container(config, resolve=False))
        assert config.algo["_target_"] == algorithm(row["algo"])["_target_"]
        assert dict(config.algo).items() >= PRESETS[name].get("algo", {}).items()
    assert config_of(f"experiment={name}", "algo.lr=3e-3").algo.lr == 3e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.filterwarnings("ignore")
def test_a_preset_trains(name, tmp_path):
    assert fork(f"experiment={name}", "debug=tiny", *QUIET, cwd=tmp_path).code == 0


# learning rates


@pytest.mark.parametrize(
    ("parameters", "low", "high"),
    [
        (5e8, 5e-6, 1e-5),
        (1e9 - 1, 5e-6, 1e-5),
        (1e9, 1e-6, 5e-6),
        (7e9, 1e-6, 5e-6),
        (10e9, 5e-7, 1e-6),
        (70e9, 1e-7, 5e-7),
        (700e9, 1e-7, 5e-7),
    ],
)
def test_learning_rates_by_size(parameters, low, high):
    assert learning_rate_range(int(parameters)) == (low, high)
    assert learning_rate_range(int(parameters), lora=True) == pytest.approx((10 * low, 10 * high))


def warned(lr, parameters, lora=False):
    policy = torch.nn.Linear(parameters // 1000, 1000, bias=False, device="meta")
    if lora:
        policy.peft_config = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_learning_rate(lr, policy)
    return [str(warning.message) for warning in caught]


def test_a_learning_rate_far_from_the_policys_size_is_warned_of():
    seven = 7_000_000_000
    for lr in (None, 1.01e-7, 1e-6, 4.9e-5):
        assert warned(lr, seven) == []
    assert warned(9e-8, seven) == [
        "algo.lr=9e-08 is far from the 1e-06 to 5e-06 that fits a policy of 7,000,000,000 parameters; "
        "leave it out for 1.9e-06"
    ]
    assert len(warned(6e-5, seven)) == 1
    assert warned(6e-5, seven, lora=True) == []
    assert warned(1.8e-4, 790_000) == warned(10 * recommended_lr(790_000), 790_000) == []
    assert len(warned(2e-3, 790_000)) == 1


def test_only_learning_from_feedback_is_checked_and_said_once():
    for target, count in ((GRPO, 1), (DPO, 1), (SFT, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build(target, lr=0.5)
        assert [str(w.message).split(" is far")[0] for w in caught] == ["algo.lr=0.5"] * count
