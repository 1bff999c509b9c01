"""The default checkpoints: every so many rollouts, at the end, and `last.ckpt` is the newest of them."""

import pytest
import torch
from lightning.pytorch import Callback

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.callbacks.checkpoint import RolloutCheckpoint
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, prompt_rows, tiny_model, trainer


class Saves(Callback):
    """What a kill after each rollout would leave behind."""

    def __init__(self, folder):
        self.folder, self.left = folder, []

    def on_train_epoch_start(self, trainer, module):
        last = self.folder / "last.ckpt"
        saved = torch.load(last, weights_only=True)["lit_rlhf"]["ranks"][0]["loop"]["iteration"] if last.exists() else 0
        self.left.append(saved)


@pytest.mark.parametrize("validated", [{}, {"check_val_every_n_epoch": 3, "limit_val_batches": 1}])
def test_the_newest_checkpoint_is_never_older_than_it_says(tmp_path, validated):
    saves = Saves(tmp_path)
    module = build(GRPO, tiny_model(), group_size=2, prompts_per_rollout=2, sampling=SamplingConfig(max_new_tokens=2))
    data = RowsDataModule(prompt_rows(8), prompt_rows(2))
    callbacks = [RolloutCheckpoint(every_n_epochs=2, dirpath=tmp_path), saves]
    fitter = trainer(epochs=7, callbacks=callbacks, enable_checkpointing=True, **validated)
    fitter.fit(module, datamodule=data)
    assert saves.left == [0, 0, 2, 2, 4, 4, 6]
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["lit_rlhf"]["ranks"][0]["loop"]["iteration"] == 7
    assert last["global_step"] == fitter.global_step
