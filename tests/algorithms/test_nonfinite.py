"""A gradient that is not finite changes no weight, on any rank; its rows are written down; too many end the run."""

import re
from itertools import pairwise

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.errors import InputError
from lit_rlhf.models.parallel import local
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import SaveAt, assert_same, everything, fit_of

SIZES = {"group_size": 2, "prompts_per_rollout": 4, "minibatches": 2, "sampling": SamplingConfig(max_new_tokens=4)}


def broken(algorithm, steps, rank=0, by=torch.nan):
    """The algorithm with a loss that is not finite in these optimiser steps, on one rank."""

    class Broken(algorithm):
        def total_loss(self, terms, weights=None):
            bad = self.trainer.global_step in steps and self.rank == rank
            return super().total_loss({name: term * (by if bad else 1.0) for name, term in terms.items()}, weights)

        def on_train_batch_start(self, batch, batch_idx):
            self.history = [
                *getattr(self, "history", []),
                [local(p.detach()).clone() for p in self.models.parameters()],
            ]

        def on_fit_end(self):
            self.history.append([local(p.detach()).clone() for p in self.models.parameters()])
            torch.save({"history": self.history}, f"{self.trainer.default_root_dir}/rank_{self.rank}.pt")

    Broken.__name__ = algorithm.__name__
    return Broken


def fit(tmp_path, monkeypatch, algorithm, rollouts=3, sizes=SIZES, **arguments):
    monkeypatch.chdir(tmp_path)  # the trainer's default folder
    return fit_of(algorithm, sizes, rollouts, **arguments)


def moved(folder, rank=0):
    """Whether each step changed any weight."""
    history = torch.load(folder / f"rank_{rank}.pt")["history"]
    return [any(not torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in pairwise(history)]


@pytest.mark.parametrize("by", [torch.nan, torch.inf])
def test_the_step_is_left_out_and_its_rows_are_written_down(tmp_path, monkeypatch, by):
    with pytest.warns(
        UserWarning, match=r"optimiser step 2 is left out: its gradient is nan; its rows lie in .*nonfinite"
    ):
        module, _ = fit(tmp_path, monkeypatch, broken(GRPO, {2}, by=by))
    assert moved(tmp_path) == [True, True, False, True, True, True]
    dump = torch.load(tmp_path / "nonfinite" / "step_2_rank_0.pt", weights_only=True)
    assert (dump["step"], dump["iteration"]) == (2, 1)
    assert dump["parameters"], "which weights' gradients were not finite"
    assert [len(rows["response_ids"]) for rows in dump["rows"]] == [4]
    assert all(torch.isfinite(p).all() for p in module.models.parameters())
    assert "skipped_steps" not in module.loop.numbers


def test_the_rows_that_brought_it_are_marked(tmp_path, monkeypatch):
    class Infinite(GRPO):
        def compute_advantages(self, rollout):
            advantages = torch.ones_like(rollout.rewards)
            if self.loop.iteration == 1:
                advantages[3] = torch.inf
            return advantages, None

    with pytest.warns(UserWarning, match="not finite in them: advantages"):
        fit(tmp_path, monkeypatch, Infinite, sizes={**SIZES, "minibatches": 1})
    dump = torch.load(tmp_path / "nonfinite" / "step_1_rank_0.pt", weights_only=True)
    (rows,) = dump["rows"]
    infinite = rows["advantages"].isinf().any(1)
    assert int(infinite.sum()) == 1
    assert torch.equal(rows["nonfinite"], infinite)


def test_log_probs_that_are_left_to_the_update_are_not_blamed(tmp_path, monkeypatch):
    sizes = {**SIZES, "minibatches": 1, "sampling": SamplingConfig(max_new_tokens=4, top_p=0.9)}
    with pytest.warns(UserWarning, match="their numbers are finite"):
        fit(tmp_path, monkeypatch, broken(GRPO, {1}), sizes=sizes)
    (rows,) = torch.load(tmp_path / "nonfinite" / "step_1_rank_0.pt", weights_only=True)["rows"]
    assert rows["unscored"].all()
    assert rows["old_logprobs"][rows["response_mask"]].isnan().all()
    assert not rows["nonfinite"].any()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_ranks_leave_out_what_is_broken_on_one(tmp_path, monkeypatch, strategy):
    fit(tmp_path, monkeypatch, broken(GRPO, {2}, rank=1), devices=2, strategy=strategy)
    for rank in range(2):
        assert moved(tmp_path, rank) == [True, True, False, True, True, True]
        assert (tmp_path / "nonfinite" / f"step_2_rank_{rank}.pt").exists()


@pytest.mark.parametrize("devices", [1, 2])
def test_rows_that_cannot_be_written_end_no_rank(tmp_path, monkeypatch, devices, recwarn):
    (tmp_path / "nonfinite").touch()  # where the folder would be
    fit(tmp_path, monkeypatch, broken(GRPO, {2}), devices=devices)
    for rank in range(devices):
        assert moved(tmp_path, rank) == [True, True, False, True, True, True]
    if devices == 1:
        said = next(str(w.message) for w in recwarn if "is left out" in str(w.message))
        assert re.search(
            r"its rows could not be written to .*nonfinite \(File exists; their numbers are finite\)", said
        )


def test_dumps_of_earlier_runs_do_not_count(tmp_path, monkeypatch):
    (folder := tmp_path / "nonfinite").mkdir()
    for step in range(100, 109):
        (folder / f"step_{step}_rank_0.pt").touch()
    sizes = {"batch_size": 8, "max_skipped_steps": 100}
    with pytest.warns(UserWarning, match="its rows are not written down, as those of 10 steps are"):
        fit(tmp_path, monkeypatch, broken(SFT, set(range(12))), rollouts=12, sizes=sizes)
    assert len([file for file in folder.iterdir() if file.stat().st_size]) == 10


@pytest.mark.parametrize("devices", [1, 2])
def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch, devices):
    with pytest.raises(Exception, match="the gradients of 3 optimiser steps in a row were not finite, the last step 3"):
        fit(tmp_path, monkeypatch, broken(GRPO, {1, 2, 3, 4, 5}, rank=devices - 1), devices=devices)
    assert len(list((tmp_path / "nonfinite").iterdir())) == 3 * devices


def test_those_apart_from_each_other_do_not(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="is left out"):
        fit(tmp_path, monkeypatch, broken(GRPO, {0, 1, 3, 5}), sizes={**SIZES, "max_skipped_steps": 3})
    assert moved(tmp_path) == [False, False, True, False, True, False]


def test_a_resumed_run_goes_on_counting(tmp_path, monkeypatch):
    path = tmp_path / "two.ckpt"
    sizes = {"batch_size": 8}
    with pytest.warns(UserWarning, match="is left out"), pytest.raises(InputError, match="3 optimiser steps in a row"):
        fit(tmp_path, monkeypatch, broken(SFT, {1, 2, 3}), sizes=sizes, callbacks=[SaveAt(3, path)])
    with pytest.raises(InputError, match="in a row were not finite, the last step 3"):
        fit(tmp_path, monkeypatch, broken(SFT, {1, 2, 3}), sizes=sizes, ckpt_path=path)


def test_a_run_with_a_step_left_out_resumes_bit_for_bit(tmp_path, monkeypatch):
    path = tmp_path / "within.ckpt"
    with pytest.warns(UserWarning, match="is left out"):
        whole = everything(*fit(tmp_path, monkeypatch, broken(GRPO, {2}), callbacks=[SaveAt(3, path)]))
    assert_same(everything(*fit(tmp_path, monkeypatch, broken(GRPO, {2}), seed=1, ckpt_path=path)), whole)
