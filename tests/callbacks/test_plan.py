"""The plan says what will be done, in numbers that the run then keeps to; `dry_run=true` stops there."""

import pytest

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.callbacks.plan import DryRunError, Plan, plan
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import demonstrations, fit_of
from tests.runs import QUIET, fork

SIZES = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "update_epochs": 3}


def test_it_says_what_the_run_then_does(capsys):
    arguments = {**SIZES, "sampling": SamplingConfig(max_new_tokens=4), "kl_coef": 0.1}
    module, fitter = fit_of(GRPO, arguments, 3, accumulate=2, callbacks=[Plan()])
    said = capsys.readouterr().err
    numel = sum(p.numel() for p in module.models.policy.parameters())
    assert (
        f"GRPO: LlamaForCausalLM of {numel / 1e3:.3g} thousand parameters, {numel / 1e3:.3g} thousand trained" in said
    )
    assert "a rollout: 8 prompts x 2 = 16 completions of at most 4 tokens" in said
    assert "its update: 3 x 2 = 6 optimiser steps on 8 completions each" in said
    assert "a step: 8 rows per device in 2 micro-batches, learning rate 0.01 at most" in said
    assert "the run: 3 rollouts, 18 optimiser steps" in said
    assert fitter.global_step == 18
    mb = numel * 4 / 2**20
    assert f"weights {2 * mb:,.0f} MB, gradients {mb:,.0f} MB, AdamW {2 * mb:,.0f} MB" in said, "with the reference"


def test_passes_over_pairs():
    rows = [{**row, "chosen": row["completion"], "rejected": "9"} for row in demonstrations(32)]
    module, fitter = fit_of(DPO, {"batch_size": 8, "reward_funcs": None}, 2, rows=rows)
    lines = list(plan(fitter, module))
    assert "  a pass: 4 optimiser steps on 8 rows each" in lines
    assert "  the run: 2 passes, 8 optimiser steps" in lines


def test_two_ranks_say_it_once(capfd):
    fit_of(PPO, {**SIZES, "sampling": SamplingConfig(max_new_tokens=4)}, 1, callbacks=[Plan()], devices=2)
    said = capfd.readouterr().err
    assert said.count("a rollout: 8 prompts") == 1
    assert "2 x cpu by DDPStrategy" in said
    assert "a step: 4 rows per device" in said


def test_a_dry_run_takes_no_step():
    seen = []

    class Watched(GRPO):
        def collect(self, prompts):
            seen.append(prompts)

    with pytest.raises(DryRunError):
        fit_of(Watched, SIZES, 1, callbacks=[Plan(dry_run=True)])
    assert seen == []


@pytest.mark.slow
def test_a_dry_run_from_the_command_line_leaves_next_to_nothing(tmp_path):
    ended = fork("algo=dapo", "dry_run=true", *QUIET, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "a rollout: " in ended.err
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["environment.json"]
