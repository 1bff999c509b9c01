"""Runs that are stopped and continued: their checkpoints, and all that another step would depend on."""

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.data.modules import RowsDataModule
from tests.helpers import build, prompt_rows, tiny_model, trainer


def first_is_even(completion_ids, **kwargs):
    """Half of the groups of two agree: dynamic sampling has something to drop, to refill and to carry over."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def demonstrations(count=32):
    """As many steps in a pass over these as in a rollout."""
    return [{**row, "completion": row["prompt"] + " 3"} for row in prompt_rows(count)]


def checkpointed(folder, **when):
    return ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when)


def fit_of(
    algorithm,
    arguments,
    rollouts,
    accumulate=1,
    seed=0,
    ckpt_path=None,
    callbacks=(),
    devices=1,
    rows=None,
    strategy="ddp",
    logger=False,
):
    """A run; `seed` decides the weights it begins with, before a checkpoint replaces them."""
    optimisation = {"lr": 1e-2, "lr_schedule": "linear", "warmup_steps": 2, "seed": 7, "reward_funcs": [first_is_even]}
    module = build(algorithm, tiny_model(seed=seed), **{**optimisation, **arguments})
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    saving = {
        "callbacks": list(callbacks),
        "enable_checkpointing": saves,
        "plugins": [AtomicCheckpointIO()],
        "logger": logger,
    }
    fitter = trainer(devices, accumulate, rollouts, strategy, gradient_clip_val=1.0, **saving)
    fitter.fit(module, datamodule=RowsDataModule(rows or demonstrations()), ckpt_path=ckpt_path)
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


class SaveAt(Callback):
    """Saves by hand after one micro-batch, as a time limit or a user might."""

    def __init__(self, micro_batch, path):
        self.micro_batch, self.path, self.seen = micro_batch, path, 0

    def on_train_batch_end(self, trainer, module, *args):
        self.seen += 1
        if self.seen == self.micro_batch:
            trainer.save_checkpoint(self.path)


def loop_in(path, rank=0):
    """The loop state that a checkpoint holds."""
    return torch.load(path, weights_only=True)["lit_rlhf"]["ranks"][rank]["loop"]
