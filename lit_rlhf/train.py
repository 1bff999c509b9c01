"""Train one algorithm: `python -m lit_rlhf.train algo=dapo`.

It builds data, module, callbacks, loggers and trainer as the arguments say, and calls fit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lit_rlhf import cli
from lit_rlhf.config import (
    check_config,
    check_elsewhere,
    check_log_model,
    check_targets,
    check_top_level,
    signature_of,
)
from lit_rlhf.errors import InputError, check_number

ELSEWHERE = {  # what `train` itself hands over, and the key that decides it
    "algo.policy": "model.path=...",
    "algo.tokenizer": "tokenizer=...",
    "algo.reward_funcs": "reward.funcs=[...]",
    "algo.reward_weights": "reward.weights=[...]",
    "algo.sampling": "rollout.max_new_tokens=... and the like",
    "algo.engine": "engine=...",
    "algo.seed": "seed=...",
    "trainer.callbacks": "callbacks.NAME._target_=...",
    "trainer.logger": "logger.NAME._target_=...",
    "rollout.group_size": "algo.group_size=...",
    "engine.eos_token_ids": "rollout.stop=[...]",
    "engine.stop_token_ids": "rollout.stop=[...]",
    "engine.pad_token_id": "tokenizer=...",
}
_TOP_LEVEL_KINDS = {"validate_first": (bool,), "dry_run": (bool,), "ckpt_path": (str, type(None))}
_SMALLEST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "log_every_n_steps": 0, "gradient_clip_val": 0}
_POSITIVE = ("val_check_interval", "limit_train_batches")
_NEEDED = ("algo", "data", "engine", "model", "reward", "rollout", "trainer")  # groups that every run instantiates
_GIVEN = ("policy", "tokenizer", "reward_funcs", "sampling", "engine", "seed")  # what `train` hands to the algorithm


def train(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Build everything that `cfg` describes and fit.

    Returns:
        The last metrics that callbacks can monitor, and the objects by name; `before` are the metrics of the start.
    """
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from lightning.pytorch.loggers import Logger

    from lit_rlhf.callbacks.plan import DryRunError
    from lit_rlhf.rollouts.engines import close_engine

    cli.start(cfg)
    cfg.ckpt_path = resolved(cfg.ckpt_path)
    data = cli.build(cfg, "data", LightningDataModule)
    module = build_module(cfg)
    loggers = [] if cfg.dry_run else _present(cfg.get("logger"))
    trainer = cli.build(
        cfg,
        "trainer",
        Trainer,
        callbacks=[cli.build(cfg, f"callbacks.{name}", Callback) for name in _present(cfg.get("callbacks"))],
        logger=[cli.build(cfg, f"logger.{name}", Logger) for name in loggers],
    )
    if trainer.is_global_zero and not cfg.dry_run:
        cli.save_config(cfg, cli.run_folder())
    for logger in trainer.loggers:
        logger.log_hyperparams(cli.recorded(cfg))
    before: dict[str, float] = {}
    try:
        if cfg.validate_first and not cfg.ckpt_path and not cfg.dry_run:
            trainer.validate(module, datamodule=data, verbose=False)
            before = {name: float(value) for name, value in trainer.callback_metrics.items()}
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path)
        if module.validated_at != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
    except DryRunError:
        pass
    finally:
        close_engine(module.engine)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, {"data": data, "module": module, "trainer": trainer, "before": before}


def build_module(cfg: DictConfig) -> Any:
    """The algorithm that `cfg` describes.

    Raises:
        InputError: it describes something else.
    """
    from torch import nn

    from lit_rlhf.algorithms.base import RLHFModule
    from lit_rlhf.models.wrapper import tokenizer_for
    from lit_rlhf.rewards import DataRewards, RewardFunctions
    from lit_rlhf.types import SamplingConfig

    policy = cli.build(cfg, "model", nn.Module)
    algorithm = instantiate(cfg.algo, _partial_=True, **_functions(cfg.algo))
    if not (isinstance(algorithm.func, type) and issubclass(algorithm.func, RLHFModule)):
        raise InputError(f"algo._target_={cfg.algo._target_} is no algorithm, that is no class made from RLHFModule")
    return algorithm(
        policy=policy,
        tokenizer=tokenizer_for(policy, cli.build_tokenizer(cfg.tokenizer)),
        reward_funcs=cli.build(cfg, "reward", (RewardFunctions, DataRewards)),
        sampling=cli.build(cfg, "rollout", SamplingConfig),
        engine=instantiate(cfg.engine, _partial_=True),
        seed=cfg.seed,
    )


def check_run(config: Mapping[str, Any]) -> None:
    """Check all that `train` will read, before anything heavy is imported.

    Raises:
        InputError: the first thing that cannot be used.
    """
    check_top_level(config, _TOP_LEVEL_KINDS)
    check_targets(config, _NEEDED)
    target = config["algo"]["_target_"]
    signature = signature_of(target)
    if signature is not None and not signature.open and not set(_GIVEN) <= set(signature.parameters):
        raise InputError(f"algo._target_={target} is no algorithm: it does not take {', '.join(_GIVEN)}")
    if (precision := config["trainer"].get("precision")) in ("bf16-true", "16-true"):  # Lightning converts the batches
        raise InputError(
            f"trainer.precision={precision} cannot convert these batches; write model.dtype=bfloat16 instead, "
            "without trainer.precision"
        )
    check_elsewhere(config, ELSEWHERE)
    if config["ckpt_path"] in ("", "best", "hpc"):  # words of Lightning's for other things
        raise InputError(f"ckpt_path={config['ckpt_path']} is no file; give a checkpoint, or last for the newest")
    check_config(config)
    check_log_model(((config.get("logger") or {}).get("wandb") or {}).get("log_model", False))
    for name, value in config["trainer"].items():  # which Lightning takes, and divides by or turns the gradient around
        if isinstance(value, (int, float)) and name in (*_SMALLEST, *_POSITIVE):
            check_number(f"trainer.{name}", value, at_least=_SMALLEST.get(name), above=0 if name in _POSITIVE else None)


def _present(group: DictConfig | None) -> list[str]:
    """The names in an optional group that were not set to null."""
    return [str(name) for name, node in (group or {}).items() if node]


def _run(cfg: DictConfig) -> None:
    metrics, built = train(cfg)
    if not built["trainer"].is_global_zero:
        return
    for name in sorted(name for name in metrics if name.startswith("val/")):
        before = built["before"].get(name)
        print(f"{name}: {metrics[name]:.3f}" + ("" if before is None else f" (before: {before:.3f})"))
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    print(cli.run_folder())


def main() -> None:
    """Entry point of `python -m lit_rlhf.train` and of the `lit-rlhf` command."""
    cli.main("train", check_run, _run, __doc__, ELSEWHERE)


def resolved(ckpt_path: str | None) -> str | None:
    """The file that `ckpt_path` names; `last` is found, or None where the run has only just begun."""
    from lit_rlhf.checkpoints import last_checkpoint

    if ckpt_path != "last":
        return ckpt_path
    found = last_checkpoint(cli.run_folder())
    print(f"ckpt_path=last: {found or 'there is none yet, the run begins'}", file=sys.stderr)
    return str(found) if found else None


def _functions(algo: DictConfig) -> dict[str, Any]:
    """The loss and the estimator of `algo` that are nodes with a `_target_`.

    Of a plain function that is the function itself, with the node's arguments fixed, where Hydra would call it: only
    `_partial_: false` does, for a function that makes one. Of a class it is an object.
    """
    from lit_rlhf.registry import import_path

    found = {}
    for key in ("policy_loss", "advantage_estimator"):
        node = algo.get(key)
        if not (OmegaConf.is_dict(node) and "_target_" in node):
            continue
        target = import_path(f"algo.{key}._target_", str(node["_target_"]))
        if isinstance(target, type) or node.get("_partial_") is False:
            found[key] = instantiate(node)
        else:
            function = instantiate(node, _partial_=True)
            found[key] = function if function.args or function.keywords else function.func
    return found


if __name__ == "__main__":
    main()
