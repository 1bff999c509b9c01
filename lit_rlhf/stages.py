"""The stages of a pipeline: which runs of `python -m lit_rlhf.train` there are, and what each takes from the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_rlhf.config import conf_dir, quoted
from lit_rlhf.durable import write_text
from lit_rlhf.errors import InputError
from lit_rlhf.signatures import nearest, signature_of

SFT, REWARD_MODEL, POLICY = STAGES = ("sft", "reward_model", "policy")
_MODEL_KEYS = ("model", "model.path", "tokenizer")  # of the first stage; the others start from what it made
_INSTEAD = {
    "algo": "pipeline.policy=NAME (or pipeline.sft=NAME)",
    "ckpt_path": "hydra.run.dir=FOLDER with the folder of the pipeline that is to go on",
}
_BUILT_IN = "arithmetic"


@dataclass(frozen=True)
class Stage:
    """One run of `python -m lit_rlhf.train`.

    Args:
        name: one of `STAGES`.
        algorithm: the choice of `algo=`.
        arguments: the whole command line, but for the run's folder.
        folder: of the run.
    """

    name: str
    algorithm: str
    arguments: tuple[str, ...]
    folder: Path

    @property
    def model(self) -> Path:
        """What the run leaves for the next one."""
        return self.folder / "model"

    @property
    def checkpoint(self) -> Path:
        """Where a run that was stopped goes on."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def _portable(self) -> list[str]:
        """The arguments, wherever the pipeline's folder lies."""
        return [argument.replace(str(self.folder.parent), "PIPELINE") for argument in self.arguments]

    @property
    def record(self) -> dict[str, Any]:
        """What is known of earlier runs: `arguments`, `seconds` they took and whether they `finished`.

        Raises:
            InputError: they trained with other arguments.
        """
        file = self.folder / "stage.json"
        new: dict[str, Any] = {
            "algorithm": self.algorithm,
            "arguments": self._portable,
            "seconds": 0.0,
            "finished": False,
        }
        found = _read(file, "remove that folder to run the stage anew") if file.exists() else new
        if found.get("arguments") == self._portable:
            return found
        if not found.get("finished") and not self.checkpoint.exists():
            return new  # nothing was trained
        changed = " ".join(sorted(set(found.get("arguments") or ()) ^ {*self._portable}))
        raise InputError(
            f"the stage {self.name} in {self.folder} was made with other arguments (they differ in {changed}): "
            f"give another hydra.run.dir, or remove that folder to make it and all after it anew"
        )

    @property
    def finished(self) -> bool:
        """Whether it has been run to its end, with these arguments."""
        return bool(self.record["finished"])

    def note(self, seconds: float, finished: bool) -> None:
        """Record that it was run for so many more seconds, in one step, so that a reader finds all or nothing."""
        known = self.record
        known |= {"seconds": round(known["seconds"] + seconds, 1), "finished": finished}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "stage.json", json.dumps(known, indent=2) + "\n")


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """A pipeline's command line: its own arguments, those of all stages, and those of each, without the stage's name.

    >>> split_arguments(["pipeline.policy=dpo", "seed=2", "policy.algo.beta=0.3"])
    (['pipeline.policy=dpo'], ['seed=2'], {'sft': [], 'reward_model': [], 'policy': ['algo.beta=0.3']})
    """
    own: list[str] = []
    shared: list[str] = []
    of_stage: dict[str, list[str]] = {name: [] for name in STAGES}
    for argument in arguments:
        head, dot, rest = argument.partition(".")
        if head in STAGES or argument.partition("=")[0] in STAGES:
            if not dot or "=" in head:
                raise InputError(f"{argument} chooses nothing; write pipeline.{argument}")
            of_stage[head].append(rest)
        elif head in ("pipeline", "hydra") or argument.startswith("-"):
            own.append(argument)
        else:
            shared.append(argument)
    return own, shared, of_stage


def plan(
    chosen: Mapping[str, Any], shared: Sequence[str], of_stage: Mapping[str, Sequence[str]], folder: Path
) -> list[Stage]:
    """The stages to run, in order.

    Args:
        chosen: for each of `STAGES` an algorithm, the folder of a model to take instead, or None to leave it out.
        shared: arguments of all stages.
        of_stage: further arguments of each.
        folder: of the pipeline; a stage's is inside.

    Raises:
        InputError: a choice that cannot be run, or nothing to run.
    """
    for name in STAGES:
        _check_choice(name, chosen[name], of_stage[name])
        for argument in (*shared, *of_stage[name]):
            if (instead := _INSTEAD.get(_key(argument))) is not None:
                raise InputError(f"{argument} is not for a pipeline; write {instead}")
    tiny = all(_is_tiny(argument) for argument in (*shared, *(a for own in of_stage.values() for a in own)))
    made: dict[str, Path | None] = {}
    stages: list[Stage] = []
    for name in STAGES:
        choice, own = chosen[name], of_stage[name]
        if name == REWARD_MODEL and chosen[POLICY] in _choices() and not _samples(chosen[POLICY]):
            choice = None
            if own:
                raise InputError(
                    f"{name}.{own[0]} would have no effect: {chosen[POLICY]} learns without a reward model"
                )
        if choice is None or choice not in _choices():
            made[name] = None if choice is None else Path(choice).expanduser().resolve()
            continue
        start, kept = _start(made.get(SFT), choice, shared, own)
        _check_data(name, kept, [*shared, *(a for arguments in of_stage.values() for a in arguments)])
        taken = _reward(made, choice, kept) if name == POLICY else []
        settings = _settings(choice, kept) if tiny else []
        stages.append(Stage(name, choice, (f"algo={choice}", *start, *settings, *taken, *kept), folder / name))
        made[name] = stages[-1].model
    if not stages:
        raise InputError(
            "nothing to run: give one of pipeline.sft, pipeline.reward_model, pipeline.policy an algorithm"
        )
    return stages


def _start(
    policy: Path | None, algorithm: str, shared: Sequence[str], own: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What names the model that a stage starts from, and the rest of its arguments.

    It is the stage's own, or what SFT made, or the one given to all stages; the built-in task is learnt from scratch.
    """
    if any(_key(argument) in _MODEL_KEYS for argument in own):
        return [], [*(a for a in shared if _key(a) not in _MODEL_KEYS), *own]
    if policy is not None:
        return [f"model.path={policy}"], [*(a for a in shared if _key(a) not in _MODEL_KEYS), *own]
    given = [*shared, *own]
    if algorithm != "sft" or not _is_built_in(given) or any(_key(a) in _MODEL_KEYS for a in given):
        return [], given
    if unfit := [a for a in given if _key(a).startswith("model.")]:
        raise InputError(
            f"{unfit[0]}: the first stage learns from random weights; write reward_model.{unfit[0]} policy.{unfit[0]}, "
            "or model=tiny to begin with the shipped model"
        )
    return ["model=tiny_scratch"], given


def _settings(algorithm: str, kept: Sequence[str]) -> list[str]:
    """What the built-in task wants changed for a model of its own, whichever stage made it."""
    names = (f"{_BUILT_IN}_{model}_{algorithm}" for model in ("pipeline", "tiny"))
    preset = next((name for name in names if (conf_dir() / "preset" / f"{name}.yaml").is_file()), None)
    asked = any(_key(argument) in ("preset", "experiment") for argument in kept)
    return [f"preset={preset}"] if preset is not None and not asked and _is_built_in(kept) else []


def _key(argument: str) -> str:
    return argument.lstrip("+").partition("=")[0]


def _is_built_in(arguments: Sequence[str]) -> bool:
    """Whether these arguments leave the built-in task."""
    return not any(_key(a) == "data.path" or (_key(a) == "data" and a != f"data={_BUILT_IN}") for a in arguments)


def _is_tiny(argument: str) -> bool:
    """Whether this argument leaves a model of the built-in task."""
    return _key(argument) != "model.path" and (_key(argument) != "model" or argument.startswith("model=tiny"))


def _reward(made: Mapping[str, Path | None], algorithm: str, given: Sequence[str]) -> list[str]:
    """The reward model as the policy's only reward, unless the user has given another."""
    judge = made[REWARD_MODEL]
    if judge is None or not _samples(algorithm):
        return []
    if own := [argument for argument in given if _key(argument) == "reward.funcs"]:
        if str(judge) in own[-1]:
            return []
        raise InputError(
            f"{own[-1]} leaves nothing for the reward model to do; write pipeline.reward_model=null, or put {judge} "
            "among the functions"
        )
    return [f"reward.funcs=[{quoted(str(judge))}]"]


def _check_choice(name: str, choice: Any, arguments: Sequence[str]) -> None:
    if choice is None:
        if arguments:
            raise InputError(f"{name}.{arguments[0]} would have no effect: pipeline.{name} is null")
        return
    if choice in _choices():
        if (choice == "reward_modeling") != (name == REWARD_MODEL):
            made, instead = ("policy", "reward_modeling") if name == REWARD_MODEL else ("reward model", "sft or ppo")
            raise InputError(f"pipeline.{name}={choice} makes a {made}; use {instead}")
        return
    config = Path(str(choice)).expanduser() / "config.json"
    if name == POLICY or not config.is_file():
        folder = "/" in str(choice) and name != POLICY
        hint = "there is no model" if folder else f"no such algorithm{nearest(str(choice), _choices())}"
        raise InputError(f"pipeline.{name}={choice}: {hint}")
    _check_kind(name, config)
    if arguments:
        raise InputError(
            f"{name}.{arguments[0]} would have no effect: pipeline.{name} is a model that is there already"
        )


def _check_kind(name: str, config: Path) -> None:
    """Refuse a policy where a reward model should stand, and the other way round, as far as the files say it."""
    written = _read(config, f"give pipeline.{name} another model")
    kinds, labels = written.get("architectures") or [], written.get("id2label") or {"0": "", "1": ""}
    judges = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    if kinds and judges != (name == REWARD_MODEL):
        raise InputError(f"pipeline.{name}: the model in {config.parent} is a {kinds[0]}, which is of no use there")
    if name == REWARD_MODEL and judges and len(labels) != 1:
        raise InputError(f"pipeline.{name}: the model in {config.parent} has {len(labels)} labels; one is needed")


def _read(file: Path, instead: str) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); {instead}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} cannot be read (it holds no object); {instead}")
    return found


def _check_data(name: str, kept: Sequence[str], everything: Sequence[str]) -> None:
    """Refuse a stage that would fall back to the built-in task while another has data of the user's."""
    if any(_key(a) in ("data", "data.path") for a in kept) or _is_built_in(everything):
        return
    raise InputError(f"the stage {name} has no data; give {name}.data.path=..., or data.path=... for all stages")


def _choices() -> list[str]:
    return sorted(file.stem for file in (conf_dir() / "algo").glob("*.yaml"))


def _samples(algorithm: str) -> bool:
    """Whether an algorithm learns from rewards of what it samples."""
    node = yaml.safe_load((conf_dir() / "algo" / f"{algorithm}.yaml").read_text())
    signature = signature_of(node["_target_"])
    return signature is not None and "group_size" in signature.parameters
