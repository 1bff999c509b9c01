"""What `trainer=NAME` builds, and what it says where it cannot."""

import sys
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_rlhf import strategies
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.models.output_layer import output_layer
from lit_rlhf.models.parallel import is_sharded
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, prompt_rows, tiny_model
from tests.runs import config_of


def built(*arguments):
    return instantiate(config_of(*arguments).trainer.strategy)


@pytest.mark.parametrize(("name", "kind"), [("ddp", strategies.DDPStrategy), ("fsdp2", strategies.FSDP2Strategy)])
def test_strategies_have_a_timeout(name, kind):
    strategy = built(f"trainer={name}", "trainer.strategy.timeout=7")
    assert type(strategy) is kind
    assert strategy._timeout == timedelta(seconds=7)
    assert built(f"trainer={name}")._timeout == timedelta(minutes=30)


def test_shards_are_saved_where_asked():
    assert not built("trainer=fsdp2")._save_distributed_checkpoint
    assert built("trainer=fsdp2", "trainer.strategy.save_distributed_checkpoint=true")._save_distributed_checkpoint


# DeepSpeed, which needs CUDA


@pytest.fixture
def pretended(monkeypatch):
    """As if the package and a device were there; what Lightning is asked for."""
    asked = {}
    monkeypatch.setattr(strategies, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(strategies, "DeepSpeedStrategy", lambda **arguments: asked.update(arguments))
    return asked


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_asked_for_a_stage(stage, pretended):
    built("trainer=deepspeed", f"trainer.strategy.stage={stage}", "trainer.strategy.timeout=60")
    expected = {"stage": stage, "timeout": timedelta(seconds=60)}
    assert pretended == {**expected, "offload_optimizer": False, "offload_parameters": False}
    assert config_of("trainer=deepspeed").trainer.accelerator == "gpu"


def test_what_deepspeed_lacks_is_a_sentence(pretended, monkeypatch):
    with pytest.raises(InputError, match=r"trainer.strategy.stage must be 1, 2 or 3, got 4"):
        strategies.deepspeed(stage=4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"needs a CUDA device, and there is none; write trainer=fsdp2"):
        strategies.deepspeed()
    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lit_rlhf\[deepspeed\]'"):
        strategies.deepspeed()


@pytest.fixture
def gathers(monkeypatch):
    """A stand-in for `deepspeed.zero.GatheredParameters`: weights are empty outside of it."""

    @contextmanager
    def gathered(parameters):
        for p in parameters:
            p.data = p.ds_id
        yield
        for p in parameters:
            p.data = p.new_empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.zero", SimpleNamespace(GatheredParameters=gathered))


def test_weights_that_deepspeed_holds_are_gathered_to_sample(gathers):
    module = build(GRPO, tiny_model())
    expected = {name: x.clone() for name, x in module.models.policy.state_dict().items()}
    assert output_layer(module.models.policy) is not None
    zero3 = object.__new__(DeepSpeedStrategy)
    zero3.config = {"zero_optimization": {"stage": 3}}
    module._trainer = SimpleNamespace(strategy=zero3)
    module.configure_model()
    held = module.models.policy
    for p in held.parameters():
        p.ds_id, p.data = p.data, p.new_empty(0)  # as `deepspeed.initialize` does

    assert is_sharded(held)
    assert output_layer(held) is None
    with module.models.gathered():
        plain = module.models.policy
        assert plain is not held
        assert not is_sharded(plain)
        for name, weight in plain.state_dict().items():
            assert torch.equal(weight, expected[name]), name
    assert module.models.policy is held
    assert all(p.numel() == 0 for p in (*held.parameters(), *plain.parameters()))


def test_steps_that_cannot_be_left_out_are_refused():
    module = build(GRPO, target_kl=0.1)
    module._trainer = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(InputError, match=r"algo.target_kl leaves optimiser steps out, and DeepSpeed takes every one"):
        module.training_loader(lambda i: prompt_rows(8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fsdp2", "deepspeed 2", "deepspeed 3"])
def test_a_gpu_samples_and_trains(name):
    kind, _, stage = name.partition(" ")
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'lit_rlhf[deepspeed]'")
    module = build(
        GRPO,
        tiny_model(),
        lr=1e-3,
        kl_coef=0.1,
        group_size=2,
        prompts_per_rollout=4,
        sampling=SamplingConfig(max_new_tokens=4),
    )
    before = {name: x.clone() for name, x in module.models.policy.state_dict().items()}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    strategy = strategies.deepspeed(int(stage)) if stage else strategies.FSDP2Strategy()
    fitter = Trainer(accelerator="gpu", devices=1, strategy=strategy, max_epochs=2, **quiet)
    fitter.fit(module, datamodule=RowsDataModule(prompt_rows(8)))
    with module.models.gathered("cpu"):
        after = module.models.policy.state_dict()
        assert any(not torch.equal(after[name].cpu(), x) for name, x in before.items())
