"""Every family trains adapters: only they move, any split and two ranks are one step, a resumed run is the same."""

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.algorithms.schedule import recommended_lr
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import adapter_parameters
from lit_rlhf.types import SamplingConfig
from tests.adapted import adapted
from tests.algorithms.ranks import assert_same_run, reported, run, start_of
from tests.algorithms.resuming import assert_same, checkpointed, demonstrations, everything
from tests.algorithms.settings import SPLITS, loss_gradients_stats, rows_for, split
from tests.helpers import (
    as_completions,
    assert_gradients_equal,
    build,
    plain_logprobs,
    prompts,
    random_experience,
    tiny_model,
    trainer,
)
from tests.pairs import pair_rows, plain_pairs, random_pairs

SAMPLED = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "sampling": SamplingConfig(max_new_tokens=4)}
RUNS = {
    "GRPO": (GRPO, {**SAMPLED, "kl_coef": 0.3, "kl_estimator": "full"}),
    "PPO": (PPO, {**SAMPLED, "kl_coef": 0.3, "value": "separate"}),
    "PPO shared": (PPO, {**SAMPLED, "kl_coef": 0.3, "value": "shared"}),
    "SFT": (SFT, {"batch_size": 8}),
    "DPO": (DPO, {"batch_size": 8, "reward_funcs": None}),
    "RewardModeling": (RewardModeling, {"batch_size": 8, "reward_funcs": None}),
}


def module_of(name, model=None, **changes):
    algorithm, arguments = RUNS[name]
    return build(algorithm, adapted(trained=False) if model is None else model, **{**arguments, **changes})


def batch_of(name, module):
    if name == "SFT":
        return as_completions(random_experience())
    return random_pairs() if name in ("DPO", "RewardModeling") else rows_for(name, module.models.policy)


def data_of(name):
    return pair_rows(32) if name in ("DPO", "RewardModeling") else demonstrations()


@pytest.mark.parametrize("name", RUNS)
def test_only_adapters_and_heads_have_gradients_and_any_split_gives_the_same(name):
    module = module_of(name, model=adapted())
    batch = batch_of(name, module)
    loss, expected, _ = loss_gradients_stats(module, batch)
    head = {"value_head.weight"} if module.models.value_head is not None else set()
    assert expected.keys() == {n for n, p in module.models.named_parameters() if p.requires_grad}
    assert {n for n in expected if "lora_" not in n} == head

    found_loss, found, _ = loss_gradients_stats(module, *split(batch, SPLITS["uneven"]))

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)


@pytest.mark.parametrize("name", RUNS)
def test_the_optimiser_holds_what_trains_and_nothing_else_moves(name):
    module = module_of(name, lr=1e-2)
    before = {n: p.clone() for n, p in module.models.named_parameters()}
    fitter = trainer(epochs=1)
    fitter.fit(module, datamodule=RowsDataModule(data_of(name)))
    held = {id(p) for group in fitter.optimizers[0].param_groups for p in group["params"]}
    moved = {n for n, p in module.models.named_parameters() if not torch.equal(p, before[n])}
    assert held == {id(p) for p in module.models.parameters() if p.requires_grad}
    assert moved == {n for n, p in module.models.named_parameters() if p.requires_grad}


# the reference: the policy without its adapters


def test_a_rollout_is_the_adapted_policys_and_its_reference_the_bases():
    module = module_of("GRPO", model=adapted())
    rows = module.collect(prompts(4))
    now, base = (plain_logprobs(m, rows) for m in (module.models.policy, tiny_model().double()))
    torch.testing.assert_close(rows.old_logprobs.double(), now, atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.ref_logprobs.double(), base, atol=1e-6, rtol=0)
    assert (now - base).abs().max() > 0.1
    greedy = SamplingConfig(max_new_tokens=4, temperature=0.0)
    again = module.engine.generate(prompts(4).prompt_ids, greedy, seed=0)
    assert not torch.equal(again.response_ids, module_of("GRPO").sample(prompts(4), greedy).response_ids)


def test_preferences_are_measured_from_the_base():
    module, batch = module_of("DPO"), random_pairs()
    assert module.training_step(batch).item() == pytest.approx(0.6931471805599453, abs=1e-12)
    module = module_of("DPO", model=adapted())
    assert module.models.reference is None
    (chosen, rejected), (ref_chosen, ref_rejected) = (
        plain_pairs(m, batch) for m in (module.models.policy, tiny_model().double())
    )
    h = (chosen - ref_chosen).sum(1) - (rejected - ref_rejected).sum(1)
    expected = -(0.1 * h).sigmoid().log().mean()
    assert module.training_step(batch).item() == pytest.approx(expected.item(), abs=1e-8)


def test_a_reference_cache_is_that_of_the_base_and_shared_with_runs_of_it(tmp_path):
    found = []
    for model in (tiny_model().double(), adapted(trained=False, r=2)):
        module = module_of("DPO", model=model, reference_cache=tmp_path, lr=1e-2)
        trainer(epochs=1).fit(module, datamodule=RowsDataModule(pair_rows(8)))
        found.append(module.collate(pair_rows(8)))
        assert len(list(tmp_path.iterdir())) == 1
    expected, _ = plain_pairs(tiny_model().double(), found[0])
    torch.testing.assert_close(found[1].ref_chosen, expected, atol=1e-6, rtol=0)
    module = module_of("DPO", model=adapted(seed=5), reference_cache=tmp_path, batch_size=4)
    with pytest.warns(UserWarning, match="adapters have been trained already"):
        trainer(epochs=1).fit(module, datamodule=RowsDataModule(pair_rows(4)))
    batch = module.collate(pair_rows(4))
    expected, _ = plain_pairs(tiny_model(seed=5).double(), batch)
    torch.testing.assert_close(batch.ref_chosen, expected, atol=1e-6, rtol=0)


# runs


@pytest.mark.parametrize("name", ["GRPO", "PPO", "DPO"])
def test_two_ranks_are_one_process(name, tmp_path):
    algorithm, arguments = RUNS[name]
    sizes = {"minibatches": 1} if "sampling" in arguments else {}

    def make():
        return build(reported(algorithm, tmp_path), adapted(trained=False), **{**arguments, **sizes})

    (expected,) = run(make, data_of(name), tmp_path, devices=1)
    found = run(make, data_of(name), tmp_path, devices=2)
    assert_same_run(found, expected, start_of(make()))


@pytest.mark.parametrize("name", ["GRPO", "PPO", "DPO"])
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(name, tmp_path):
    def fit(seed=0, ckpt_path=None, callbacks=()):
        module = module_of(name, model=adapted(trained=False, seed=seed, dtype=torch.float32), lr=1e-2, seed=7)
        fitter = trainer(epochs=2, callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        fitter.fit(module, datamodule=RowsDataModule(data_of(name)), ckpt_path=ckpt_path)
        return everything(module, fitter)

    expected = fit(callbacks=[checkpointed(tmp_path, every_n_train_steps=1)])
    assert_same(fit(seed=1, ckpt_path=tmp_path / "epoch=0-step=1.ckpt"), expected)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: adapted(alpha=6, trained=False), r"model\.lora=\{r: 3, alpha: 5\} \(now \{r: 3, alpha: 6\}\)"),
        (lambda: adapted(r=4, trained=False), r"model\.lora=\{r: 3, alpha: 5\} \(now \{r: 4, alpha: 5\}\)"),
        (lambda: tiny_model().double(), r"model\.lora=\{r: 3, alpha: 5\} \(now null\)"),
        (
            lambda: adapted(target_modules=["q_proj"], trained=False),
            r"weights differ, .*; give the same model, model\.lora",
        ),
    ],
)
def test_a_run_continues_with_the_adapters_it_was_made_with(model, sentence, tmp_path):
    trainer(epochs=1, callbacks=[checkpointed(tmp_path)], enable_checkpointing=True).fit(
        module_of("SFT"), datamodule=RowsDataModule(demonstrations())
    )
    (path,) = tmp_path.glob("*.ckpt")
    with pytest.raises(InputError, match=f"^ckpt_path: .*{sentence}"):
        trainer(epochs=2).fit(module_of("SFT", model()), datamodule=RowsDataModule(demonstrations()), ckpt_path=path)


def test_adapters_take_rates_ten_times_as_high():
    whole, lora = tiny_model().double(), adapted(trained=False)
    size = whole.num_parameters()
    assert len(adapter_parameters(lora)) > 0
    for name, usual in {
        "GRPO": recommended_lr(size),
        "DPO": recommended_lr(size),
        "SFT": 2e-5,
        "RewardModeling": 1e-5,
    }.items():
        assert module_of(name, whole).lr == pytest.approx(usual, rel=1e-12)
        assert module_of(name, lora).lr == pytest.approx(10 * usual, rel=1e-12)
        assert module_of(name, lora, lr=3e-4).lr == 3e-4
    with pytest.warns(UserWarning, match=f"that fits LoRA adapters of a policy of {size:,} parameters; leave"):
        module_of("GRPO", adapted(trained=False), lr=1e-8)
