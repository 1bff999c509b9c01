"""FSDP2 beyond the matrix: ranks that fare differently, shortcuts, adapters, other architectures, export, resume."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.hf_export import HFExport
from lit_rlhf.data.modules import ArithmeticData
from lit_rlhf.errors import InputError
from lit_rlhf.models import forward
from lit_rlhf.models.adapters import LoRA, add_lora
from lit_rlhf.models.forward import Shortcuts
from lit_rlhf.models.loading import checkpoint_activations, load_tokenizer
from lit_rlhf.rewards import RewardModel
from lit_rlhf.strategies import FSDP2Strategy
from lit_rlhf.types import SamplingConfig
from tests.algorithms.ranks import ONE_RANK_EMPTY, UNEVEN, assert_same_run, on_given_rows, reported, run, run_of_four
from tests.algorithms.test_ddp import neither_rank_does, only_rank_0_tells_samples_apart
from tests.algorithms.test_strategies import RUNS, assert_bit_equal, fit, module_of, start
from tests.helpers import NumberTokenizer, build, prompt_rows, tiny_model, trainer

# ranks that fare differently


@pytest.mark.parametrize("rewards", [only_rank_0_tells_samples_apart, neither_rank_does])
def test_dynamic_sampling_on_very_unequal_ranks(rewards, tmp_path):
    arguments = {"group_size": 2, "prompts_per_rollout": 4, "max_rounds": 3, "reward_funcs": [rewards]}

    def make():
        module = build(reported(DAPO, tmp_path), sampling=SamplingConfig(max_new_tokens=3), **arguments)
        module.models.shortcuts = Shortcuts(share_prompts=False)
        return module

    expected, found = (run(make, prompt_rows(9), tmp_path, 2, epochs=3, strategy=s) for s in ("ddp", "fsdp2"))
    assert expected[0]["metrics"]["rollout/dynamic_sampling_rounds"] == 3
    assert_bit_equal(found, expected[0])
    assert [report["loop"]["numbers"] for report in found] == [report["loop"]["numbers"] for report in expected]


@pytest.mark.parametrize("lengths", [UNEVEN, ONE_RANK_EMPTY], ids=["uneven", "one rank empty"])
@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (PPO, {"value": "separate", "kl_coef": 0.3}),
        (GRPO, {"skip_zero_advantage": True, "scale_rewards": "none"}),
        (GRPO, {"kl_coef": 0.3, "kl_estimator": "full", "micro_batch_tokens": 9, "entropy_coef": 0.1}),
    ],
    ids=["critic", "skipped rows", "parts"],
)
def test_ranks_run_as_many_passes(algorithm, arguments, lengths, tmp_path, monkeypatch):
    """Passes of a rank follow its rows' lengths: here each part and each length may be one."""
    monkeypatch.setitem(forward._TOKENS_OF_A_PASS, "cpu", 2)
    same_rewards = lambda rows: replace(rows, raw_rewards=rows.raw_rewards.where(rows.group_ids > 0, 0.5))  # noqa: E731
    change = lambda rows: replace(same_rewards(rows), rewards=same_rewards(rows).raw_rewards)  # noqa: E731
    make = lambda: on_given_rows(algorithm, change)(tmp_path, lengths=lengths, **arguments)  # noqa: E731
    (expected,) = run_of_four(make, tmp_path, 1)
    begin = {name: x.clone() for name, x in make().models.state_dict().items()}
    assert_same_run(run_of_four(make, tmp_path, 2, strategy="fsdp2"), expected, begin)


def test_ranks_stop_together(tmp_path):
    arguments = {"target_kl": 1e-9, "update_epochs": 2}
    (expected,) = fit("PPO shared", tmp_path, 1, **arguments)
    assert expected["metrics"]["stability/stopped_fraction"] == 0.5
    found = fit("PPO shared", tmp_path, 2, "fsdp2", **arguments)
    assert_same_run(found, expected, start("PPO shared", tmp_path), atol=1e-6, metrics_atol=1e-5)


# trainer and model


def test_clipped_gradients_and_accumulation(tmp_path):
    clipped = {"of_trainer": {"gradient_clip_val": 0.1, "accumulate": 2}}
    (expected,) = fit("GRPO", tmp_path, 1, **clipped)
    assert expected["metrics"]["stability/grad_norm"] > 0.1
    found = fit("GRPO", tmp_path, 2, "fsdp2", **clipped)
    assert_same_run(found, expected, start("GRPO", tmp_path), atol=1e-6, metrics_atol=1e-5)


def gpt2():
    return tiny_model("gpt2")


def qwen2_checkpointed():
    model = tiny_model("qwen2", tie_word_embeddings=True)
    checkpoint_activations(model)
    return model


def adapted():
    model = tiny_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        add_lora(model, LoRA(r=2))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model


def in_bfloat16():
    return tiny_model().bfloat16()


def adapted_in_bfloat16():
    torch.manual_seed(5)
    model = in_bfloat16()
    add_lora(model, LoRA(r=2))
    return model


@pytest.mark.parametrize(
    ("model", "precision"),
    [(tiny_model, "bf16-mixed"), (in_bfloat16, "32-true"), (adapted_in_bfloat16, "32-true")],
    ids=["autocast", "weights", "frozen weights"],
)
def test_bfloat16(model, precision, tmp_path):
    """A head, and adapters, are in float32 beside weights in bfloat16."""
    algorithm, arguments = RUNS["PPO shared"]
    make = lambda: module_of(algorithm, tmp_path, model(), **arguments)  # noqa: E731
    of_run = {"epochs": 2, "precision": precision}
    expected, found = (run(make, prompt_rows(9), tmp_path, 2, strategy=s, **of_run) for s in ("ddp", "fsdp2"))
    assert_bit_equal(found, expected[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*adapters have been trained already")
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("RewardModeling", gpt2),
        ("PPO separate", gpt2),
        ("PPO separate", qwen2_checkpointed),
        ("PPO separate", adapted),
        ("SFT", adapted),
    ],
)
def test_tied_embeddings_checkpointed_activations_and_adapters(model, name, tmp_path):
    expected = fit(name, tmp_path, 2, model=model)[0]
    assert_bit_equal(fit(name, tmp_path, 2, "fsdp2", model=model), expected)


# what goes on beside the update


def test_the_reference_of_a_sharded_policy_is_cached(tmp_path):
    (ddp := tmp_path / "ddp").mkdir()
    (fsdp2 := tmp_path / "fsdp2").mkdir()
    expected = fit("DPO", tmp_path, 2, reference_cache=ddp)[0]
    assert_bit_equal(fit("DPO", tmp_path, 2, "fsdp2", reference_cache=fsdp2), expected)
    assert [file.name for file in fsdp2.iterdir()] == [file.name for file in ddp.iterdir()] != []


def test_a_reward_model_in_shards_judges_in_training_and_validation(tmp_path):
    """Three held-out prompts: a rank has fewer rows to judge than the other."""

    def make():
        torch.manual_seed(3)
        judge = RewardModeling(policy="tiny").export_model()
        judge = RewardModel(judge, tokenizer=load_tokenizer(), batch_size=1)
        arguments = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=4)}
        module = reported(GRPO, tmp_path)(policy="tiny", reward_funcs=[judge], **arguments)
        module.models.shortcuts = Shortcuts(share_prompts=False)
        return module

    found = []
    for strategy in ("ddp", "fsdp2"):
        fitter = trainer(2, strategy=strategy, limit_val_batches=1.0)
        fitter.fit(make(), datamodule=ArithmeticData(held_out=3, validation_batch_size=2))
        found.append([torch.load(tmp_path / f"2x1-{rank}.pt", weights_only=True) for rank in range(2)])
    expected = found[0][0]
    assert "val/reward_sampled" in expected["validated"]
    for report in found[1]:
        for kind in ("metrics", "validated"):
            assert report[kind] == pytest.approx(expected[kind], abs=1e-5)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(report["weights"][name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "model"), [("SFT", tiny_model), ("RewardModeling", gpt2), ("SFT", adapted)])
def test_the_model_that_is_left_is_whole(name, model, tmp_path, monkeypatch):
    monkeypatch.setattr(NumberTokenizer, "save_pretrained", lambda self, at: None, raising=False)
    for strategy in ("ddp", "fsdp2"):
        fit(name, tmp_path, 2, strategy, model, {"callbacks": [HFExport(tmp_path / strategy / "model")]})
    files = sorted(file.relative_to(tmp_path / "ddp") for file in (tmp_path / "ddp").rglob("*") if file.is_file())
    assert "model.safetensors" in [file.name for file in files]
    for file in files:
        found, expected = ((tmp_path / strategy / file).read_bytes() for strategy in ("fsdp2", "ddp"))
        assert found == expected or file.name == "adapter_config.json", file  # which lists a set


def test_compiled_passes_are_refused():
    module = build(SFT, torch_compile=True)
    module._trainer = SimpleNamespace(strategy=object.__new__(FSDP2Strategy))
    with pytest.raises(InputError, match=r"algo.torch_compile is not for sharded models"):
        module.configure_model()


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_other_ways_of_sharding_are_refused(strategy):
    module = build(SFT)
    module._trainer = SimpleNamespace(strategy=object.__new__(strategy))
    with pytest.raises(
        InputError, match=rf"trainer.strategy: {strategy.__name__} does not know these models; write tr"
    ):
        module.configure_model()
