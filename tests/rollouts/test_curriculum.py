"""Which prompts the curriculum draws, and what it remembers of them: driven by hand, without a model's samples."""

import itertools
import math
from collections import Counter

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import verifier
from lit_rlhf.rollouts.curriculum import CurriculumState, SuccessCounts, SuccessCurriculum
from lit_rlhf.rollouts.loader import PromptStream, RolloutLoader
from lit_rlhf.rollouts.state import LoopState
from lit_rlhf.types import PromptBatch, SamplingConfig
from tests.helpers import NumberTokenizer, build, pretend_trainer, sum_of_ids, tiny_model

NAN = float("nan")


@verifier
def right(completion_ids, **kwargs):
    return [float(sum(ids) % 2) for ids in completion_ids]


def rows_of(levels):
    """Row i has the prompt 2 + i; one row per level given."""
    return [{"prompt": str(2 + i), "level": level} for i, level in enumerate(levels)]


def trained(levels="aabb", algorithm=GRPO, world_size=1, rank=0, **arguments):
    """A module with a stream over rows of these levels."""
    sizes = {"group_size": 2, "prompts_per_rollout": 2, "sampling": SamplingConfig(max_new_tokens=3)}
    given = {"reward_funcs": [right], "curriculum": "success_rate", "curriculum_level": "level"}
    module = build(algorithm, tiny_model(), **{**sizes, **given, **arguments})
    pretend_trainer(module, world_size=world_size, rank=rank)
    module.training_loader(lambda i: rows_of(levels))
    return module


def drawn(module, count):
    """The rows of the next draw, and their stream positions."""
    batch = module.draw_prompts(count)
    return [ids[0] - 2 for ids in batch.prompt_ids], batch.index


def note(module, positions, rows, right):
    """How completions of these rows, drawn for these positions, did."""
    module.curriculum.note(PromptBatch([[0]] * len(positions), {}, positions, rows), torch.tensor(right))


def state_of(right, tries, level_right, level_tries, first=0):
    right, tries, level_right, level_tries = (
        torch.tensor(x, dtype=torch.float64) for x in (right, tries, level_right, level_tries)
    )
    return CurriculumState(SuccessCounts(right, tries), SuccessCounts(level_right, level_tries), first)


# what is known of the rows


def test_rates_are_shrunk_towards_the_rate_of_the_level():
    module = trained("aabb", curriculum_prior=4.0)
    state = state_of([4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 8.0, 2.0], [5.0, 0.0], [6.0, 8.0])
    # level a: (5 + 1) / (6 + 2) = 3/4; level b: (0 + 1) / (8 + 2) = 1/10
    # rows: (4 + 4 * 3/4) / (4 + 4), (0 + 4 * 3/4) / 4, (0 + 4 / 10) / (8 + 4), (0 + 4 / 10) / (2 + 4)
    assert module.curriculum.level_rates(state).tolist() == pytest.approx([0.75, 0.1])
    assert module.curriculum.rates(state).tolist() == pytest.approx([7 / 8, 3 / 4, 1 / 30, 1 / 15])


def test_without_a_column_the_rates_are_shrunk_towards_that_of_all_rows():
    module = trained("aabb", curriculum_level=None, curriculum_prior=2.0)
    state = state_of([4.0, 0.0, 0.0, 0.0], [4.0, 0.0, 4.0, 0.0], [2.0], [6.0])
    # all: (2 + 1) / (6 + 2) = 3/8; rows: (4 + 3/4) / 6, 3/8, (3/4) / 6, 3/8
    assert module.curriculum.rates(state).tolist() == pytest.approx([4.75 / 6, 0.375, 0.125, 0.375])


def test_weights_are_greatest_between_never_and_always():
    module = trained("aaaa", curriculum_prior=1e-9, curriculum_floor=0.1)
    state = state_of([0.0, 1.0, 2.0, 4.0], [4.0] * 4, [7.0], [16.0])
    # p = 0, 1/4, 1/2, 1: 4 p (1 - p) + 0.1 = 0.1, 0.85, 1.1, 0.1
    assert module.curriculum.weights(state).tolist() == pytest.approx([x / 2.15 for x in (0.1, 0.85, 1.1, 0.1)])


def test_earlier_completions_fade_when_a_row_or_its_level_is_sampled_again():
    module = trained("aabb", curriculum_decay=0.25)
    module.loop.curriculum = state_of([4.0, 2.0, 1.0, 0.0], [8.0, 4.0, 4.0, 0.0], [8.0, 4.0], [16.0, 8.0])
    rows, positions = drawn(module, 2)
    found = ([1.0, 1.0, 0.0, NAN], [0.5, 0.0, 0.0, 0.0])
    for i in (1, 0):
        note(module, [positions[i]], [rows[i]], found[i])
    module.curriculum.update(module.loop)
    expected = {name: [4.0, 2.0, 1.0, 0.0] if name == "right" else [8.0, 4.0, 4.0, 0.0] for name in ("right", "tries")}
    levels = {"right": [8.0, 4.0], "tries": [16.0, 8.0]}
    new = dict(zip(rows, ((2.0, 3.0), (0.5, 4.0)), strict=True))
    for level in {row // 2 for row in rows}:
        levels = {k: [v / 4 if i == level else v for i, v in enumerate(x)] for k, x in levels.items()}
    for row, (score, count) in new.items():
        expected["right"][row] = expected["right"][row] / 4 + score
        expected["tries"][row] = expected["tries"][row] / 4 + count
        levels["right"][row // 2] += score
        levels["tries"][row // 2] += count
    state = module.loop.curriculum
    assert {name: x.tolist() for name, x in vars(state.rows).items()} == expected
    assert {name: x.tolist() for name, x in vars(state.levels).items()} == levels
    assert state.first == 2


def test_a_row_that_nothing_is_known_of_stays_as_it_was():
    module = trained("aa")
    before = module.loop.curriculum = state_of([1.0, 3.0], [4.0, 4.0], [4.0], [8.0])
    rows, positions = drawn(module, 2)
    note(module, positions, rows, [NAN, NAN, 1.0, 1.0])
    module.curriculum.update(module.loop)
    after = module.loop.curriculum
    assert after.rows.tries[rows[0]] == before.rows.tries[rows[0]] == 4
    assert after.rows.right[rows[0]] == before.rows.right[rows[0]]
    assert after.rows.tries[rows[1]] == 4 / 2 + 2
    assert (after.levels.right, after.levels.tries) == (4 / 2 + 2, 8 / 2 + 2)


def test_completions_of_prompts_that_no_draw_brought_count_for_nothing():
    module = trained("aa")
    module.loop.curriculum = state_of([1.0, 3.0], [4.0, 4.0], [4.0], [8.0], first=10)
    module.loop.prompts_seen = 10
    drawn(module, 1)
    note(module, [3, 11, 12], (), [1.0] * 3)
    module.curriculum.update(module.loop)
    assert module.loop.curriculum.rows.tries.tolist() == [4.0, 4.0]


# the draw


def chances(weights, count):
    """Of every ordered draw of `count` rows without replacement, one after the other with these weights."""
    found = {}
    for rows in itertools.permutations(range(len(weights)), count):
        left, chance = sum(weights), 1.0
        for row in rows:
            chance *= weights[row] / left
            left -= weights[row]
        found[rows] = chance
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_are_drawn_as_one_after_the_other_by_their_weights(count):
    module = trained("aaaa", curriculum_prior=1e-9, curriculum_floor=0.1)
    found, times = Counter(), 6000
    for i in range(times):
        module.loop.prompts_seen = 4 * i
        module.loop.curriculum = state_of([0.0, 1.0, 2.0, 4.0], [4.0] * 4, [7.0], [16.0], first=4 * i)
        rows, _ = drawn(module, count)
        found[tuple(rows)] += 1
    expected = chances([0.1, 0.85, 1.1, 0.1], count)
    assert sum(expected.values()) == pytest.approx(1)
    # Pearson's statistic has mean k - 1 and variance 2 (k - 1)
    k = len(expected)
    distance = sum((found[rows] - times * chance) ** 2 / (times * chance) for rows, chance in expected.items())
    assert distance < k - 1 + 4 * math.sqrt(2 * (k - 1))
    assert found.keys() <= expected.keys()


def test_nothing_known_is_a_uniform_draw():
    module = trained("abcd")
    state = CurriculumState(SuccessCounts.none(4), SuccessCounts.none(4))
    assert module.curriculum.weights(state).tolist() == [0.25] * 4


def test_a_rollout_holds_no_row_twice_until_it_has_had_them_all():
    module = trained("ab" * 10)
    for rollout in range(3):
        taken = [drawn(module, count) for count in (8, 5, 7, 20, 3)]
        rows = [row for found, _ in taken for row in found]
        assert [i for _, index in taken for i in index] == list(range(43 * rollout, 43 * rollout + 43))
        assert sorted(rows[:20]) == sorted(rows[20:40]) == list(range(20))
        assert rows[:20] != rows[20:40]
        assert len(set(rows[40:])) == 3
        module.curriculum.update(module.loop)


def test_every_rollout_and_every_seed_has_an_order_of_its_own():
    orders = set()
    for seed in (0, 1):
        module = trained("a" * 8, seed=seed)
        for _ in range(3):
            orders.add(tuple(drawn(module, 8)[0]))
            module.curriculum.update(module.loop)
    assert len(orders) == 6


def test_ranks_draw_neighbouring_stretches_of_one_order():
    alone, ranks = trained("ab" * 6), [trained("ab" * 6, world_size=2, rank=rank) for rank in range(2)]
    for count in (3, 1, 2):
        both = [drawn(module, count) for module in ranks]
        rows, positions = drawn(alone, 2 * count)
        assert [row for found, _ in both for row in found] == rows
        assert [i for _, index in both for i in index] == positions


def test_off_it_changes_nothing():
    module = trained("ab" * 6, curriculum="none", curriculum_level=None)
    plain = PromptStream(rows_of("ab" * 6), NumberTokenizer().encode, module.seed)
    for start in range(0, 30, 5):
        assert module.draw_prompts(5) == plain.take(start, 5)
    module.collect(module.draw_prompts(2))
    assert module.loop.curriculum is None
    assert not [name for name in module.stats.compute() if name.startswith("curriculum/")]
    assert SuccessCurriculum().kind == "none"


# over a run


def learn(module, chance_of, rollouts, prompts=8, group_size=4):
    """Rollouts whose completions are right with the chance of their row; how often each row was drawn."""
    generator, counts = torch.Generator().manual_seed(0), Counter()
    for _ in range(rollouts):
        rows, positions = drawn(module, prompts)
        counts.update(rows)
        p = torch.tensor([chance_of(row) for row in rows]).repeat_interleave(group_size)
        note(module, positions, rows, torch.bernoulli(p, generator=generator).tolist())
        module.curriculum.update(module.loop)
    return counts


@pytest.mark.parametrize("column", ["level", None])
def test_what_is_never_or_always_right_sinks_and_is_not_forgotten(column):
    """Rows 0 to 19 are right half of the time, 20 to 39 never, 40 to 59 always."""
    module = trained("abc" * 20, curriculum_level=None) if column is None else trained("a" * 20 + "b" * 20 + "c" * 20)
    counts = learn(module, lambda row: (0.5, 0.0, 1.0)[row // 20], rollouts=300)
    half, never, always = (sum(counts[row] for row in range(20 * k, 20 * k + 20)) for k in range(3))
    assert half > 2 * max(never, always)
    assert min(counts[row] for row in range(60)) > 0
    p = module.curriculum.rates(module.loop.curriculum)
    assert p[20:40].max() < 0.3 < p[:20].mean() < 0.7 < p[40:].min()


def test_a_row_that_begins_to_be_right_comes_back():
    module = trained("a" * 40)
    learn(module, lambda row: 0.0 if row < 20 else 0.5, rollouts=100)
    before = module.curriculum.weights(module.loop.curriculum)[:20].sum()
    learn(module, lambda row: 0.5, rollouts=200)
    after = module.curriculum.weights(module.loop.curriculum)[:20].sum()
    assert before < 0.35
    assert after == pytest.approx(0.5, abs=0.1)


def test_a_level_that_the_rows_say_is_hopeless_takes_its_other_rows_with_it():
    module = trained("a" * 50 + "b" * 50)
    counts = learn(module, lambda row: 0.0 if row >= 50 else 0.5, rollouts=2)
    weights = module.curriculum.weights(module.loop.curriculum)
    fair, hopeless = ([row for row in range(50 * k, 50 * k + 50) if not counts[row]] for k in range(2))
    assert min(len(fair), len(hopeless)) > 30
    assert weights[hopeless].max() < weights[fair].min() / 2


def test_dynamic_sampling_draws_on_and_counts_all_that_it_sampled():
    """Every prompt is one row however many rounds sampled it, and the groups left over for later are counted once."""
    arguments = {"group_size": 2, "prompts_per_rollout": 4, "max_rounds": 4, "curriculum_decay": 1.0}
    module = trained("ab" * 20, DAPO, **arguments)
    sampled = []
    sample = module.sample
    module.sample = lambda prompts, *rest: sampled.append((prompts, sample(prompts, *rest))) or sampled[-1][1]
    carried = 0
    for _ in range(4):
        sampled.clear()
        before = module.loop.curriculum
        begun = before.rows if before else SuccessCounts.none(40)
        list(RolloutLoader(module))
        rows = [ids[0] - 2 for prompts, _ in sampled for ids in prompts.prompt_ids]
        assert len(set(rows)) == len(rows) > 0
        scores = torch.cat([rollout.raw_rewards for _, rollout in sampled]).view(-1, 2).double().sum(1)
        right, tries = begun.right.clone(), begun.tries.clone()
        for row, score in zip(rows, scores, strict=True):
            right[row] += score
            tries[row] += 2
        state = module.loop.curriculum
        assert torch.equal(state.rows.right, right)
        assert torch.equal(state.rows.tries, tries)
        assert state.levels.tries.sum() == tries.sum()
        assert state.first == module.loop.prompts_seen
        carried += module.loop.carried is not None
    assert carried, "nothing was carried over"


def test_what_is_logged_describes_the_draw():
    module = trained("aab", curriculum_prior=1e-9, curriculum_floor=1e-6)
    module.loop.curriculum = state_of([0.0, 2.0, 4.0], [4.0, 4.0, 4.0], [2.0, 4.0], [8.0, 4.0])
    rows, _ = drawn(module, 1)
    assert rows == [1]  # the others weigh a millionth
    note(module, [0], [1], [1.0, 0.0])
    cells = {name: value for name, (value, _) in module.curriculum.update(module.loop).items()}
    assert cells == pytest.approx(
        {
            "curriculum/success_rate": 0.5,
            "curriculum/drawn_success_rate": 0.5,
            "curriculum/effective_rows": 1.0,
            "curriculum/never_right_fraction": 1 / 3,
            "curriculum/always_right_fraction": 1 / 3,
            "curriculum/drawn_fraction_a": 1.0,
            "curriculum/drawn_fraction_b": 0.0,
            "curriculum/success_rate_a": 0.3,
            "curriculum/success_rate_b": 5 / 6,
        },
        abs=1e-4,
    )


def test_effective_rows_are_all_of_them_in_a_uniform_draw():
    module = trained("a" * 7)
    drawn(module, 2)
    assert module.curriculum.update(module.loop)["curriculum/effective_rows"][0] == pytest.approx(7)


# checkpoints and mistakes


def test_a_state_that_was_saved_draws_the_same_rows(tmp_path):
    module = trained("ab" * 10)
    learn(module, lambda row: row / 20, rollouts=5, prompts=4)
    drawn(module, 2)  # a refill goes on in the middle of a rollout
    torch.save(module.loop.to_plain(), tmp_path / "state.pt")
    expected = [drawn(module, 3), drawn(module, 4)]

    other = trained("ab" * 10)
    other.loop = LoopState.from_plain(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [drawn(other, 3), drawn(other, 4)] == expected


@pytest.mark.parametrize("levels", ["ab" * 9, "abc" * 6 + "ab", "a" * 20])
def test_a_state_of_other_rows_is_refused(levels):
    module, other = trained("ab" * 10), trained(levels)
    drawn(module, 2)
    other.loop = module.loop
    with pytest.raises(InputError, match="ckpt_path: the curriculum was made with 20 rows of 2 levels, now there are"):
        drawn(other, 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"reward_funcs": [sum_of_ids]},
            "needs a verifier, and none of the reward functions is one .sum_of_ids.;",
        ),
        ({"curriculum_level": "grade"}, "algo.curriculum_level=grade: the rows have no such column; .* prompt, level"),
        ({"curriculum": "easy_first"}, "algo.curriculum must be one of none, success_rate, got 'easy_first'"),
        ({"curriculum_decay": 1.5}, "algo.curriculum_decay must be from 0 to 1, got 1.5"),
        ({"curriculum_decay": -0.1}, "algo.curriculum_decay must be at least 0, got -0.1"),
        ({"curriculum_prior": 0.0}, "algo.curriculum_prior must be above 0"),
        ({"curriculum_floor": 0.0}, "algo.curriculum_floor must be above 0"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_sampled(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        trained(**arguments)
