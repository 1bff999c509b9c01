"""Runs in less than float32: sampling, scoring and clipped steps go together, and stay near those of float32."""

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, prompt_rows, tiny_model, trainer
from tests.pairs import pair_rows

ON_POLICY = {"sampling": SamplingConfig(max_new_tokens=6), "prompts_per_rollout": 4, "group_size": 4}


def fitted(algorithm, dtype, precision, **arguments):
    """Two clipped steps, or rollouts; the module and how far its weights have moved."""
    model = tiny_model().to(dtype)
    start = {name: p.detach().clone().float() for name, p in model.named_parameters()}
    module = build(algorithm, model, lr=1e-3, **arguments)
    rows = prompt_rows(8) if algorithm is not DPO else pair_rows(8)
    fitter = trainer(precision=precision, gradient_clip_val=1.0, max_epochs=2)
    fitter.fit(module, datamodule=RowsDataModule(rows))
    moved = torch.stack([(p.detach().float() - start[name]).abs().max() for name, p in model.named_parameters()])
    return module, float(moved.max()), fitter


@pytest.mark.parametrize("parts", [None, 40])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "bf16-mixed"), (torch.bfloat16, "32-true")])
@pytest.mark.parametrize(("algorithm", "arguments"), [(GRPO, ON_POLICY), (PPO, ON_POLICY), (DPO, {"batch_size": 4})])
def test_clipped_steps_in_half_precision(algorithm, arguments, dtype, precision, parts):
    module, moved, fitter = fitted(algorithm, dtype, precision, micro_batch_tokens=parts, **arguments)
    assert 1e-4 < moved < 0.1
    assert fitter.global_step >= 2
    assert all(p.isfinite().all() for p in module.models.policy.parameters())


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", None), ("16-mixed", None)])
def test_adamw_is_fused_where_lightning_can_clip_beside_it(precision, fused):
    module = build(GRPO, tiny_model())
    module._trainer = trainer()
    module._trainer.precision_plugin.precision = precision
    optimizer = module.configure_optimizers()["optimizer"]
    assert optimizer.defaults["fused"] == fused
