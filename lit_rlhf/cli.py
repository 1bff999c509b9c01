"""What the entry points share: from `sys.argv` to a composed configuration, and errors that are one sentence."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from lit_rlhf import sweep_jobs
from lit_rlhf.confidential import check_no_secrets
from lit_rlhf.config import conf_dir, prepare_arguments
from lit_rlhf.errors import InputError
from lit_rlhf.failing import fail, mask_traceback, one_line
from lit_rlhf.usage import usage

_NOT_COMPOSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError)
_LOST_RANK = re.compile(r"rank \d+, step \d+: (another rank|a collective) has ")  # of `callbacks.lost_ranks`


def main(
    name: str,
    check: Callable[[Mapping[str, Any]], None],
    run: Callable[[DictConfig], None],
    about: str | None = None,
    elsewhere: Iterable[str] = (),
) -> None:
    """Read the command line, compose `conf/NAME.yaml`, check it and run.

    What the user got wrong is printed as one sentence and ends the process with code 2; until `run` is called nothing
    heavy is imported.

    Args:
        name: of the entry point and its yaml file.
        check: raises an `InputError` for what `run` could not use, from the plain configuration.
        run: does the work and prints what it found.
        about: what `--help` begins with.
        elsewhere: keys of groups that `check` refuses because another key decides them.
    """
    sys.path.insert(0, str(Path.cwd()))
    given = sys.argv[1:]
    try:
        sys.argv[1:] = prepare_arguments(sys.argv[1:], primary(name))
        check_grammar(sys.argv[1:])
        sys.argv += sweep_jobs.named(sys.argv[1:])
    except InputError as error:
        fail(str(error))
    if {"--help", "-h"} & {*given}:
        print("\n".join([(about or "").rstrip(), *usage(name, primary(name), given, elsewhere)]))
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin are ten times slower on a busy core
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra hands exceptions on, instead of printing them itself
    composed = begun = False

    def task(cfg: DictConfig) -> None:
        nonlocal composed, begun
        composed = True
        if sweep_jobs.is_one():
            return sweep_jobs.run(f"lit_rlhf.{name}", sys.argv[1:])
        try:
            check_no_secrets(OmegaConf.to_container(cfg, resolve=False))
            check_no_secrets(OmegaConf.to_container(HydraConfig.get().job.env_set), "hydra.job.env_set")
            check(_resolved(cfg))
            _check_writable(run_folder())
            sweep_jobs.begin()
            begun = True
            run(cfg)
        except Exception as error:
            _end(error, begun)
            raise

    try:
        hydra.main(config_path=str(conf_dir()), config_name=name, version_base="1.3")(task)()
    except Exception as error:
        if not composed and isinstance(error, _NOT_COMPOSED):
            fail(_not_composed(error))
        mask_traceback()
        raise


def _end(error: Exception, begun: bool) -> None:
    """End the process with a sentence, if the error has one for the user; of a run that has begun it is noted."""
    sentence = _input_error(error)
    if begun:  # what is refused leaves nothing behind
        sweep_jobs.note_failure(one_line(sentence or f"{type(error).__name__}: {error}"))
    if sentence is not None:
        fail(sentence)
    if _LOST_RANK.match(str(error)):
        fail(str(error), code=1)


def primary(name: str) -> dict[str, Any]:
    """The entry point's own yaml file, as `prepare_arguments` wants it."""
    content: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / f"{name}.yaml"), resolve=False)
    return dict(content)


def run_folder() -> str:
    """The folder of this run, where all that it leaves behind lies."""
    return str(HydraConfig.get().runtime.output_dir)


def _check_writable(folder: str) -> None:
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"hydra.run.dir: {folder} cannot be written to ({error.strerror}); give another") from None


def save_config(cfg: DictConfig, folder: str | Path) -> None:
    """Write what the run was started with to `config/` in its folder, in Hydra's files, but not before it begins.

    Where a run is continued in its own folder, what that was started with is kept as `config.1`, `config.2` and so on.
    """
    from lit_rlhf.loggers import keep_aside

    keep_aside(Path(folder, "config"))
    files = {"config": cfg}
    if HydraConfig.initialized():
        own = HydraConfig.get()
        files |= {"hydra": OmegaConf.create({"hydra": own}), "overrides": own.overrides.task}
    Path(folder, "config").mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        Path(folder, "config", f"{name}.yaml").write_text(OmegaConf.to_yaml(content), encoding="utf-8")


def recorded(cfg: DictConfig) -> dict[str, Any]:
    """The configuration for loggers and reports: resolved, but for what comes from the environment."""
    OmegaConf.register_new_resolver("oc.env", _left_as_it_is, replace=True)
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return dict(plain)


def _left_as_it_is(*arguments: Any) -> str:
    return f"${{oc.env:{','.join(map(str, arguments))}}}"


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


def build(cfg: DictConfig, key: str, kind: type | tuple[type, ...], **given: Any) -> Any:
    """What the node `key` of the configuration describes.

    Raises:
        InputError: it is not of that kind.
    """
    node = OmegaConf.select(cfg, key)
    found = instantiate(node, **given)
    if not isinstance(found, kind):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{key}._target_={node.get('_target_')} makes a {type(found).__name__}; expected a {names}")
    return found


def build_tokenizer(node: DictConfig | str | None) -> Any:
    """The tokenizer that `tokenizer=` asks for: a name or path, None, or what a node with a `_target_` builds."""
    if isinstance(node, DictConfig) and "_target_" not in node:
        raise InputError("tokenizer: give a name, a path or a node with a _target_, and this has none")
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
    """Leave the terminal to what the user has to read, a warning in one line."""
    warnings.formatwarning = lambda message, category, *place: f"warning: {message}\n"
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
        if isinstance(error, InstantiationException) and (sentence := _not_built(error)) is not None:
            return sentence
        error = error.__cause__ or error.__context__
    return None


def _not_built(error: InstantiationException) -> str | None:
    """The sentence for arguments that what a `_target_` names refuses; None where our own code has failed."""
    cause, key = error.__cause__, str(error).rpartition("full_key: ")[2]
    if isinstance(cause, (ValueError, ImportError)):
        return str(cause)
    frames = () if cause is None else traceback.walk_tb(cause.__traceback__)
    ours = any(str(frame.f_globals.get("__name__")).startswith("lit_rlhf.") for frame, _ in frames)
    return f"{key}: {cause}" if isinstance(cause, (TypeError, AttributeError)) and not ours else None


def _resolved(cfg: DictConfig) -> Any:
    """The plain configuration, with the value of every interpolation."""
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}; give it a value") from error


def _not_composed(error: Exception) -> str:
    """The sentence for what Hydra refuses before anything runs: of its own, of yaml and of the folder of the run."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be used ({error.strerror}); give another hydra.run.dir"
    if isinstance(error, yaml.YAMLError):
        return f"a yaml file cannot be read: {error}"
    lines = [line for said in (error, error.__cause__) for line in str(said or "").splitlines()]
    return " ".join(line for line in lines if line and not line[0].isspace() and not line.endswith(":"))
