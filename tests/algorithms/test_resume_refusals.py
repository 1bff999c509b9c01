"""What cannot be continued is refused with a sentence; files are whole, hold no code, and survive a SIGKILL."""

import signal

import pytest
import torch

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.errors import InputError
from lit_rlhf.train import train
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import SaveAt, assert_same, fit_of, loop_in
from tests.helpers import build
from tests.runs import QUIET, config_of, new_process

SIZES = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "update_epochs": 2, "kl_coef": 0.1}
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


def test_a_broken_save_leaves_the_previous_checkpoint_as_it_was(tmp_path, monkeypatch):
    io, file = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"lit_rlhf": {}, "x": torch.ones(3)}, file)

    def half(checkpoint, path):
        path.write_bytes(b"half a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        io.save_checkpoint({"lit_rlhf": {}, "x": torch.zeros(3)}, file)
    monkeypatch.undo()
    assert_same(io.load_checkpoint(file), {"lit_rlhf": {}, "x": torch.ones(3)})


def test_a_save_replaces_the_file_and_leaves_nothing_else(tmp_path):
    io, file = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    for value in (1, 2):
        io.save_checkpoint({"lit_rlhf": {}, "x": value}, file)
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
