"""A Hugging Face folder from a checkpoint: `python -m lit_rlhf.export algo=NAME model.path=BASE ckpt_path=FILE`.

The arguments are those of the run that left the checkpoint. One that lies in shards is put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lit_rlhf import cli
from lit_rlhf.errors import InputError
from lit_rlhf.train import ELSEWHERE, build_module, check_run, resolved

_EXPORTED = ("models.policy.", "models.value_head.")  # what a model in `model/` is made of


def export_checkpoint(cfg: DictConfig, folder: str | Path) -> None:
    """Give the module that `cfg` describes a checkpoint's weights, and write its model to `folder`.

    Raises:
        InputError: the checkpoint cannot be read, or is of another algorithm or model.
    """
    cli.start(cfg)
    from lit_rlhf.callbacks.hf_export import export
    from lit_rlhf.checkpoints import AtomicCheckpointIO
    from lit_rlhf.rollouts.state import check_same_model

    ckpt_path = resolved(cfg.ckpt_path)
    saved = AtomicCheckpointIO().load_checkpoint(ckpt_path)
    module = build_module(cfg)
    algorithm = saved["lit_rlhf"]["algorithm"]
    if algorithm != type(module).__name__:
        raise InputError(f"ckpt_path: {ckpt_path} is of {algorithm}, not of {type(module).__name__}; give its algo=")
    of_model, own = (
        {name: x for name, x in state.items() if name.startswith(_EXPORTED)}
        for state in (saved["state_dict"], module.state_dict())
    )
    check_same_model(of_model, own)
    module.load_state_dict(of_model, strict=False)
    export(module, folder)


def check_export(config: Mapping[str, Any]) -> None:
    """Check all that `export_checkpoint` will read, before anything heavy is imported.

    Raises:
        InputError: the first thing that cannot be used.
    """
    if config["ckpt_path"] is None:
        raise InputError("ckpt_path: give the checkpoint to export, such as ckpt_path=RUN/checkpoints/last.ckpt")
    check_run(config)


def _run(cfg: DictConfig) -> None:
    folder = Path(cli.run_folder(), "model")
    export_checkpoint(cfg, folder)
    print(folder)


def main() -> None:
    """Entry point of `python -m lit_rlhf.export`."""
    cli.main("train", check_export, _run, __doc__, ELSEWHERE)


if __name__ == "__main__":
    main()
