"""What cannot be continued is refused with a sentence; files are whole, hold no code, and survive a SIGKILL."""

import os
import resource
import signal

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.checkpoints import AtomicCheckpointIO, last_checkpoint
from lit_rlhf.errors import InputError
from lit_rlhf.train import train
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import SaveAt, assert_same, fit_of, loop_in
from tests.helpers import build
from tests.runs import QUIET, config_of, fork, metrics_of, new_process

SIZES = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "update_epochs": 2, "kl_coef": 0.1}
WHOLE = {"lit_rlhf": {}, "state_dict": {}, "loops": {}, "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2"}
SAMPLING = {"sampling": SamplingConfig(max_new_tokens=4)}


@pytest.fixture(scope="module")
def within(tmp_path_factory):
    """A checkpoint from the middle of GRPO's first rollout."""
    path = tmp_path_factory.mktemp("grpo") / "within.ckpt"
    fit_of(GRPO, {**SIZES, **SAMPLING}, 1, callbacks=[SaveAt(1, path)])
    return path


# what cannot be continued


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"algorithm": "DAPO"}, "a checkpoint of DAPO cannot continue as GRPO; choose the same algorithm"),
        ({"world": 2}, "saved by 2 processes, now there are 1; resume with the same number of devices"),
        ({"foreign": True}, "is not a checkpoint of lit_rlhf; give one of the run folder's checkpoints/"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_a_sentence(within, tmp_path, change, sentence):
    checkpoint = torch.load(within, weights_only=True)
    checkpoint["lit_rlhf"]["algorithm"] = change.get("algorithm", checkpoint["lit_rlhf"]["algorithm"])
    checkpoint["lit_rlhf"]["ranks"] *= change.get("world", 1)
    if "foreign" in change:
        del checkpoint["lit_rlhf"]
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(InputError) as caught:
        fit_of(GRPO, {**SIZES, **SAMPLING}, 1, ckpt_path=tmp_path / "changed.ckpt")
    assert sentence in str(caught.value)
    assert str(caught.value).startswith("ckpt_path: ")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"minibatches": 1}, "the run was made with algo.minibatches=2 (now 1); resume with the same"),
        ({"prompts_per_rollout": 4}, "algo.prompts_per_rollout=8 (now 4)"),
        ({"group_size": 4}, "algo.group_size=2 (now 4)"),
        ({"update_epochs": 1}, "algo.update_epochs=2 (now 1)"),
        ({"seed": 5}, "seed=7 (now 5)"),
        ({"kl_coef": 0.0}, "the checkpoint's models are not those of this run"),
    ],
)
def test_a_run_is_not_continued_with_other_sizes(within, change, sentence):
    with pytest.raises(InputError) as caught:
        fit_of(GRPO, {**SIZES, **SAMPLING, **change}, 1, ckpt_path=within)
    assert sentence in str(caught.value)


def test_the_module_refuses_what_another_library_saved():
    """Where a user's trainer reads checkpoints in its own way."""
    with pytest.raises(InputError, match="ckpt_path: not a checkpoint of lit_rlhf"):
        build(GRPO).on_load_checkpoint({"state_dict": {}})


# files


def test_a_full_disk_is_one_sentence_and_leaves_the_previous_checkpoint_as_it_was(tmp_path):
    """The system refuses to write beyond so many bytes, as a full disk does."""
    io, file = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({**WHOLE, "x": torch.ones(3)}, file)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(InputError) as caught:
            io.save_checkpoint({**WHOLE, "x": torch.zeros(100_000)}, file)
        with pytest.raises(InputError, match=r"other.ckpt could not be written \(.*\): make room$"):
            io.save_checkpoint({**WHOLE, "x": torch.zeros(100_000)}, tmp_path / "other.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    reason = "File too large): the one before it is kept; make room and resume from that"
    assert str(caught.value) == f"the checkpoint {file} could not be written ({reason}"
    assert_same(io.load_checkpoint(file), {**WHOLE, "x": torch.ones(3)})
    assert [f.name for f in tmp_path.rglob("*") if f.is_file()] == ["last.ckpt"], "nothing half written is left"


def test_a_save_replaces_the_file_and_leaves_nothing_else(tmp_path):
    io, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    for value in (1, 2):
        io.save_checkpoint({**WHOLE, "x": value}, file)
    assert io.load_checkpoint(file)["x"] == 2
    assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


class Runs:
    """What unpickles into a command."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"lit_rlhf": {}, "x": Runs()}, "evil.ckpt")
    with pytest.raises(InputError, match=r"evil.ckpt is not a readable checkpoint"):
        AtomicCheckpointIO().load_checkpoint("evil.ckpt")
    assert not (tmp_path / "ran").exists()


# ckpt_path=last


def saved(file, age=0):
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def test_last_is_the_run_folder_s_own_or_that_of_the_newest_run_before(tmp_path):
    outputs = tmp_path / "outputs"
    with pytest.raises(InputError, match=r"ckpt_path=last: there is no run with a checkpoints/last.ckpt in .*outputs"):
        last_checkpoint(outputs / "2026-01-03" / "10-00-00")
    newest = saved(outputs / "2026-01-02" / "09-00-00" / "checkpoints" / "last.ckpt", age=1)
    saved(outputs / "2026-01-02" / "11-00-00" / "checkpoints" / "last.ckpt", age=2)
    assert last_checkpoint(outputs / "2026-01-03" / "10-00-00") == newest
    own = saved(outputs / "2026-01-03" / "10-00-00" / "checkpoints" / "last.ckpt", age=9)
    assert last_checkpoint(outputs / "2026-01-03" / "10-00-00") == own


def test_last_in_a_folder_of_the_user_s_choice_is_nobody_else_s(tmp_path):
    saved(tmp_path / "other" / "checkpoints" / "last.ckpt")
    assert last_checkpoint(tmp_path / "mine") is None
    own = saved(tmp_path / "mine" / "checkpoints" / "last.ckpt")
    assert last_checkpoint(tmp_path / "mine") == own


@pytest.mark.slow
def test_the_same_command_begins_a_run_and_continues_it(tmp_path):
    arguments = ["algo=grpo", "algo.prompts_per_rollout=4", "algo.group_size=2", "data.held_out=2", *QUIET]
    arguments += ["ckpt_path=last", f"hydra.run.dir={tmp_path}/run", "preset=null"]
    first = fork(*arguments, "trainer.max_epochs=1", cwd=tmp_path)
    assert (first.code, first.err.count("there is none yet, the run begins")) == (0, 1), first.err
    second = fork(*arguments, "trainer.max_epochs=2", cwd=tmp_path)
    assert second.code == 0, second.err
    assert f"ckpt_path=last: {tmp_path}/run/checkpoints/last.ckpt" in second.err
    assert [row["rollout/iteration"] for row in metrics_of(tmp_path / "run") if "rollout/iteration" in row] == [2]
    assert loop_in(tmp_path / "run" / "checkpoints" / "last.ckpt")["iteration"] == 2


# a process killed by SIGKILL

MORTAL = '''
import os, signal
from lit_rlhf.registry import call_with_named, get_policy_loss, register_policy_loss

calls, usual = 0, os.environ["USUAL"]

@register_policy_loss(__name__, ratio=usual != "reinforce")
def mortal(old_logp, logp, advantages, mask, **named):
    """The usual loss, until the process is killed in the middle of a rollout's updates."""
    global calls
    calls += 1
    if calls == int(os.environ.get("DIES_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return call_with_named(get_policy_loss(usual), old_logp, logp, advantages, mask, **named)
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "usual", "own"),
    [
        ("dapo", "clip", []),
        ("reinforce", "reinforce", []),
        ("importance_sampling", "reinforce", ["buffer_size=2"]),
        ("conservative_ppo", "clip", ["adaptive=true", "kl_coef=0.1", "kl_target=0.1"]),
    ],
)
def test_a_run_killed_in_the_middle_of_a_rollout_continues_to_the_same_model(
    algorithm, usual, own, tmp_path, monkeypatch
):
    mortal = f"mortal_{algorithm}"
    (tmp_path / f"{mortal}.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("USUAL", usual)
    sizes = ["prompts_per_rollout=8", "group_size=4", "minibatches=2", "update_epochs=2", "lr_schedule=linear", *own]
    saving = ["every_n_train_steps=1"]
    arguments = [
        f"algo={algorithm}",
        f"plugins=[{mortal}]",
        f"algo.policy_loss={mortal}",
        "validate_first=false",
        *QUIET,
    ]
    arguments += [f"algo.{size}" for size in sizes] + [f"callbacks.checkpoint.{when}" for when in saving]
    arguments += ["data.held_out=1", "trainer.max_epochs=4", "trainer.accumulate_grad_batches=2"]

    dies_at = 8 * 2 + 4  # the third rollout's second step, of which one of two micro-batches is done
    killed = new_process(*arguments, f"hydra.run.dir={tmp_path}/killed", cwd=tmp_path, DIES_AT=str(dies_at))
    assert killed.code == -signal.SIGKILL
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    loop = loop_in(last)
    assert (loop["iteration"], loop["position"]) == (2, 2), "the last checkpoint is from the middle of the rollout"
    assert not (tmp_path / "killed" / "model").exists()

    resumed = new_process(
        *arguments, f"hydra.run.dir={tmp_path}/resumed", f"ckpt_path={last}", cwd=tmp_path, DIES_AT="0"
    )
    assert resumed.code == 0, resumed.err
    _, whole = train(config_of(*arguments, folder=tmp_path / "whole"))
    expected = whole["module"].models.policy.state_dict()
    found = whole["module"].models.policy.from_pretrained(tmp_path / "resumed" / "model").state_dict()
    assert_same(found, expected)
    start = type(whole["module"])(policy="tiny").models.policy.state_dict()
    assert any(not torch.equal(start[key], value) for key, value in expected.items()), "nothing was learnt"
