"""A run that was killed and continued ends with the very weights of one that was not."""

import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.train import train
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, prompt_rows, tiny_model, trainer
from tests.runs import QUIET, config_of, new_process

ROLLOUTS, STEPS = 3, 4  # optimiser steps per rollout: 2 passes of 2 minibatches
ON_POLICY = {
    "group_size": 2,
    "prompts_per_rollout": 8,
    "minibatches": 2,
    "update_epochs": 2,
    "sampling": SamplingConfig(max_new_tokens=4),
}
SETTINGS = {
    "grpo": (GRPO, {**ON_POLICY, "kl_coef": 0.1}),  # with a reference, which must come back too
    "dapo": (DAPO, {**ON_POLICY, "max_rounds": 3}),
    "sft": (SFT, {"batch_size": 8}),
}


def first_is_even(completion_ids, **kwargs):
    """Half of the groups of two agree: dynamic sampling has something to drop, to refill and to carry over."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def rows():
    """32 demonstrations, so that a pass has as many steps as a rollout."""
    return [{**row, "completion": row["prompt"] + " 3"} for row in prompt_rows(32)]


def checkpointed(folder, **when):
    return ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when)


def fit(name, accumulate=1, seed=0, ckpt_path=None, callbacks=(), devices=1, change=()):
    """A run; `seed` decides the weights it begins with, before a checkpoint replaces them."""
    algorithm, arguments = SETTINGS[name]
    optimisation = {"lr": 1e-2, "lr_schedule": "linear", "warmup_steps": 2, "seed": 7, "reward_funcs": [first_is_even]}
    module = build(algorithm, tiny_model(seed=seed), **{**optimisation, **arguments, **dict(change)})
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    saving = {"callbacks": list(callbacks), "enable_checkpointing": saves, "plugins": [AtomicCheckpointIO()]}
    fitter = trainer(devices, accumulate, ROLLOUTS, gradient_clip_val=1.0, **saving)
    fitter.fit(module, datamodule=RowsDataModule(rows()), ckpt_path=ckpt_path)
    return module, fitter


def tensors_of(value, path=""):
    """Everything in nested containers, by path."""
    if isinstance(value, dict):
        return {k: v for key, child in value.items() for k, v in tensors_of(child, f"{path}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return tensors_of(dict(enumerate(value)), path)
    return {path: value}


def assert_same(found, expected):
    found, expected = tensors_of(found), tensors_of(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value
        assert same, key


def everything(module, fitter):
    """All that another step would depend on."""
    return {
        "weights": module.state_dict(),
        "optimizer": fitter.optimizers[0].state_dict(),
        "schedule": fitter.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
        "loop": module.loop.to_plain(),
        "steps": (fitter.global_step, fitter.current_epoch),
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """One run per setting, which saves after every step and after every rollout, and how it ended."""
    known = {}

    def run(name, accumulate):
        if (name, accumulate) not in known:
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp(f"{name}{accumulate}")
            steps = checkpointed(folder / "steps", every_n_train_steps=1)
            rollouts = checkpointed(folder / "rollouts", every_n_epochs=1)
            ended = fit(name, accumulate, callbacks=[steps, rollouts])
            assert ended[1].global_step == ROLLOUTS * STEPS
            known[name, accumulate] = folder, everything(*ended)
        return known[name, accumulate]

    return run


WITHIN = [f"steps/epoch=1-step={STEPS + 1}.ckpt", f"steps/epoch=1-step={STEPS + 2}.ckpt"]
BETWEEN = [f"steps/epoch=1-step={2 * STEPS}.ckpt", f"rollouts/epoch=1-step={2 * STEPS}.ckpt"]


@pytest.mark.parametrize("checkpoint", [*WITHIN, *BETWEEN])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(uninterrupted, name, accumulate, checkpoint):
    folder, expected = uninterrupted(name, accumulate)
    resumed = fit(name, accumulate, seed=1, ckpt_path=folder / checkpoint)
    assert_same(everything(*resumed), expected)


def test_the_runs_compared_do_depend_on_where_they_begin(uninterrupted):
    """Otherwise equal weights at the end would prove nothing."""
    _, expected = uninterrupted("dapo", 1)
    other = everything(*fit("dapo", seed=1))
    assert not any(torch.equal(other["weights"][name], w) for name, w in expected["weights"].items() if w.ndim > 1)


def test_two_ranks_resume_each_with_their_own_rollout(tmp_path):
    whole, _ = fit("dapo", devices=2, callbacks=[checkpointed(tmp_path, every_n_train_steps=1)])
    within = tmp_path / f"epoch=1-step={STEPS + 1}.ckpt"
    first, second = (rank["loop"]["experience"] for rank in torch.load(within, weights_only=True)["lit_rlhf"]["ranks"])
    assert not torch.equal(first["group_ids"], second["group_ids"])
    resumed, _ = fit("dapo", devices=2, seed=1, ckpt_path=within)
    assert_same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("name", list(SETTINGS))
def test_a_checkpoint_holds_tensors_and_plain_containers_and_nothing_that_runs(uninterrupted, name):
    folder, _ = uninterrupted(name, 1)
    plain = (torch.Tensor, int, float, bool, str, type(None))
    for file in folder.rglob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=True)
        odd = {path: type(v) for path, v in tensors_of(checkpoint).items() if not isinstance(v, (*plain, dict, list))}
        assert not odd


def test_a_checkpoint_within_a_rollout_holds_the_rollout_and_one_between_does_not(uninterrupted):
    folder, _ = uninterrupted("dapo", 1)
    loops = {f: torch.load(folder / f, weights_only=True)["lit_rlhf"]["ranks"][0]["loop"] for f in [*WITHIN, *BETWEEN]}
    assert [(loop["iteration"], loop["position"]) for loop in loops.values()] == [(1, 1), (1, 2), (2, 0), (2, 0)]
    assert [loop["experience"] is None for loop in loops.values()] == [False, False, True, True]
    assert all(loop["carried"] is not None for loop in loops.values()), "no group was carried over"


class SaveAt(Callback):
    """Saves by hand after one micro-batch, as a time limit or a user might."""

    def __init__(self, micro_batch, path):
        self.micro_batch, self.path, self.seen = micro_batch, path, 0

    def on_train_batch_end(self, trainer, module, *args):
        self.seen += 1
        if self.seen == self.micro_batch:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("extra", [1, 3])
def test_a_checkpoint_within_an_optimiser_step_goes_back_to_its_beginning(uninterrupted, tmp_path, name, extra):
    _, expected = uninterrupted(name, 2)
    path = tmp_path / "odd.ckpt"
    fit(name, 2, callbacks=[SaveAt(2 * STEPS + extra, path)])
    loop = torch.load(path, weights_only=True)["lit_rlhf"]["ranks"][0]["loop"]
    assert loop["position"] == extra, "the checkpoint is not from within a step"
    assert_same(everything(*fit(name, 2, seed=1, ckpt_path=path)), expected)


def test_the_metrics_of_a_rollout_survive_a_stop_in_its_middle(uninterrupted, tmp_path):
    class Published(SaveAt):
        def on_train_epoch_start(self, trainer, module):
            self.rows = getattr(self, "rows", [])
            publish = module.publish
            module.publish = lambda stats, extra=None: (
                self.rows.append({k: float(v) for k, v in stats.compute().items()}) or publish(stats, extra)
            )

    whole, rest = Published(0, None), Published(0, None)
    folder, _ = uninterrupted("grpo", 1)
    fit("grpo", 1, callbacks=[whole])
    fit("grpo", 1, seed=1, callbacks=[rest], ckpt_path=folder / WITHIN[1])
    assert "reward/reward_mean" in rest.rows[0]
    assert rest.rows[0] in whole.rows


# what cannot be continued


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("grpo", {"algorithm": "DAPO"}, "a checkpoint of DAPO cannot continue as GRPO; choose the same algorithm"),
        ("grpo", {"world": 2}, "saved by 2 processes, now there are 1; resume with the same number of devices"),
        ("grpo", {"foreign": True}, "is not a checkpoint of lit_rlhf; give one of the run folder's checkpoints/"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_a_sentence(uninterrupted, tmp_path, name, change, sentence):
    folder, _ = uninterrupted(name, 1)
    checkpoint = torch.load(folder / WITHIN[0], weights_only=True)
    checkpoint["lit_rlhf"]["algorithm"] = change.get("algorithm", checkpoint["lit_rlhf"]["algorithm"])
    checkpoint["lit_rlhf"]["ranks"] *= change.get("world", 1)
    if "foreign" in change:
        del checkpoint["lit_rlhf"]
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(InputError) as caught:
        fit(name, ckpt_path=tmp_path / "changed.ckpt")
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
def test_a_run_is_not_continued_with_other_sizes(uninterrupted, change, sentence):
    folder, _ = uninterrupted("grpo", 1)
    with pytest.raises(InputError) as caught:
        fit("grpo", ckpt_path=folder / WITHIN[0], change=change)
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
from lit_rlhf.registry import get_policy_loss, register_policy_loss

calls = 0

@register_policy_loss("mortal")
def mortal(old_logp, logp, advantages, mask, clip_ratio_low, clip_ratio_high):
    """The usual loss, until the process is killed in the middle of a rollout's updates."""
    global calls
    calls += 1
    if calls == int(os.environ.get("DIES_AT", 0)):
        os.kill(os.getpid(), signal.SIGKILL)
    return get_policy_loss("clip")(old_logp, logp, advantages, mask, clip_ratio_low, clip_ratio_high)
'''


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_a_rollout_continues_to_the_same_model(tmp_path, monkeypatch):
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    sizes = ["prompts_per_rollout=8", "group_size=4", "minibatches=2", "update_epochs=2", "lr_schedule=linear"]
    saving = ["every_n_train_steps=1"]
    arguments = ["algo=dapo", "plugins=[mortal]", "algo.policy_loss=mortal", "validate_first=false", *QUIET]
    arguments += [f"algo.{size}" for size in sizes] + [f"callbacks.checkpoint.{when}" for when in saving]
    arguments += ["data.held_out=1", "trainer.max_epochs=4", "trainer.accumulate_grad_batches=2"]

    dies_at = 8 * 2 + 4  # the third rollout's second step, of which one of two micro-batches is done
    killed = new_process(*arguments, f"hydra.run.dir={tmp_path}/killed", cwd=tmp_path, DIES_AT=str(dies_at))
    assert killed.code == -signal.SIGKILL
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    loop = torch.load(last, weights_only=True)["lit_rlhf"]["ranks"][0]["loop"]
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
