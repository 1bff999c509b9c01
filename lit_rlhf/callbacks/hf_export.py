"""Write what was trained as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from transformers import GenerationConfig

from lit_rlhf.errors import InputError
from lit_rlhf.loggers import RolloutWandbLogger
from lit_rlhf.models.adapters import is_adapted, save_adapter
from lit_rlhf.rollouts.sampler import end_token_ids

_OF_A_MODEL = ("config.json", "adapter_config.json")
_SERVING = ("do_sample", "temperature", "top_k", "top_p")  # how the base's authors serve it; greedily without effect


class HFExport(Callback):
    """At the end of the fit, save the trained model and its tokenizer to `folder`; `from_pretrained` loads them.

    LoRA adapters are merged into the model, and lie by themselves in `adapter/` beside `folder`, for `peft`. A model
    that stands there already is replaced, by one that is whole.

    Args:
        folder: where to; it is made if needed.
        merge: of a model with adapters; without, only the adapter is written.
    """

    def __init__(self, folder: str | Path, merge: bool = True) -> None:
        self.folder, self.merge = Path(folder), merge

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse, before anything is trained, what could not be written at its end.

        Raises:
            InputError: the run will leave no adapter of its own, or the folder holds something else.
        """
        adapter = is_adapted(pl_module.models.policy) and pl_module.exports_adapter
        for folder in [self.folder] * self.merge + [self.folder.parent / "adapter"] * adapter:
            names = [file.name for file in folder.iterdir()] if folder.is_dir() else [folder.name] * folder.exists()
            if names and not set(names) & set(_OF_A_MODEL):
                raise InputError(f"callbacks.export.folder: {folder} holds something else than a model; give another")
        if not self.merge and not adapter:
            raise InputError(
                f"callbacks.export.merge=false leaves an adapter alone, and {type(pl_module).__name__} has none to "
                "leave here; leave it out"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save, on the first rank, for which the others gather what they hold of a sharded model."""
        with pl_module.models.gathered("cpu", keep=trainer.is_global_zero):
            if not trainer.is_global_zero:
                return
            written = []
            if self.merge:
                export(pl_module, self.folder)
                written.append(self.folder)
            if is_adapted(pl_module.models.policy) and pl_module.exports_adapter:
                written.append(self.folder.parent / "adapter")
                _write(written[-1], pl_module, lambda at: save_adapter(pl_module.models.policy, at))
        for logger in trainer.loggers:
            if isinstance(logger, RolloutWandbLogger):
                for folder in written:
                    logger.log_exported(folder)


def export(module: Any, folder: str | Path) -> None:
    """Save the module's model, adapters merged, and its tokenizer to `folder`; the module stays as it is.

    Plain `generate` on what is loaded from there ends completions where the module's sampler does.

    Args:
        module: any algorithm, trained or with a checkpoint's `state_dict` loaded.
        folder: where to; a model that stands there already is replaced.
    """
    model = module.export_model()

    def save(at: Path) -> None:
        model.save_pretrained(at)
        if model.can_generate():
            _generation_config(module).save_pretrained(at)

    _write(Path(folder), module, save)


def _generation_config(module: Any) -> GenerationConfig:
    """The base's, but for what would make greedy completions others than the sampler's."""
    base = module.models.policy.generation_config
    ends = end_token_ids(module.models.policy, module.tokenizer, module.sampling.stop)
    return GenerationConfig(
        bos_token_id=base.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends,
        pad_token_id=module.tokenizer.pad_token_id,
        **{name: getattr(base, name) for name in _SERVING if getattr(base, name, None) is not None},
    )


def _write(folder: Path, module: Any, save: Callable[[Path], None]) -> None:
    """Save model and tokenizer under another name and rename: a folder with a model's name is a whole one."""
    parts, old = (folder.with_name(f".{folder.name}.{end}") for end in ("part", "old"))
    for left in (parts, old):
        shutil.rmtree(left, ignore_errors=True)
    parts.mkdir(parents=True)
    save(parts)
    module.tokenizer.save_pretrained(parts)
    if folder.exists():
        folder.rename(old)
    parts.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
