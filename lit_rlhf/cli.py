"""What the entry points share: from `sys.argv` to a composed configuration, and errors that are one sentence."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.config import conf_dir, prepare_arguments
from lit_rlhf.errors import InputError


def main(name: str, check: Callable[[Mapping[str, Any]], None], run: Callable[[DictConfig], None]) -> None:
    """Read the command line, compose `conf/NAME.yaml`, check it and run.

    What the user got wrong is printed as one sentence and ends the process with code 2; until `run` is called nothing
    heavy is imported.

    Args:
        name: of the entry point and its yaml file.
        check: raises an `InputError` for what `run` could not use, from the plain, unresolved configuration.
        run: does the work and prints what it found.
    """
    sys.path.insert(0, str(Path.cwd()))
    try:
        sys.argv[1:] = prepare_arguments(sys.argv[1:], primary(name))
        check_grammar(sys.argv[1:])
    except InputError as error:
        fail(str(error))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin are ten times slower on a busy core

    def task(cfg: DictConfig) -> None:
        try:
            plain: Any = OmegaConf.to_container(cfg, resolve=False)
            check(plain)
            run(cfg)
        except Exception as error:
            sentence, lost = _input_error(error), str(error).startswith("rank ")  # see `callbacks.lost_ranks`
            if sentence is None and not lost:
                raise
            fail(sentence or str(error), code=2 if sentence else 1)

    try:
        hydra.main(config_path=str(conf_dir()), config_name=name, version_base="1.3")(task)()
    except SystemExit as stop:  # Hydra exits with 1 where it cannot read the command line
        sys.exit(2 if stop.code == 1 and "torch" not in sys.modules else stop.code)


def primary(name: str) -> dict[str, Any]:
    """The entry point's own yaml file, as `prepare_arguments` wants it."""
    content: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{name}.yaml"), resolve=False)
    return dict(content)


def run_folder() -> str:
    """The folder of this run, where all that it leaves behind lies."""
    return str(HydraConfig.get().runtime.output_dir)


def start(cfg: DictConfig) -> None:
    """What every run does first: a quiet terminal, the user's plugins, seed and threads."""
    import torch
    import transformers
    from lightning.pytorch import seed_everything

    transformers.utils.logging.disable_progress_bar()
    _quiet()
    for plugin in cfg.plugins:
        _import_plugin(plugin)
    seed_everything(cfg.seed, verbose=False)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)


def build_tokenizer(node: DictConfig | str | None) -> Any:
    """The tokenizer that `tokenizer=` asks for: a name or path, None, or what a node with a `_target_` builds."""
    return node if isinstance(node, str) else instantiate(node)


def sweeps(argument: str) -> bool:
    """Whether an argument gives its key several values, one for each run."""
    return bool(OverridesParser.create().parse_override(argument).is_sweep_override())


def check_grammar(arguments: Sequence[str]) -> None:
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


def fail(sentence: str, code: int = 2) -> None:
    """End the process with what went wrong; the code is 2 where the user got it wrong."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)
