"""Train one algorithm: `python -m lit_rlhf.train algo=dapo`.

Instantiates data, module, callbacks, loggers and trainer from the configuration, and calls fit.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.config import check_run, conf_dir, prepare_arguments
from lit_rlhf.errors import InputError


def train(cfg: DictConfig) -> tuple[dict[str, float], dict[str, Any]]:
    """Build everything that `cfg` describes and fit.

    Returns:
        The last metrics that callbacks can monitor, and the objects by name.
    """
    import torch
    import transformers
    from lightning.pytorch import seed_everything

    from lit_rlhf.algorithms.base import RLHFModule
    from lit_rlhf.models.wrapper import tokenizer_for

    transformers.utils.logging.disable_progress_bar()
    _quiet()
    for plugin in cfg.plugins:
        _import_plugin(plugin)
    seed_everything(cfg.seed, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    data = instantiate(cfg.data)
    policy = instantiate(cfg.model)
    tokenizer = cfg.tokenizer if isinstance(cfg.tokenizer, str) else instantiate(cfg.tokenizer)
    algorithm = instantiate(cfg.algo, _partial_=True, **_functions(cfg.algo))
    if not (isinstance(algorithm.func, type) and issubclass(algorithm.func, RLHFModule)):
        raise InputError(f"algo._target_={cfg.algo._target_} is no algorithm, that is no class made from RLHFModule")
    module = algorithm(
        policy=policy,
        tokenizer=tokenizer_for(policy, tokenizer),
        reward_funcs=instantiate(cfg.reward),
        sampling=instantiate(cfg.rollout),
        seed=cfg.seed,
    )
    trainer = instantiate(
        cfg.trainer,
        callbacks=[instantiate(callback) for callback in (cfg.get("callbacks") or {}).values() if callback],
        logger=[instantiate(logger) for logger in (cfg.get("logger") or {}).values() if logger],
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    if cfg.validate_first and not cfg.ckpt_path:
        trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path)
    if module.validated_at != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, {"data": data, "module": module, "trainer": trainer}


@hydra.main(config_path=str(conf_dir()), config_name="train", version_base="1.3")  # type: ignore[untyped-decorator]
def _run(cfg: DictConfig) -> None:
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=False)
        check_run(plain)
        metrics, built = train(cfg)
    except Exception as error:
        sentence = _input_error(error)
        if sentence is None:
            raise
        _fail(sentence)
    if not built["trainer"].is_global_zero:
        return
    for name in sorted(name for name in metrics if name.startswith("val/")):
        print(f"{name}: {metrics[name]:.3f}")
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    print(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir)


def main() -> None:
    """Entry point of `python -m lit_rlhf.train` and of the `lit-rlhf` command."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        sys.argv[1:] = prepare_arguments(sys.argv[1:], _top_level())
        _check_grammar(sys.argv[1:])
    except InputError as error:
        _fail(str(error))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin are ten times slower on a busy core
    try:
        _run()
    except SystemExit as stop:  # Hydra exits with 1 where it cannot read the command line
        sys.exit(2 if stop.code == 1 and "torch" not in sys.modules else stop.code)


def _top_level() -> list[str]:
    return [str(key) for key in OmegaConf.load(conf_dir() / "train.yaml") if key != "defaults"]


def _check_grammar(arguments: Sequence[str]) -> None:
    """Refuse, in a sentence, what Hydra would refuse in several lines of its own."""
    parser = OverridesParser.create()
    for argument in (a for a in arguments if "=" in a and not a.startswith("-")):
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            raise InputError(
                f"{argument.lstrip('+')} cannot be read: {error}; put a text in quotes: \"key='text'\""
            ) from None
        if override.is_sweep_override() and not {"-m", "--multirun"} & set(arguments):
            raise InputError(
                f"{argument.lstrip('+')} are several values; write [...] for a list, or add -m for one run each"
            )


def _import_plugin(name: str) -> None:
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"plugins: there is no module {name!r}, neither installed nor in {Path.cwd()}") from None


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


def _quiet() -> None:
    """Leave the terminal to what the user has to read."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*in eval mode at the start of training.*",
        ".*isinstance.treespec.*",
        ".*is not empty.*",
        ".*across ranks is zero.*",
        ".*sync_dist=True.*",  # what is logged has been reduced over the ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


def _input_error(error: BaseException | None) -> str | None:
    """The sentence for the user in a chain of exceptions; None if the error is not theirs."""
    while error is not None:
        if isinstance(error, InputError) or type(error).__name__ == "MisconfigurationException":
            return str(error)
        if isinstance(error, InstantiationException) and isinstance(error.__cause__, (ValueError, ImportError)):
            return str(error.__cause__)
        error = error.__cause__ or error.__context__
    return None


def _fail(sentence: str) -> None:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
