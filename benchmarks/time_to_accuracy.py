"""Seconds of training until the built-in task's sampled accuracy is 0.90: our default against TRL's GRPO.

    python benchmarks/time_to_accuracy.py [--seeds 1 2 3] [--rates 5e-5 1e-4 2e-4] [--budget 240] [--json FILE]

Ours is the command that the README begins with, `python -m lit_rlhf.train algo=dapo`, on the base model that ships with
the package. TRL's `GRPOTrainer` starts from the same model and trains on the same problems with the same verifier:
32 prompts x 8 samples per step, temperature 1, no KL, a constant learning rate, gradient clipping at 1; the best of the
rates counts. Both measure sampled accuracy on the same 512 held-out problems, four completions each, every ten
rollouts, and stop where it is reached. The clock counts training alone: neither start-up nor evaluation. Each run is a
process of its own with one thread, as the preset has it; beside the seconds stand those of processor time, which other
work on the machine changes less. A run that exceeds the budget of processor seconds has not reached the accuracy.
Runs are added to the JSON file, and those that it has are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET, EVERY = 0.90, 10  # sampled accuracy; rollouts between two measurements
PROMPTS, GROUP_SIZE, NEW_TOKENS, VALIDATION_SAMPLES = 32, 8, 8, 4  # of TRL's steps; the last two are the preset's
OURS = "algo=dapo"


class Clock:
    """Wall-clock and processor seconds of training, and the accuracy at every measurement.

    Args:
        file: where the measurements go.
        budget: processor seconds of training after which a run ends.
    """

    def __init__(self, file: str | Path, budget: float) -> None:
        self.file, self.budget = Path(file), budget
        self.points: list[dict[str, float]] = []
        self._wall = self._cpu = 0.0
        self.resume()

    def resume(self) -> None:
        """Training goes on."""
        self._since = time.perf_counter(), time.process_time()

    def pause(self) -> None:
        """Training pauses."""
        self._wall += time.perf_counter() - self._since[0]
        self._cpu += time.process_time() - self._since[1]

    def note(self, rollouts: int, accuracy: float) -> bool:
        """Write down a measurement, made in a pause; returns whether the run is over."""
        self.points.append(
            {"rollouts": rollouts, "seconds": self._wall, "cpu_seconds": self._cpu, "accuracy": accuracy}
        )
        self.file.write_text(json.dumps(self.points))
        return accuracy >= TARGET or self._cpu > self.budget


def clock_callback(file: str, budget: float) -> Any:
    """The clock as a Lightning callback, for `callbacks.clock._target_=time_to_accuracy.clock_callback`."""
    from lightning.pytorch import Callback

    class TimedValidation(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self.clock = Clock(file, budget)

        def on_validation_start(self, trainer: Any, module: Any) -> None:
            self.clock.pause()

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            accuracy = float(trainer.callback_metrics["val/accuracy_sampled"])
            trainer.should_stop = self.clock.note(trainer.current_epoch + 1, accuracy)
            self.clock.resume()

    return TimedValidation()


def train_trl(rate: float, seed: int, file: str, budget: float) -> None:
    """GRPO in TRL, in this process."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lit_rlhf.data import ArithmeticData
    from lit_rlhf.models.loading import load_causal_lm, load_tokenizer
    from lit_rlhf.rewards import exact_match

    torch.set_num_threads(1)
    data, tokenizer, clock = ArithmeticData(), load_tokenizer("tiny"), Clock(file, budget)

    class TimedEvaluation(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.resume()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step % EVERY == 0:
                clock.pause()
                accuracy = sampled_accuracy(model, tokenizer, data.held_out_rows, seed)
                control.should_training_stop = clock.note(state.global_step, accuracy)
                clock.resume()

    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PROMPTS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=NEW_TOKENS,
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_steps=10**6,
            seed=seed,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        GRPOTrainer(
            model=load_causal_lm("tiny"),
            args=settings,
            reward_funcs=exact_match,
            train_dataset=Dataset.from_list([{k: row[k] for k in ("prompt", "answer")} for row in data.train_rows]),
            processing_class=tokenizer,
            callbacks=[TimedEvaluation()],
        ).train()


def sampled_accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]], seed: int) -> float:
    """Share of right completions, as our validation measures it."""
    from lit_rlhf.rewards import exact_match
    from lit_rlhf.rollouts.sampler import decode, engine_for
    from lit_rlhf.text import encode_prompts
    from lit_rlhf.types import SamplingConfig

    engine = engine_for(model, tokenizer, ())
    engine.update_weights(model, 0)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    rollout = engine.generate(prompts, SamplingConfig(NEW_TOKENS, group_size=VALIDATION_SAMPLES), seed)
    completions = decode(tokenizer, rollout)
    shown = [row for row in rows for _ in range(VALIDATION_SAMPLES)]
    rewards = exact_match(completions=completions, answer=[row["answer"] for row in shown])
    return statistics.fmean(rewards)


def run(name: str, rate: float | None, seed: int, budget: float) -> list[dict[str, float]]:
    """One training run in a process of its own; its measurements."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.json"
        if rate is None:
            clock = f"{{_target_: time_to_accuracy.clock_callback, file: {file}, budget: {budget}}}"
            arguments = ["-m", "lit_rlhf.train", OURS, f"seed={seed}", f"+callbacks.clock={clock}"]
            arguments += [f"trainer.check_val_every_n_epoch={EVERY}", "validate_first=false", "logger.wandb=null"]
            arguments += [f"hydra.run.dir={folder}/run"]
        else:
            arguments = [__file__, "--train-trl", str(rate), str(seed), str(file), str(budget)]
        path = os.pathsep.join(map(str, [ROOT / "benchmarks", ROOT, os.environ.get("PYTHONPATH", "")]))
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        found = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": path},
        )
        if found.returncode or not file.exists():
            raise SystemExit(f"{name}, seed {seed}, failed:\n{found.stdout[-3000:]}")
        return json.loads(file.read_text())


def reached(points: list[dict[str, float]], unit: str) -> float:
    """When the accuracy was measured first; infinity where it never was."""
    return next((point[unit] for point in points if point["accuracy"] >= TARGET), float("inf"))


def report(runs: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """A row per side and learning rate, and how much sooner ours is than TRL's best."""
    print("| | seconds, by seed | median | processor seconds, by seed | median | rollouts |")
    print("|---|---|---|---|---|---|")
    medians: dict[str, dict[str, float]] = {}
    for name, seeds in runs.items():
        cells = [name]
        for unit in ("seconds", "cpu_seconds", "rollouts"):
            values = [reached(seeds[seed], unit) for seed in sorted(seeds)]
            medians.setdefault(name, {})[unit] = statistics.median(values)
            cells.append(" ".join("not reached" if v == float("inf") else f"{v:.0f}" for v in values))
            cells += [f"{medians[name][unit]:.0f}"] if unit != "rollouts" else []
        print(f"| {' | '.join(cells)} |")
    for unit in ("seconds", "cpu_seconds"):
        best = min((m[unit] for name, m in medians.items() if name != "ours"), default=float("inf"))
        print(f"{unit}: TRL's best / ours = {best / medians['ours'][unit]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rates", nargs="*", type=float, default=[5e-5, 1e-4, 2e-4], help="TRL's learning rates")
    parser.add_argument("--budget", type=float, default=240.0, help="processor seconds of training per run")
    parser.add_argument("--json", type=Path, default=Path("time_to_accuracy.json"))
    parser.add_argument("--train-trl", nargs=4, metavar=("RATE", "SEED", "FILE", "BUDGET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train_trl:
        rate, seed, file, budget = arguments.train_trl
        train_trl(float(rate), int(seed), file, float(budget))
        return
    runs = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    sides = {"ours": None, **{f"TRL, {rate:g}": rate for rate in arguments.rates}}
    for seed in arguments.seeds:
        for name, rate in sides.items():
            if str(seed) in runs.get(name, {}):
                continue
            points = run(name, rate, seed, arguments.budget)
            runs.setdefault(name, {})[str(seed)] = points
            arguments.json.write_text(json.dumps(runs) + "\n")
            print(f"{name}, seed {seed}: {points[-1]}", file=sys.stderr, flush=True)
    report(runs)


if __name__ == "__main__":
    main()
