"""algo.micro_batch_tokens: a micro-batch in parts has the gradient, the metrics and the steps of the whole."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.errors import InputError
from lit_rlhf.models.forward import token_parts
from lit_rlhf.types import CompletionBatch, pad_left, pad_right
from tests.algorithms.ranks import assert_same_run, on_given_rows, run_of_four, start_of
from tests.algorithms.settings import ON_POLICY, assert_stats_equal, module_of, rows_for, setting_or_sft, take_stats
from tests.algorithms.test_ddp_algorithms import RUNS
from tests.algorithms.test_preference import make as preference_module
from tests.helpers import assert_gradients_equal, build
from tests.pairs import random_pairs

BUDGET = 12  # tokens; a row of the tests has up to 12


def step(module, batch):
    """Gradient and metrics of one optimiser step of one micro-batch, and how many times something was scored."""
    module.zero_grad()
    parts = module.parts.of(module, batch)
    module.begin_step(parts)
    module.training_step(batch).backward()
    found = {n: p.grad.clone() for n, p in module.models.named_parameters() if p.grad is not None}
    return found, take_stats(module), len(parts)


def assert_the_same_in_parts(make, batch):
    (expected, stats, one), (found, found_stats, parts) = (step(make(budget), batch) for budget in (None, BUDGET))
    assert (one, parts > 2) == (1, True)
    assert_gradients_equal(found, expected)
    assert_stats_equal(found_stats, stats)


@pytest.mark.parametrize("name", [*ON_POLICY, "SFT"])
def test_parts_have_the_gradient_of_the_whole(name):
    def make(budget):
        module = setting_or_sft(name)[0]
        module.parts.tokens = budget
        return module

    assert_the_same_in_parts(make, setting_or_sft(name)[1])


@pytest.mark.parametrize("name", ["dpo", "ipo", "reward"])
def test_parts_have_the_gradient_of_all_pairs(name):
    def make(budget):
        module = preference_module(name)
        module.parts.tokens = budget
        return module

    assert_the_same_in_parts(make, random_pairs())


@pytest.mark.parametrize(("devices", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("name", ["GRPO batch", "ConservativePPO"])
def test_runs_in_parts_end_with_the_weights_of_whole_steps(name, devices, accumulate, tmp_path):
    algorithm, arguments = RUNS[name]

    def make(**extra):
        return on_given_rows(algorithm)(tmp_path, **arguments, **extra)

    (expected,) = run_of_four(make, tmp_path, devices=1, epochs=2)
    found = run_of_four(lambda: make(micro_batch_tokens=BUDGET), tmp_path, devices, accumulate, epochs=2)
    assert_same_run(found, expected, start_of(make()))


def test_a_hook_of_ones_own_does_not_keep_old_gradients(tmp_path):
    class Hooked(RUNS["GRPO batch"][0]):
        def on_train_batch_start(self, batch, batch_idx):
            """Lightning's own is empty, and nobody calls it."""

    def make(algorithm, **extra):
        return on_given_rows(algorithm)(tmp_path, **RUNS["GRPO batch"][1], **extra)

    (expected,) = run_of_four(lambda: make(Hooked), tmp_path, 1, 2, epochs=3)
    found = run_of_four(lambda: make(Hooked, micro_batch_tokens=BUDGET), tmp_path, 1, 2, epochs=3)
    assert_same_run(found, expected, start_of(make(Hooked)))


def test_deepspeed_is_refused():
    module = module_of("GRPO", micro_batch_tokens=BUDGET)
    module._trainer = SimpleNamespace(strategy=object.__new__(DeepSpeedStrategy))
    with pytest.raises(InputError, match=r"algo.micro_batch_tokens: DeepSpeed counts"):
        module.parts.of(module, rows_for("GRPO", module.models.policy))


def test_a_failed_part_leaves_nothing_behind():
    module = module_of("GRPO", micro_batch_tokens=BUDGET)
    batch, losses = rows_for("GRPO", module.models.policy), []

    def fails_at_the_third(part):
        losses.append(module._loss(part))
        if len(losses) == 3:
            raise RuntimeError("out of memory")
        return losses[-1]

    with pytest.raises(RuntimeError, match="out of memory"):
        module.parts.loss(module, batch, fails_at_the_third)
    module.pop_metrics()
    expected = step(module_of("GRPO"), batch)
    found = step(module, batch)
    assert_gradients_equal(found[0], expected[0])
    assert_stats_equal(found[1], expected[1])


def test_rows_of_one_prompt_stay_together_and_the_prompt_counts_once():
    prompts = [[5, 6, 7, 8], [9], [5, 6, 7, 8], [9], [5, 6, 7, 8]]
    rows = CompletionBatch(*pad_left(prompts), *pad_right([[2], [3, 3], [4] * 3, [5] * 4, [6] * 5]))
    lists = lambda parts: [part.tolist() for part in parts]  # noqa: E731
    assert lists(token_parts(rows, 12, share_prompts=True)) == [[1, 3, 0], [2, 4]]  # 1+2+4 + 4+1, 4+3+5
    assert lists(token_parts(rows, 11, share_prompts=True)) == [[1, 3], [0, 2], [4]]
    assert lists(token_parts(rows, 13, share_prompts=False)) == [[1, 3, 0], [2], [4]]  # 3+5+5, 7, 9
    assert lists(token_parts(rows, 1, share_prompts=True)) == [[1], [3], [0], [2], [4]]
    assert lists(token_parts(rows, 1000, share_prompts=True)) == [[1, 3, 0, 2, 4]]


def test_both_completions_of_a_pair_count():
    pairs = random_pairs(chosen=(3, 7), rejected=(2, 4), prompts=(2, 5))
    whole, split = [2], [1, 1]
    sizes = lambda budget, share: [len(part) for part in token_parts(pairs, budget, share)]  # noqa: E731
    assert sizes(3 + 2 + 2 * 2 + 7 + 4 + 2 * 5, False) == whole
    assert sizes(3 + 2 + 2 * 2 + 7 + 4 + 2 * 5 - 1, False) == split
    assert sizes(3 + 2 + 2 + 7 + 4 + 5, True) == whole
    assert sizes(3 + 2 + 2 + 7 + 4 + 5 - 1, True) == split


def test_a_scalar_loss_cannot_be_taken_in_parts():
    def mean(old_logp, logp, advantages, mask):
        return -(logp * advantages * mask).sum() / mask.sum(), {}

    module = build(GRPO, policy_loss=mean, micro_batch_tokens=BUDGET)
    with pytest.raises(InputError, match=r"scalar says nothing of the parts that algo.micro_batch_tokens makes"):
        module.training_step(rows_for("GRPO", module.models.policy))


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_that_cannot_be(budget):
    with pytest.raises(InputError, match=r"algo.micro_batch_tokens must be"):
        build(GRPO, micro_batch_tokens=budget)


def test_without_a_trainer_gradients_add_up():
    """As in a training loop of one's own that forgets nothing: zero_grad comes first."""
    module = module_of("GRPO", micro_batch_tokens=BUDGET)
    batch = rows_for("GRPO", module.models.policy)
    once = step(module, batch)[0]
    module.training_step(batch).backward()
    for name, p in module.models.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * once[name], atol=1e-10, rtol=1e-9)
