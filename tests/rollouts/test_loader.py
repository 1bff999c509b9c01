"""The views that Lightning iterates over, driven by hand and through a fit."""

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.models.scoring import score
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.rollouts.loader import PromptLoader, PromptStream, RolloutLoader, step_counts
from lit_rlhf.rollouts.random import permutation
from lit_rlhf.rollouts.state import LoopState
from lit_rlhf.types import SamplingConfig
from tests.helpers import (
    EOS,
    PAD,
    NumberTokenizer,
    build,
    mask_of,
    pretend_trainer,
    prompt_rows,
    random_experience,
    tiny_model,
    trainer,
)

ENCODE = NumberTokenizer().encode
SHORT = SamplingConfig(max_new_tokens=4)


# the stream of prompts


@pytest.mark.parametrize("chunk", [1, 3, 7, 10])
def test_every_pass_of_the_stream_holds_each_prompt_once(chunk):
    rows = [{"prompt": str(i), "answer": str(-i)} for i in range(2, 9)]
    stream = PromptStream(rows, ENCODE, seed=3)
    taken = [stream.take(start, chunk) for start in range(0, 21 + chunk, chunk)]
    ids = [prompt[0] for batch in taken for prompt in batch.prompt_ids]
    passes = [ids[i : i + 7] for i in (0, 7, 14)]
    assert [sorted(p) for p in passes] == [list(range(2, 9))] * 3
    assert passes[0] != passes[1] != passes[2]
    assert [i for batch in taken for i in batch.index][:21] == list(range(21))
    for batch in taken:
        assert batch.columns["prompt"] == [str(p[0]) for p in batch.prompt_ids]
        assert batch.columns["answer"] == [str(-p[0]) for p in batch.prompt_ids]


def test_any_stretch_of_the_stream_can_be_taken_again():
    rows = prompt_rows(7)
    stream = PromptStream(rows, ENCODE, seed=3)
    late = stream.take(15, 4).prompt_ids
    stream.take(0, 5)
    assert stream.take(15, 4).prompt_ids == late
    assert PromptStream(rows, ENCODE, seed=3).take(15, 4).prompt_ids == late
    assert PromptStream(rows, ENCODE, seed=4).take(0, 7).prompt_ids != stream.take(0, 7).prompt_ids


def test_ranks_draw_neighbouring_stretches_of_the_stream():
    drawn = []
    for rank in range(2):
        module = pretend_trainer(build(GRPO), world_size=2, rank=rank)
        module.prompts = PromptStream(prompt_rows(20), ENCODE, 0)
        drawn.append([module.draw_prompts(3).index, module.draw_prompts(1).index, module.draw_prompts(2).index])
        assert module.loop.prompts_seen == 12
    assert drawn[0] == [[0, 1, 2], [6], [8, 9]]
    assert drawn[1] == [[3, 4, 5], [7], [10, 11]]


# the view of the rollouts


def loader_of(algorithm=GRPO, accumulate=1, world_size=1, rank=0, rows=12, **arguments):
    defaults = {"group_size": 2, "prompts_per_rollout": 12, "sampling": SHORT, "seed": 5}
    module = build(algorithm, tiny_model(), **{**defaults, **arguments})
    pretend_trainer(module, accumulate, world_size, rank)
    return module, module.training_loader(lambda i: prompt_rows(rows))


@pytest.mark.parametrize(("minibatches", "epochs", "accumulate"), [(1, 1, 1), (3, 2, 1), (2, 3, 2), (1, 2, 4)])
def test_a_rollout_is_trained_on_once_per_update_epoch(minibatches, epochs, accumulate):
    module, loader = loader_of(minibatches=minibatches, update_epochs=epochs, accumulate=accumulate)
    kept = []
    collect = module.collect
    module.collect = lambda prompts: kept.append(collect(prompts)) or kept[-1]

    batches = list(loader)

    assert len(loader) == len(batches) == minibatches * epochs * accumulate
    (experience,) = kept
    size = 24 // (minibatches * accumulate)
    assert [len(batch) for batch in batches] == [size] * len(batches)
    per_epoch = len(batches) // epochs
    wanted = sorted(key(experience, i) for i in range(24))
    orders = []
    for first in range(0, len(batches), per_epoch):
        rows = [key(batch, i) for batch in batches[first : first + per_epoch] for i in range(len(batch))]
        assert sorted(rows) == wanted
        orders.append(rows)
    assert len({tuple(order) for order in orders}) == epochs, "every pass has an order of its own"
    for first in range(0, len(batches), accumulate):
        step = batches[first : first + accumulate]
        for batch in step:
            assert batch.step_tokens == sum(int(b.response_mask.sum()) for b in step)
            assert batch.step_rows == size * accumulate
    assert all(batch.prompt_mask[:, 0].any() and batch.response_mask[:, -1].any() for batch in batches), "not trimmed"


def key(batch, i):
    """A row's contents, whatever its padding."""
    return (
        int(batch.group_ids[i]),
        tuple(batch.prompt_ids[i][batch.prompt_mask[i]].tolist()),
        tuple(batch.response_ids[i][batch.response_mask[i]].tolist()),
        tuple(batch.advantages[i][batch.response_mask[i]].tolist()),
        tuple(batch.old_logprobs[i][batch.response_mask[i]].tolist()),
    )


def test_every_rollout_takes_the_next_prompts():
    module, loader = loader_of(prompts_per_rollout=4, rows=6)
    groups = [sorted({int(g) for batch in loader for g in batch.group_ids}) for _ in range(3)]
    assert groups == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (module.loop.iteration, module.loop.position, module.loop.experience) == (3, 0, None)


def test_minibatches_are_another_plan_in_another_rollout_or_with_another_seed():
    module, _ = loader_of(minibatches=4)
    plans = {tuple(torch.cat(RolloutLoader(module).plan()).tolist())}
    module.loop.iteration = 1
    plans.add(tuple(torch.cat(RolloutLoader(module).plan()).tolist()))
    module.seed = 6
    plans.add(tuple(torch.cat(RolloutLoader(module).plan()).tolist()))
    assert len(plans) == 3


@pytest.mark.parametrize("position", range(1, 8))
def test_a_view_goes_on_where_the_state_says(position):
    arguments = {"minibatches": 2, "update_epochs": 2, "accumulate": 2, "prompts_per_rollout": 4}
    module, loader = loader_of(**arguments)
    expected, at = [], None
    for taken, batch in enumerate(loader, start=1):
        expected.append(batch)
        if taken == position:
            at = LoopState.from_plain(module.loop.to_plain())
    assert at.position == position

    resumed, loader = loader_of(**arguments)
    resumed.loop = at
    resumed.collect = None  # the rollout is in the state: sampling again would be an error

    found = list(loader)

    assert [[key(b, i) for i in range(len(b))] for b in found] == [
        [key(b, i) for i in range(len(b))] for b in expected[position:]
    ]
    assert [int(b.step_tokens) for b in found] == [int(b.step_tokens) for b in expected[position:]]


def test_counts_are_of_valid_tokens_and_of_rows_that_have_any():
    masks = [mask_of([3, 0, 1], 4), mask_of([0, 0], 2), mask_of([2], 2)]
    assert [int(x) for x in step_counts(masks)] == [6, 3]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompts_per_rollout": 5, "world_size": 2}, "prompts_per_rollout=5 does not divide over 2 devices"),
        ({"prompts_per_rollout": 3, "minibatches": 4}, "6 samples per device .* do not divide into algo.minibatches=4"),
        ({"prompts_per_rollout": 3, "minibatches": 2, "accumulate": 2}, "trainer.accumulate_grad_batches=2 parts"),
    ],
)
def test_batch_sizes_that_do_not_divide_are_refused_with_a_sentence(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        loader_of(**arguments)


# passes over demonstrations


def sft(rows, batch_size, **trainer_numbers):
    module = pretend_trainer(build(SFT, tiny_model(), batch_size=batch_size), **trainer_numbers)
    data = [{"prompt": "5 6", "completion": str(10 + i)} for i in range(rows)]
    return module, module.training_loader(lambda i: data)


def demonstrated(batches):
    return [int(row) - 10 for batch in batches for row in batch.response_ids[:, 0]]


def test_a_pass_holds_every_demonstration_at_most_once():
    module, loader = sft(11, 4)
    passes = []
    for iteration in range(3):
        assert module.loop.iteration == iteration
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        rows = demonstrated(batches)
        assert len(set(rows)) == len(rows) == 8
        passes.append(tuple(rows))
    assert len(set(passes)) == 3
    assert set().union(*passes) == set(range(11)), "what one pass leaves out another has"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_share_a_pass_and_its_steps(accumulate):
    found = [list(sft(16, 8, accumulate=accumulate, world_size=2, rank=rank)[1]) for rank in range(2)]
    alone = list(sft(16, 8)[1])
    assert [len(batches) for batches in found] == [2 * accumulate] * 2
    assert sorted(demonstrated(found[0] + found[1])) == list(range(16))
    for step, whole in enumerate(alone):  # the same rows make the same step however many ranks and micro-batches
        mine = [b for batches in found for b in batches[step * accumulate : (step + 1) * accumulate]]
        assert sorted(demonstrated(mine)) == sorted(demonstrated([whole]))
    assert [int(batch.step_tokens) for batch in alone] == [16, 16]  # a token and EOS each
    assert [int(batch.step_rows) for batch in alone] == [8, 8]


@pytest.mark.parametrize(
    ("rows", "batch_size", "numbers", "sentence"),
    [
        (16, 6, {"accumulate": 2, "world_size": 2}, "batch_size=6 does not divide over 2 devices"),
        (3, 4, {}, "3 demonstrations do not fill one batch of algo.batch_size=4"),
    ],
)
def test_demonstrations_that_do_not_fit_are_refused_with_a_sentence(rows, batch_size, numbers, sentence):
    with pytest.raises(InputError, match=sentence):
        sft(rows, batch_size, **numbers)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_held_out_prompts_are_shared_out_without_overlap(world_size):
    rows = [{"prompt": str(i)} for i in range(2, 9)]
    loaders = [PromptLoader(rows, ENCODE, 2, rank, world_size) for rank in range(world_size)]
    assert all(len(list(loader)) == len(loader) for loader in loaders)
    assert len({len(loader) for loader in loaders}) == 1, "a rank without a batch would not wait for the others"
    every = [batch for loader in loaders for batch in loader]
    assert [batch.index for batch in every if batch.filler] == [[0]] * (2 if world_size == 3 else 0)
    batches = [batch for batch in every if not batch.filler]
    assert sorted(p[0] for batch in batches for p in batch.prompt_ids) == list(range(2, 9))
    assert sorted(i for batch in batches for i in batch.index) == list(range(7))
    assert all(p[0] - 2 == i for batch in batches for p, i in zip(batch.prompt_ids, batch.index, strict=True))
    assert all(len(batch) <= 2 for batch in batches)


def test_a_permutation_is_a_function_of_its_seeds():
    assert permutation(50, 1, 2).tolist() == permutation(50, 1, 2).tolist()
    assert sorted(permutation(50, 1, 2).tolist()) == list(range(50))
    assert permutation(50, 1, 2).tolist() != permutation(50, 2, 1).tolist()


# staleness: which weights sampled what is trained on


def fingerprint(model):
    return [float(p.detach().double().sum()) for p in model.parameters()]


class RecordingEngine(TransformersEngine):
    """Remembers the weights that every version sampled with."""

    def __init__(self):
        super().__init__(range(EOS, 12), PAD)
        self.weights, self.fingerprints, self.now = {}, {}, 0

    def generate(self, prompt_ids, sampling, seed):
        self.weights[self.version] = {name: p.clone() for name, p in self.model.state_dict().items()}
        self.fingerprints[self.version] = fingerprint(self.model)
        return super().generate(prompt_ids, sampling, seed)


def watched(algorithm):
    class Watched(algorithm):
        def training_step(self, batch, batch_idx=0):
            self.seen.append((batch_idx, batch, fingerprint(self.models.policy), self.stats.compute()))
            return super().training_step(batch, batch_idx)

        def publish(self, stats, extra=None):
            self.published.append({name: float(value) for name, value in stats.compute().items()} | dict(extra or {}))
            return super().publish(stats, extra)

    return Watched


def watch_a_fit(algorithm, epochs=3, accumulate=1, rows=40, **arguments):
    engine = RecordingEngine()
    defaults = {"group_size": 2, "prompts_per_rollout": 4, "minibatches": 2, "sampling": SHORT, "lr": 0.02}
    module = build(watched(algorithm), tiny_model(), engine=engine, **{**defaults, **arguments})
    module.seen, module.published = [], []
    trainer(epochs=epochs, accumulate=accumulate).fit(module, datamodule=RowsDataModule(prompt_rows(rows)))
    return module, engine


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("algorithm", [GRPO, DAPO])
def test_every_rollout_is_sampled_by_the_weights_that_begin_to_train_on_it(algorithm, accumulate):
    module, engine = watch_a_fit(algorithm, accumulate=accumulate)

    firsts = [(batch, weights) for batch_idx, batch, weights, _ in module.seen if batch_idx == 0]

    assert len(firsts) == 3
    assert len({tuple(weights) for _, weights in firsts}) == 3, "the policy must move between rollouts"
    for rollout, (batch, weights) in enumerate(firsts):
        assert engine.fingerprints[rollout] == weights
        fresh = batch[batch.version == rollout]
        assert len(fresh)
        if algorithm is GRPO:
            assert len(fresh) == len(batch)
    assert sorted(engine.fingerprints) == [0, 1, 2]
    assert module.trainer.global_step == 6


@pytest.mark.parametrize("accumulate", [1, 2])
def test_on_policy_the_first_step_of_every_rollout_has_ratios_of_one(accumulate):
    """The log-probs taken while sampling are those of the weights that the update starts from."""
    module, _ = watch_a_fit(GRPO, minibatches=1, accumulate=accumulate)
    assert len(module.published) == 3
    for values in module.published:
        assert values["stability/ratio_max"] == pytest.approx(1, abs=1e-4)
        assert values["stability/ratio_min"] == pytest.approx(1, abs=1e-4)
        assert values["rollout/staleness_max"] == 0
        assert values["stability/grad_norm"] > 0


def test_groups_that_dapo_carries_over_are_exactly_one_version_behind():
    module, engine = watch_a_fit(DAPO, reward_funcs=[parity], max_rounds=4, minibatches=1, epochs=6)
    carried = 0
    for rollout, (_, batch, weights, _) in enumerate(module.seen):
        assert engine.fingerprints[rollout] == weights
        age = rollout - batch.version
        assert set(age.tolist()) <= {0, 1}
        assert module.published[rollout]["rollout/staleness_max"] == int(age.max())
        assert module.published[rollout]["rollout/staleness"] == pytest.approx(float(age.float().mean()))
        assert (batch.staleness == age).all()
        for version in set(batch.version.tolist()):
            rows = batch[batch.version == version]
            valid = rows.response_mask
            for found, weights_of in ((rows.behavior_logprobs, version), (rows.old_logprobs, rollout)):
                model = tiny_model()  # those that sampled the row; those that the update starts from
                model.load_state_dict(engine.weights[weights_of])
                with torch.no_grad():
                    expected = score(model, rows).logprobs
                torch.testing.assert_close(found[valid], expected[valid], atol=1e-4, rtol=0)
        carried += int((age == 1).sum())
    assert carried >= 4, "nothing was carried over: the test tests nothing"


def parity(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def test_metrics_of_a_rollout_are_published_once_and_start_anew():
    module, _ = watch_a_fit(GRPO, epochs=2)
    assert [values["rollout/iteration"] for values in module.published] == [1, 2]
    for rollout, values in enumerate(module.published):
        rows = [batch for _, batch, _, _ in module.seen[2 * rollout : 2 * rollout + 2]]
        lengths = torch.cat([batch.response_mask.sum(1) for batch in rows]).float()
        rewards = torch.cat([batch.raw_rewards for batch in rows])
        assert values["rollout/response_length"] == pytest.approx(float(lengths.mean()), abs=1e-6)
        assert values["rollout/response_length_max"] == float(lengths.max())
        assert values["reward/reward_mean"] == pytest.approx(float(rewards.mean()), abs=1e-6)
        assert values["reward/reward_std"] == pytest.approx(float(rewards.std()), abs=1e-6)
        truncated = torch.cat([batch.truncated for batch in rows]).float()
        assert values["rollout/truncated_fraction"] == pytest.approx(float(truncated.mean()), abs=1e-6)


def test_the_loop_state_survives_as_plain_tensors():
    experience = random_experience()
    state = LoopState(3, 2, 17, experience, None)
    plain = state.to_plain()
    assert all(isinstance(v, (int, dict, list, type(None))) for v in plain.values())
    back = LoopState.from_plain(plain)
    assert (back.iteration, back.position, back.prompts_seen, back.carried) == (3, 2, 17, None)
    assert all((getattr(back.experience, n) == x).all() for n, x in plain["experience"].items() if x is not None)
    back.finish_iteration()
    assert (back.iteration, back.position, back.experience) == (4, 0, None)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_that_skips_rows_without_advantage_ends_at_the_same_weights(accumulate):
    def fit(skip):
        module = build(
            watched(GRPO),
            tiny_model().double(),
            engine=RecordingEngine(),
            reward_funcs=[parity],
            skip_zero_advantage=skip,
            group_size=2,
            prompts_per_rollout=8,
            minibatches=2,
            sampling=SHORT,
            lr=1e-3,
        )
        module.seen, module.published = [], []
        trainer(epochs=3, accumulate=accumulate).fit(module, datamodule=RowsDataModule(prompt_rows(40)))
        return module

    whole, skipping = fit(False), fit(True)
    trained = [sum(len(batch) for _, batch, *_ in module.seen) for module in (whole, skipping)]
    assert trained[1] < trained[0] == 3 * 16
    start = tiny_model().double().state_dict()
    for name, weight in whole.models.policy.state_dict().items():
        assert not torch.equal(weight, start[name]) or "norm" in name or "rotary" in name
        torch.testing.assert_close(skipping.models.policy.state_dict()[name], weight, atol=1e-9, rtol=1e-7)
