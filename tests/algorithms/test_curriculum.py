"""Runs with a curriculum: killed and continued, on two ranks, and with every way to sample."""

import pytest
import torch

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.importance_sampling import ImportanceSampling
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.reinforce import REINFORCE
from lit_rlhf.algorithms.remax import ReMax
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import verifier
from lit_rlhf.types import SamplingConfig
from tests.algorithms.ranks import assert_same_run, reported, run, start_of
from tests.algorithms.resuming import SaveAt, assert_same, everything, fit_of, loop_in
from tests.helpers import build, prompt_rows, tiny_model, trainer


@verifier
def is_even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def rows_of(count=30):
    """Of two levels."""
    return [{**row, "level": i % 2} for i, row in enumerate(prompt_rows(count))]


ROLLOUTS, ACCUMULATE = 4, 2
CURRICULUM = {"curriculum": "success_rate", "curriculum_level": "level", "reward_funcs": [is_even]}
SIZES = {"prompts_per_rollout": 4, "minibatches": 1, "update_epochs": 2, "sampling": SamplingConfig(max_new_tokens=3)}
SETTINGS = {
    "GRPO": (GRPO, {"group_size": 2}),
    "GRPO without levels": (GRPO, {"group_size": 2, "curriculum_level": None}),
    "DAPO": (DAPO, {"group_size": 2, "max_rounds": 3}),
    "REINFORCE of one sample": (REINFORCE, {"group_size": 1}),
    "ReMax": (ReMax, {"group_size": 1}),
    "ImportanceSampling": (ImportanceSampling, {"group_size": 2, "buffer_size": 2}),
    "PPO": (PPO, {"group_size": 1, "value": "shared"}),
}
WHERE = {"within a rollout": 6, "within a step": 7, "between two": 8}  # of four micro-batches each


def fit(name, rows=None, **arguments):
    algorithm, own = SETTINGS[name]
    return fit_of(algorithm, {**SIZES, **CURRICULUM, **own}, ROLLOUTS, ACCUMULATE, rows=rows or rows_of(), **arguments)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run per setting that saves at every stop, and how it ended."""
    known = {}

    def ended(name):
        if name not in known:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp("run")
            known[name] = folder, everything(*fit(name, callbacks=[SaveAt(at, folder / w) for w, at in WHERE.items()]))
        return known[name]

    return ended


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(uninterrupted, name, where):
    folder, expected = uninterrupted(name)
    assert_same(everything(*fit(name, seed=1, ckpt_path=folder / where)), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_completion_that_was_judged_is_in_the_state(uninterrupted, name):
    folder, expected = uninterrupted(name)
    early, late = loop_in(folder / "within a rollout"), expected["loop"]
    assert early["curriculum"]["rows"]["tries"].sum() > 0
    for loop in (early, late):
        counts = loop["curriculum"]
        assert counts["first"] == loop["prompts_seen"] >= 4 * loop["iteration"]
        assert (counts["rows"]["right"] <= counts["rows"]["tries"]).all()
    assert late["curriculum"]["rows"]["tries"].count_nonzero() > early["curriculum"]["rows"]["tries"].count_nonzero()


def test_what_is_known_of_the_rows_decides_how_the_run_goes_on(uninterrupted, tmp_path):
    """Otherwise equal weights would not prove that it came back."""
    folder, expected = uninterrupted("GRPO")
    checkpoint = torch.load(folder / "between two", weights_only=True)
    counts = checkpoint["lit_rlhf"]["ranks"][0]["loop"]["curriculum"]["rows"]
    counts["right"], counts["tries"] = counts["right"].flip(0), counts["tries"].flip(0)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    module, _ = fit("GRPO", ckpt_path=tmp_path / "other.ckpt")
    weights = expected["weights"]
    assert not all(torch.equal(weights[key], weight) for key, weight in module.state_dict().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": rows_of(28)}, "ckpt_path: the curriculum was made with 30 rows of 2 levels, now there are 28 of 2"),
        ({"name": "GRPO without levels"}, r"ckpt_path: .* algo.curriculum_level=level \(now None\); resume with the"),
    ],
)
def test_other_rows_or_levels_cannot_be_resumed_with(uninterrupted, change, sentence):
    folder, _ = uninterrupted("GRPO")
    with pytest.raises(InputError, match=sentence):
        fit(**{"name": "GRPO", "ckpt_path": folder / "between two", **change})


def test_a_run_without_a_curriculum_is_not_resumed_with_one(tmp_path):
    plain = {**SIZES, "group_size": 2, "reward_funcs": [is_even]}
    fit_of(GRPO, plain, 1, ACCUMULATE, rows=rows_of(), callbacks=[SaveAt(4, tmp_path / "plain.ckpt")])
    with pytest.raises(InputError, match=r"algo.curriculum=none \(now success_rate\)"):
        fit("GRPO", ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.parametrize("algorithm", [GRPO, REINFORCE])
def test_two_ranks_draw_and_learn_as_one(algorithm, tmp_path):
    arguments = {**SIZES, **CURRICULUM, "group_size": 2, "update_epochs": 1}
    make = lambda: build(reported(algorithm, tmp_path), tiny_model().double(), **arguments)  # noqa: E731
    (expected,) = run(make, rows_of(9), tmp_path, devices=1, epochs=4)
    found = run(make, rows_of(9), tmp_path, devices=2, epochs=4)
    counts = expected["loop"]["curriculum"]
    assert 0 < counts["rows"]["right"].sum() < counts["rows"]["tries"].sum()
    for report in (expected, *found):
        assert_same(report["loop"]["curriculum"], counts)
        report["loop"]["numbers"] = {k: round(v, 6) for k, v in report["loop"]["numbers"].items()}
    assert_same_run(found, expected, start_of(make()), atol=1e-6, metrics_atol=1e-5)
    assert any(name.startswith("curriculum/") for name in expected["metrics"])


def test_two_ranks_of_dynamic_sampling_know_the_same_and_draw_no_row_twice(tmp_path):
    """The refills of two ranks are others than those of one, since a rank fills its own share."""
    arguments = {**SIZES, **CURRICULUM, "group_size": 2, "update_epochs": 1, "curriculum_decay": 1.0}
    make = lambda: build(reported(DAPO, tmp_path), tiny_model().double(), **arguments)  # noqa: E731
    first, second = run(make, rows_of(40), tmp_path, devices=2, epochs=1)
    assert_same(first["loop"]["curriculum"], second["loop"]["curriculum"])
    tries = first["loop"]["curriculum"]["rows"]["tries"]
    assert tries.max() == 2
    assert tries.sum() == 2 * first["loop"]["prompts_seen"] > 2 * 4


def test_levels_that_the_rows_do_not_have_are_told_before_the_first_validation():
    module = build(GRPO, tiny_model(), **SIZES, **{**CURRICULUM, "curriculum_level": "grade"}, group_size=2)
    module.validation_step = lambda *_: pytest.fail("validated")
    data = RowsDataModule(rows_of(), prompt_rows(2))
    with pytest.raises(InputError, match=r"algo.curriculum_level=grade: the rows have no such column; they have"):
        trainer(limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
