"""Validation: who judges, what is logged, on how many ranks, and what can be monitored."""

import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.checkpoint import RolloutCheckpoint
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.functional import rate_interval
from lit_rlhf.metrics import MaskedStats
from lit_rlhf.rewards import verifier
from lit_rlhf.rollouts.sampler import VALIDATION, sample_and_score
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, plain_logprobs, prompt_rows, prompts, sum_of_ids, tiny_model, trainer
from tests.pairs import pair_rows

FEW = SamplingConfig(max_new_tokens=4)


@verifier
def even(completion_ids, **kwargs):
    """Right where the tokens' sum is even; nobody can tell of completions that begin with 7."""
    return [None if ids[0] == 7 else float(sum(ids) % 2 == 0) for ids in completion_ids]


def validated(module, rows, devices=1, reward_funcs=(), **arguments):
    fitter = trainer(devices, limit_val_batches=1.0)
    fitter.validate(module, datamodule=RowsDataModule([], rows, reward_funcs, **arguments), verbose=False)
    return {name: float(value) for name, value in fitter.callback_metrics.items()}


def sampled(module, rows, group_size):
    """The completions that validation samples of so many held-out prompts."""
    module.engine.update_weights(module.models.policy, 0)
    sampling = replace(module.sampling, group_size=group_size)
    return sample_and_score(
        module.engine, module.tokenizer, module.judges, prompts(rows), sampling, module.seed, VALIDATION
    )


def test_a_run_on_another_reward_still_reports_how_often_it_is_right():
    module = build(GRPO, tiny_model(), sampling=FEW, validation_samples=3)
    found = validated(module, prompt_rows(6), reward_funcs=[even])
    rollout = sampled(module, 6, 3)
    rewards, verdicts = rollout.reward_parts.double().T
    assert module.rewards.names == ["sum_of_ids"]
    assert module.judges.names == ["sum_of_ids", "even"]
    assert found["val/reward_sampled"] == pytest.approx(float(rewards.mean()))
    assert found["val/rewards/sum_of_ids_sampled"] == found["val/reward_sampled"]
    by_prompt = verdicts.view(6, 3).nanmean(1)
    right = by_prompt[~by_prompt.isnan()]
    assert 0 < right.mean() < 1
    assert found["val/accuracy_sampled"] == pytest.approx(float(right.mean()))
    assert found["val/rewards/even_sampled"] == pytest.approx(float(verdicts.nanmean()))
    interval = rate_interval((3 * right).tolist(), [3] * len(right))
    assert found["val/accuracy_sampled_ci"] == pytest.approx(interval.half_width, abs=1e-6)
    whole = verdicts.view(6, 3)[~verdicts.view(6, 3).isnan().any(1)]
    assert found["val/pass_at_3"] == pytest.approx(float((whole.sum(1) > 0).double().mean()))
    assert found["val/response_length_sampled"] == pytest.approx(float(rollout.lengths.double().mean()))
    assert found["val/truncated_fraction_sampled"] == pytest.approx(float(rollout.truncated.double().mean()))


def test_the_names():
    module = build(GRPO, tiny_model(), sampling=FEW, validation_samples=2, kl_coef=0.1)
    of_both = {"accuracy", "reward", "rewards/sum_of_ids", "rewards/even", "response_length", "truncated_fraction"}
    names = {f"val/{name}_{how}" for name in of_both for how in ("greedy", "sampled")}
    names |= {"val/accuracy_sampled_ci", "val/pass_at_2", "val/maj_at_2", "val/kl_divergence"}
    assert validated(module, prompt_rows(3), reward_funcs=[even]).keys() == names
    plain = validated(build(SFT, tiny_model(), sampling=FEW), prompt_rows(3))
    assert plain.keys() == {n for n in names if not any(x in n for x in ("accuracy", "even", "_at_", "kl_"))}


def test_majorities_are_those_of_the_texts():
    module = build(GRPO, tiny_model(), sampling=replace(FEW, max_new_tokens=1, temperature=0.6), validation_samples=5)
    found = validated(module, prompt_rows(20), reward_funcs=[even])
    rollout = sampled(module, 20, 5)
    expected = []
    for ids, verdicts in zip(
        rollout.response_ids.view(20, 5).tolist(), rollout.reward_parts[:, 1].view(20, 5).tolist(), strict=True
    ):
        votes = {token: ids.count(token) for token in ids}
        winners = [token for token, count in votes.items() if count == max(votes.values())]
        if not any(map(math.isnan, verdicts)):
            expected.append(sum(verdicts[ids.index(token)] for token in winners) / len(winners))
    assert len(set(expected)) > 2, "ties, too"
    assert found["val/maj_at_5"] == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}, {"top_k": 3}])
def test_the_kl_is_that_of_the_sampled_tokens(sampling):
    module = build(GRPO, tiny_model(), sampling=replace(FEW, **sampling), validation_samples=2, kl_coef=0.1)
    assert validated(module, prompt_rows(4))["val/kl_divergence"] == pytest.approx(0, abs=1e-6)
    module.models.reference.load_state_dict(tiny_model(seed=1).state_dict())
    found = validated(module, prompt_rows(4))["val/kl_divergence"]
    rollout, temperature = sampled(module, 4, 2), module.sampling.temperature
    own, other = (plain_logprobs(m, rollout, temperature) for m in (module.models.policy, module.models.reference))
    delta = (other - own)[rollout.response_mask]
    assert found == pytest.approx(float((delta.exp() - 1 - delta).mean()), rel=1e-4)
    assert found > 0.1


def test_greedy_samples_have_no_kl():
    for temperature, logged in ((0.0, False), (1.0, True)):
        module = build(DPO, tiny_model(), sampling=replace(FEW, temperature=temperature))
        assert ("val/kl_divergence" in validated(module, pair_rows(2))) == logged


# given completions


def shown(rows):
    """The rows with completions of different lengths."""
    return [{**row, "completion": "7 " * (1 + i % 3) + "9"} for i, row in enumerate(rows)]


def test_held_out_demonstrations_are_read_at_their_tokens_and_not_at_their_batches():
    """Three rows in batches of two: the mean is over the tokens of all, those of the odd row too."""
    rows = [*shown(prompt_rows(3)), {**prompt_rows(1)[0], "completion": None}]
    module = build(SFT, tiny_model(), sampling=FEW, reward_funcs=None)
    found = validated(module, rows, validation_batch_size=2)
    batch = module.collate(rows[:3])
    losses = -plain_logprobs(module.models.policy, batch)[batch.response_mask]
    assert found["val/sft_loss"] == pytest.approx(float(losses.mean()), abs=1e-6)
    assert found["val/perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert set(found) == {"val/sft_loss", "val/perplexity"}


# ranks


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", ["grpo", "dpo", "reward", "sft"])
def test_two_ranks_validate_what_one_does_with_fewer_rows_than_ranks_too(name, rows):
    """Lightning leaves a rank without a batch out of what the other then waits for."""
    build_one = {
        "grpo": lambda: build(GRPO, sampling=FEW, validation_samples=2, kl_coef=0.1),
        "dpo": lambda: build(DPO, sampling=FEW),
        "reward": lambda: build(RewardModeling),
        "sft": lambda: build(SFT, sampling=FEW),
    }[name]
    data = prompt_rows(rows) if name == "grpo" else pair_rows(rows + 1)[1:]  # the first pair is one of equals
    data = shown(data) if name == "sft" else data

    def found(devices):
        torch.manual_seed(0)
        module = build_one()
        return validated(module, data, devices, [even], validation_batch_size=2)

    alone, together = found(1), found(2)
    assert alone.keys() == together.keys()
    assert alone
    for metric, value in alone.items():
        assert together[metric] == pytest.approx(value, abs=1e-6), metric


# intervals


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("rates", [[0.0, 0.5, 1.0, 0.25], [0.5, 0.5, 0.625], [1.0] * 5, [0.0], [1.0, 0.0]])
def test_the_logged_half_width_is_the_intervals(rates, samples):
    stats = MaskedStats({"rate": ("value", "ci")}, samples=samples)
    for rate in rates:
        stats.update({"rate": (torch.tensor([rate, math.nan]), torch.tensor([True, False]))})
    found = stats.compute()
    assert float(found["rate"]) == pytest.approx(sum(rates) / len(rates))
    interval = rate_interval([samples * rate for rate in rates], [samples] * len(rates))
    assert float(found["rate_ci"]) == pytest.approx(interval.half_width, abs=1e-12)


# the best checkpoint


class Scores(Callback):
    """Accuracies that rise and fall, in place of the real ones."""

    def __init__(self, accuracies):
        self.accuracies = iter(accuracies)

    def on_validation_end(self, trainer, module):
        trainer.callback_metrics["val/accuracy_sampled"] = torch.tensor(next(self.accuracies))


def test_the_best_weights_by_held_out_accuracy_are_kept(tmp_path):
    best = RolloutCheckpoint(
        every_n_epochs=2, dirpath=tmp_path, monitor="val/accuracy_sampled", mode="max", filename="best", save_last=False
    )
    module = build(GRPO, tiny_model(), group_size=2, prompts_per_rollout=2, sampling=FEW)
    callbacks = [Scores([0.2, 0.7, 0.5]), best]
    fitter = trainer(
        epochs=6, callbacks=callbacks, enable_checkpointing=True, check_val_every_n_epoch=2, limit_val_batches=1.0
    )
    fitter.fit(module, datamodule=RowsDataModule(prompt_rows(8), prompt_rows(2), [even]))
    assert [file.name for file in tmp_path.iterdir()] == ["best.ckpt"]
    assert best.best_model_score == pytest.approx(0.7)
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["lit_rlhf"]["ranks"][0]["loop"]["iteration"] == 4


def test_the_real_accuracy_can_be_monitored(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    plain = ModelCheckpoint(tmp_path, monitor="val/accuracy_sampled", mode="max", filename="best")
    module = build(GRPO, tiny_model(), group_size=2, prompts_per_rollout=2, sampling=FEW, reward_funcs=[sum_of_ids])
    fitter = trainer(epochs=2, callbacks=[plain], enable_checkpointing=True, limit_val_batches=1.0)
    fitter.fit(module, datamodule=RowsDataModule(prompt_rows(8), prompt_rows(4), [even]))
    assert 0 <= float(plain.best_model_score) <= 1
    assert (tmp_path / "best.ckpt").is_file()


@pytest.mark.parametrize("held_out", [0, 2])
def test_a_figure_that_was_never_logged_is_named_at_the_end(tmp_path, held_out):
    best = RolloutCheckpoint(dirpath=tmp_path, monitor="val/accuracy", filename="best", save_last=False)
    module = build(GRPO, tiny_model(), group_size=2, prompts_per_rollout=2, sampling=FEW)
    fitter = trainer(epochs=1, callbacks=[best], enable_checkpointing=True, limit_val_batches=1.0)
    logged = "val/response_length_greedy, .*" if held_out else "nothing"
    with pytest.warns(UserWarning, match=rf"^best.ckpt was not saved: val/accuracy was never .*logged .*{logged}$"):
        fitter.fit(module, datamodule=RowsDataModule(prompt_rows(8), prompt_rows(held_out), [even]))
    assert not list(tmp_path.iterdir())
