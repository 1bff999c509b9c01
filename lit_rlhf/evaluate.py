"""Evaluate a model: `python -m lit_rlhf.evaluate model.path=DIR data.path=FILE`.

Writes `evaluation.json`, every figure with its interval, and `samples.jsonl`, every completion, into the run's folder.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from lit_rlhf import __version__, cli
from lit_rlhf.config import check_config, check_elsewhere, check_targets, check_top_level
from lit_rlhf.errors import InputError, check_choice, check_number

_KINDS = {
    "samples": (int,),
    "ks": (list, type(None)),
    "greedy": (bool,),
    "rows": (str,),
    "limit": (int, type(None)),
    "batch_size": (int,),
    "ckpt_path": (str, type(None)),
    "reference": (dict,),
    "against": (dict,),
    "judge": (str, type(None)),
    "device": (str, type(None)),
}
_ELSEWHERE = {"rollout.group_size": "samples=..."}
_ROWS = ("held_out", "train")


def evaluate(cfg: DictConfig, folder: str | Path) -> dict[str, Any]:
    """Build what `cfg` describes, evaluate, and leave `evaluation.json` and `samples.jsonl` in `folder`.

    Returns:
        What stands in `evaluation.json`: `model`, `data`, `settings`, `versions` and `metrics`, where each metric has
        `value`, `low` and `high` (95 %, by prompt), `prompts` and `samples`.
    """
    cli.start(cfg)
    from lit_rlhf.data.modules import RowsDataModule
    from lit_rlhf.evaluation import Candidate, check_same_vocabulary, evaluate_rows
    from lit_rlhf.models.wrapper import tokenizer_for
    from lit_rlhf.rollouts.sampler import OPPONENT
    from lit_rlhf.types import SamplingConfig

    device = _device(cfg.device)
    data = cli.build(cfg, "data", RowsDataModule)
    rows = _rows(data, cfg.rows)[: cfg.limit]
    policy = _policy(cfg).to(device)
    sampling = cli.build(cfg, "rollout", SamplingConfig, group_size=cfg.samples)
    judges, judge = _judges(cfg, data, rows, device)
    tokenizer = tokenizer_for(policy, cli.build_tokenizer(cfg.tokenizer))
    candidate = Candidate(policy, tokenizer, judges, sampling, seed=cfg.seed)
    reference = opponent = None
    if cfg.reference.path:
        reference = _second_model(cfg, "reference").to(device).eval()
        check_same_vocabulary(policy, reference)
    if cfg.against.path:
        other = _second_model(cfg, "against").to(device)
        opponent = Candidate(other, tokenizer_for(other), judges, sampling, seed=cfg.seed, stage=OPPONENT)
    too_long = 0
    for reader in [candidate] if opponent is None else [candidate, opponent]:
        rows, found = reader.fitting(rows, data.long_rows)
        too_long += found
    samples = Path(folder, ".samples.jsonl.part")  # what an earlier evaluation has left stays until this one is done
    with samples.open("w", encoding="utf-8") as file:
        metrics = evaluate_rows(
            candidate,
            rows,
            ks=_ks(cfg),
            batch_size=cfg.batch_size,
            greedy=cfg.greedy,
            reference=reference,
            against=opponent,
            judge=judge,
            record=lambda line: file.write(json.dumps(line, ensure_ascii=False) + "\n"),
        )
    sampled = {**asdict(sampling), "stop": list(sampling.stop)}
    settings = {"sampling": sampled, "ks": _ks(cfg), "rewards": judges.names, "judge": cfg.judge}
    report = _described(cfg, policy, settings) | {"metrics": metrics}
    report["data"] |= {"prompts": len(rows), "too_long": too_long, "long_rows": data.long_rows}
    cli.save_config(cfg, folder)
    samples.replace(Path(folder, "samples.jsonl"))
    Path(folder, "evaluation.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return report


def _rows(data: Any, which: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = {"held_out": data.held_out_rows, "train": data.train_rows}[which]
    if not rows:
        raise InputError(f"rows={which} of the data are none; give the other of {', '.join(_ROWS)}")
    return rows


def _judges(cfg: DictConfig, data: Any, rows: list[dict[str, Any]], device: Any) -> tuple[Any, Any]:
    """What scores the completions, and what decides who wins if that is another."""
    from lit_rlhf.rewards import Judges, RewardFunctions

    judge = RewardFunctions(cfg.judge) if cfg.judge else None
    judges = Judges(instantiate(cfg.reward), data.reward_funcs) or Judges(judge)
    for functions in (judges, judge):
        if functions is not None:
            functions.to(device).check(rows)
    return judges, judge


def _ks(cfg: DictConfig) -> list[int]:
    if cfg.ks is not None:
        return sorted(set(cfg.ks))
    return sorted({*(1 << i for i in range(cfg.samples.bit_length())), cfg.samples})


def _device(name: str | None) -> Any:
    import torch

    try:
        found = torch.zeros(1, device=name or ("cuda" if torch.cuda.is_available() else "cpu"))
        found.item()  # that of meta holds nothing
        return found.device
    except Exception as error:  # each backend has its own for not being there
        raise InputError(f"device={name} cannot be used here: {str(error).splitlines()[0]}") from error


def _policy(cfg: DictConfig) -> Any:
    from torch import nn

    from lit_rlhf.models.checks import check_generates

    policy = cli.build(cfg, "model", nn.Module)
    check_generates(policy, "model.path")
    if cfg.ckpt_path:
        _load_policy(policy, cfg.ckpt_path)
    return policy


def _second_model(cfg: DictConfig, name: str) -> Any:
    from lit_rlhf.models.checks import check_generates

    try:
        model = instantiate(cfg[name])
    except InstantiationException as error:  # it is loaded as `model` is, and says so
        if isinstance(error.__cause__, InputError):
            raise InputError(str(error.__cause__).replace("model.", f"{name}.")) from error
        raise
    check_generates(model, f"{name}.path")
    return model


def _load_policy(policy: Any, ckpt_path: str) -> None:
    """Give `policy` the weights that a checkpoint of a run has for it."""
    from lit_rlhf.checkpoints import AtomicCheckpointIO
    from lit_rlhf.models.checks import check_finite

    prefix = "models.policy."
    saved = AtomicCheckpointIO().load_checkpoint(ckpt_path)["state_dict"]
    weights = {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}
    own = policy.state_dict()
    names = dict.fromkeys([*weights, *own])
    different = [n for n in names if n not in own or n not in weights or own[n].shape != weights[n].shape]
    if different:
        adapted = any("lora_" in name for name in weights) and not any("lora_" in name for name in own)
        give = "the settings of its adapters, model.lora.r=..." if adapted else "the model that the run began with"
        raise InputError(
            f"ckpt_path: the policy in {ckpt_path} is no model like model.path; give {give} "
            f"({len(different)} weights differ, the first is {different[0]})"
        )
    policy.load_state_dict(weights)
    check_finite(policy, "ckpt_path", ckpt_path)


def _described(cfg: DictConfig, policy: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What was evaluated, and with what."""
    import torch
    import transformers

    plain = cli.recorded(cfg)
    return {
        "model": {
            **plain["model"],
            "ckpt_path": cfg.ckpt_path,
            "parameters": sum(p.numel() for p in policy.parameters()),
        },
        "reference": cfg.reference.path,
        "against": cfg.against.path,
        "data": {**plain["data"], "rows": cfg.rows},
        "settings": {**settings, "batch_size": cfg.batch_size, "greedy": cfg.greedy, "seed": cfg.seed},
        "versions": {
            "lit_rlhf": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def check_evaluation(config: Mapping[str, Any]) -> None:
    """Check all that `evaluate` will read, before anything heavy is imported.

    Raises:
        InputError: the first thing that cannot be used.
    """
    for name in ("reference", "against"):
        if not isinstance(config[name], dict):
            raise InputError(f"{name} must be given as {name}.path=..., got {config[name]!r}")
    check_top_level(config, _KINDS)
    for name in ("samples", "batch_size"):
        check_number(name, config[name], at_least=1)
    if config["limit"] is not None:
        check_number("limit", config["limit"], at_least=1)
    for k in config["ks"] or ():
        if type(k) is not int or not 1 <= k <= config["samples"]:
            raise InputError(f"ks must be from 1 to samples={config['samples']}, got {k!r}")
    check_choice("rows", config["rows"], _ROWS)
    check_targets(config, ("model", "data", "reward", "rollout"))
    check_elsewhere(config, _ELSEWHERE)
    if config["rollout"].get("max_staleness"):
        raise InputError("'rollout.max_staleness' would have no effect: nothing is trained here; leave it out")
    if config["judge"] is not None and config["against"]["path"] is None:
        raise InputError("judge decides who wins, and there is nobody to win against; give against.path=...")
    absent = [name for name in ("reference", "against") if config[name].get("path") is None]
    check_config({**config, **{name: {**config[name], "path": ""} for name in absent}})


def _run(cfg: DictConfig) -> None:
    from lit_rlhf.evaluation import table

    folder = cli.run_folder()
    report = evaluate(cfg, folder)
    data, samples = report["data"], report["settings"]["sampling"]["group_size"]
    name = data["_target_"].rpartition(".")[2]
    if data["too_long"]:
        print(f"{data['too_long']} prompts are longer than the model can read: {data['long_rows']}")
    print(f"{data['prompts']} prompts ({data['rows']} of {name}), {samples} completions each")
    print(*table(report["metrics"]), folder, sep="\n")


def main() -> None:
    """Entry point of `python -m lit_rlhf.evaluate`."""
    cli.main("evaluate", check_evaluation, _run, __doc__, _ELSEWHERE)


if __name__ == "__main__":
    main()
