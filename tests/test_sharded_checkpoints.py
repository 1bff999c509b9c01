"""Checkpoints of sharded runs: a file that any run could have written, or a folder of every rank's shards."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch

from lit_rlhf import checkpoints, sharded_checkpoints
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.checkpoints import AtomicCheckpointIO, last_checkpoint
from lit_rlhf.errors import InputError
from lit_rlhf.models.parallel import whole
from lit_rlhf.sharded_checkpoints import is_sharded_checkpoint, load_merged, map_leaves
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import assert_same, checkpointed, everything, fit_of

ROLLOUTS = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "sampling": SamplingConfig(max_new_tokens=4)}
CRITIC = {"value": "separate", "kl_coef": 0.1, "update_epochs": 1}
RUNS = {"PPO": (PPO, {**ROLLOUTS, **CRITIC}), "SFT": (SFT, {"batch_size": 8})}
STEP = 3


def fit(name, folder, strategy, **resumed):
    """A run with a checkpoint in its midst; what its second rank ended with."""

    class Told(RUNS[name][0]):
        def on_fit_end(self):
            found = everything(self, self.trainer)
            found = map_leaves(found, lambda x: whole(x) if isinstance(x, torch.Tensor) else x)
            torch.save(found, folder / f"end-{self.rank}.pt")

    Told.__name__ = name
    saves = [checkpointed(folder, every_n_train_steps=STEP)]
    fit_of(Told, RUNS[name][1], 3, devices=2, strategy=strategy, callbacks=saves, **resumed)
    return torch.load(folder / "end-1.pt", weights_only=True)


def checkpoint_in(folder):
    return next(path for path in folder.iterdir() if f"step={STEP}" in path.name)


@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp2 in shards"])
def test_a_resumed_run_ends_as_if_it_had_not_been_stopped(strategy, tmp_path):
    expected = fit("PPO", tmp_path, strategy)
    path = checkpoint_in(tmp_path)
    assert is_sharded_checkpoint(path) == (strategy != "fsdp2")
    (tmp_path / "resumed").mkdir()
    assert_same(fit("PPO", tmp_path / "resumed", strategy, ckpt_path=str(path), seed=5), expected)


def test_put_together_it_is_the_file_that_ddp_writes_and_reads(tmp_path):
    """But for the rounding of the norm that gradients are clipped by."""
    found, ends = [], []
    for strategy in ("ddp", "fsdp2", "fsdp2 in shards"):
        (folder := tmp_path / strategy).mkdir()
        ends.append(fit("SFT", folder, strategy)["weights"])
        loaded = AtomicCheckpointIO().load_checkpoint(checkpoint_in(folder))
        found.append({name: loaded[name] for name in ("state_dict", "optimizer_states", "lr_schedulers", "lit_rlhf")})
    of_ddp, of_fsdp2, put_together = found
    assert_same(put_together, of_fsdp2)
    shapes = [{i: x["exp_avg"].shape for i, x in one["optimizer_states"][0]["state"].items()} for one in found]
    assert shapes == [shapes[0]] * 3

    (tmp_path / "resumed").mkdir()
    path = str(checkpoint_in(tmp_path / "fsdp2 in shards"))
    ends.append(fit("SFT", tmp_path / "resumed", "ddp", ckpt_path=path, seed=5)["weights"])
    pairs = [(of_fsdp2["state_dict"], of_ddp["state_dict"]), *((end, ends[0]) for end in ends)]
    for weights, expected in pairs:
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=0)


# folders that are not whole, or not honest


@pytest.fixture
def saved(tmp_path):
    """What two ranks with two rows each would have written."""
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    torch.save({"lit_rlhf": {}}, folder / "rest.pt")
    for rank in range(2):
        shard = {"shard": torch.full((2, 3), float(rank)), "of": [4, 3]}
        own = {"state_dict": {"weight": shard, "bias": torch.ones(1)}}
        own["optimizer_states"] = [{"state": {0: {"m": shard}}}]
        torch.save(own, folder / f"rank-{rank:05d}-of-00002.pt")
    return folder


def test_shards_one_behind_the_other_are_the_whole(saved):
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0]).unsqueeze(1).expand(4, 3)
    merged = load_merged(saved)
    assert torch.equal(merged["state_dict"]["weight"], expected)
    assert torch.equal(merged["state_dict"]["bias"], torch.ones(1))
    assert torch.equal(merged["optimizer_states"][0]["state"][0]["m"], expected)
    assert merged["lit_rlhf"] == {}


def test_a_missing_or_broken_file_is_a_sentence(saved):
    second = saved / "rank-00001-of-00002.pt"
    second.write_bytes(second.read_bytes()[:200])
    with pytest.raises(InputError, match=r"rank-00001-of-00002.pt is not a readable checkpoint"):
        load_merged(saved)
    second.unlink()
    with pytest.raises(InputError, match=r"no whole checkpoint: it has 1 of 2 ranks' files"):
        load_merged(saved)


def test_files_of_different_checkpoints_are_a_sentence(saved):
    torch.save({"state_dict": {"other": torch.ones(1)}}, saved / "rank-00001-of-00002.pt")
    with pytest.raises(InputError, match=r"the files in .*last.ckpt are not of one checkpoint"):
        load_merged(saved)
    torch.save([1], saved / "rank-00001-of-00002.pt")
    with pytest.raises(InputError, match=r"rank-00001-of-00002.pt is no part of a checkpoint"):
        load_merged(saved)


class Runs:
    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize("file", ["rest.pt", "rank-00001-of-00002.pt"])
def test_nothing_in_a_folder_is_run(file, saved, capsys):
    (saved / file).write_bytes(pickle.dumps(Runs()))
    with pytest.raises(InputError, match="is not a readable checkpoint"):
        load_merged(saved)
    assert capsys.readouterr().out == ""


def test_where_one_rank_cannot_write_all_say_so_and_the_one_before_is_kept(saved, monkeypatch):
    def full(content, file):
        raise OSError(28, "No space left on device")

    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    monkeypatch.setattr(sharded_checkpoints, "write_durably", full)
    with pytest.raises(InputError, match=r"could not be written \(.*No space left on device, on rank 0\)"):
        sharded_checkpoints.save_sharded({"state_dict": {}}, saved, 0, 1)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before

    monkeypatch.undo()
    monkeypatch.setattr(sharded_checkpoints, "gather_objects", lambda own: [own, "said by rank 1"])
    with pytest.raises(InputError, match="said by rank 1"):
        sharded_checkpoints.save_sharded({"state_dict": {}}, saved, 0, 2)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


# a checkpoint takes the place of another


WHOLE = {"lit_rlhf": {}, "state_dict": {}, "loops": {}, "epoch": 0, "global_step": 2, "pytorch-lightning_version": "2"}


def killed_at_the_last_rename(save, monkeypatch):
    """`save`, ended where what stood under the name has been put aside and the new one has not got it yet."""

    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save()


def sharded(path):
    sharded_checkpoints.save_sharded({**WHOLE, "state_dict": {"new": torch.ones(1)}}, path, 0, 1)


def single(path):
    AtomicCheckpointIO().save_checkpoint({**WHOLE, "state_dict": {"new": torch.ones(1)}}, path)


@pytest.mark.parametrize(("before", "save"), [("shards", sharded), ("shards", single), ("file", sharded)])
def test_a_kill_between_two_checkpoints_loses_neither(before, save, saved, tmp_path, monkeypatch):
    (run := tmp_path / "run" / "checkpoints").mkdir(parents=True)
    path = run / "last.ckpt"
    if before == "shards":
        saved.rename(path)
    else:
        AtomicCheckpointIO().save_checkpoint(WHOLE, path)
    expected = AtomicCheckpointIO().load_checkpoint(path)
    killed_at_the_last_rename(lambda: save(path), monkeypatch)
    found = last_checkpoint(run.parent)
    assert found is not None, "ckpt_path=last finds it"
    for given in (found, path):
        assert_same(AtomicCheckpointIO().load_checkpoint(given), expected)

    def full(content, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        for module in (sharded_checkpoints, checkpoints):
            patched.setattr(module, "write_durably", full)
        with pytest.raises(InputError, match="the one before it is kept; make room and resume from that"):
            save(path)
    assert_same(AtomicCheckpointIO().load_checkpoint(path), expected)
    save(path)
    assert "new" in AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
    assert [x.name for x in run.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_no_checkpoint_is_left_alone(tmp_path):
    (path := tmp_path / "last.ckpt").mkdir()
    (path / "mine").touch()
    with pytest.raises(InputError, match="could not be written: a folder that is none has its name"):
        single(path)
    with pytest.raises(InputError, match="could not be written: a folder that is none has its name"):
        sharded(path)
    assert (path / "mine").exists()


def test_what_cannot_get_the_name_leaves_what_has_it(saved, monkeypatch):
    before = sorted(file.name for file in saved.iterdir())

    def fails(self, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", fails)
    for save in (sharded, single):
        with pytest.raises(InputError, match="the one before it is kept; put that right and resume from that"):
            save(saved)
        assert sorted(file.name for file in saved.iterdir()) == before


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), r"\(Disk quota exceeded\): make room$"),
        (OSError(errno.EACCES, "Permission denied"), r"\(Permission denied\): put that right$"),
        (RuntimeError("unexpected pos 64"), r"\(unexpected pos 64\): put that right$"),
    ],
)
def test_room_is_asked_for_where_there_is_none(error, sentence, tmp_path, monkeypatch):
    def fails(content, file):
        raise error

    monkeypatch.setattr(checkpoints, "write_durably", fails)
    with pytest.raises(InputError, match=sentence):
        single(tmp_path / "last.ckpt")
