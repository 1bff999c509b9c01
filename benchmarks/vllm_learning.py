"""GRPO on the built-in task with vLLM as the sampler, beside the default engine; a server is killed in mid-run.

    python benchmarks/vllm_learning.py --rollouts 60 --seeds 1 2

Run where vllm is installed (docs/vllm.md). Each run is `python -m lit_rlhf.train algo=grpo engine=... seed=N`, in a
process of its own, with the same prompts and seeds. The policy is the shipped base model with heads twice as large, 64,
which compute what the others did (`widened`). The server of engine=vllm_server is killed with SIGKILL halfway through.
Printed are held-out accuracies before and after, the mismatch of the log-probs, and the seconds of a rollout.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.models.loading import load_causal_lm, load_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent))
from learning_curves import column

ENGINES = ("transformers", "vllm", "vllm_server")
SHOWN = {  # of metrics.csv: over the run
    "before": ("val/accuracy_sampled", lambda x: x[0]),
    "after": ("val/accuracy_sampled", lambda x: x[-1]),
    "greedy": ("val/accuracy_greedy", lambda x: x[-1]),
    "reward": ("reward/reward_mean", lambda x: sum(x[-10:]) / len(x[-10:])),
    "mismatch": ("stability/logprob_mismatch_mean", lambda x: sum(x) / len(x)),
    "highest": ("stability/logprob_mismatch_max", max),
    "KL": ("stability/mismatch_kl", lambda x: sum(x) / len(x)),
    "weight": ("stability/is_ratio_max", max),
    "rollout s": ("perf/rollout_seconds", lambda x: sorted(x)[len(x) // 2]),
}


def widened(head_size: int = 64) -> torch.nn.Module:
    """The shipped model with heads of twice the size, half of which is zero and stays so.

    Dimension i of a head turns with the frequency of dimension 2i of one twice as large, and the scores are divided by
    sqrt(2) more. What is zero in query and key, and in value and output, gets no gradient.
    """
    small = load_causal_lm("tiny")
    config = AutoConfig.from_pretrained(small.config.name_or_path)
    size, heads = config.head_dim, config.num_attention_heads
    config.head_dim = head_size
    large = AutoModelForCausalLM.from_config(config)
    half = torch.arange(size // 2)
    turned = torch.cat([2 * half, head_size // 2 + 2 * half])  # of query and key
    place = dict.fromkeys(("q_proj", "k_proj"), turned) | {name: torch.arange(size) for name in ("v_proj", "o_proj")}
    state = small.state_dict()
    for name, x in state.items():
        part = name.split(".")[-2]
        if part not in place:
            continue
        rows = (torch.arange(heads).unsqueeze(1) * head_size + place[part]).flatten()
        wide = x.new_zeros(*((heads * head_size, x.shape[1]) if part != "o_proj" else (x.shape[0], heads * head_size)))
        wide.index_copy_(1 if part == "o_proj" else 0, rows, x)
        state[name] = wide * math.sqrt(head_size / size) if part == "q_proj" else wide
    large.load_state_dict(state)
    ids = torch.arange(2, 18).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits, atol=1e-4, rtol=1e-4)
    large.generation_config = small.generation_config
    return large


def servers_of(trainer: int) -> list[int]:
    """The processes that guard the servers of a run."""
    children = Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()
    return [int(pid) for pid in children if b"guard.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def run(engine: str, seed: int, rollouts: int, model: Path, folder: Path) -> str:
    """Train; the seconds that it took, and what was done to it."""
    arguments = ["algo=grpo", "data=arithmetic", "preset=arithmetic_tiny_grpo", f"model.path={model}", f"seed={seed}"]
    arguments += [f"engine={engine}", "algo.warmup_steps=10", "algo.lr=1e-4", f"trainer.max_epochs={rollouts}"]
    arguments += [f"trainer.check_val_every_n_epoch={rollouts}", "callbacks.progress=null", "logger.wandb=null"]
    arguments += [f"hydra.run.dir={folder}"]
    if engine != "transformers":
        arguments += ["engine.options={enforce_eager: true}"]
    started, killed = time.monotonic(), "-"
    with (folder.parent / f"{folder.name}.txt").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "lit_rlhf.train", *arguments], stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.2)
            done = column(folder, "rollout/iteration") if (folder / "metrics.csv").exists() else []
            if engine == "vllm_server" and killed == "-" and done and done[-1] >= rollouts // 2:
                for guard in servers_of(process.pid):
                    os.killpg(guard, signal.SIGKILL)
                killed = f"{done[-1]:.0f}"
    if process.returncode:
        raise SystemExit(f"{engine} failed:\n{Path(log.name).read_text()[-2000:]}")
    return f"{time.monotonic() - started:8.0f} {killed:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rollouts", type=int, default=60)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "model"
        widened().save_pretrained(model)
        load_tokenizer("tiny").save_pretrained(model)
        print(f"{'engine':12} seed " + " ".join(f"{name:>9}" for name in SHOWN) + "  seconds killed at", flush=True)
        for seed in chosen.seeds:
            for engine in chosen.engines:
                folder = Path(work) / f"{engine}-{seed}"
                how = run(engine, seed, chosen.rollouts, model, folder)
                found = {name: column(folder, metric) for name, (metric, _) in SHOWN.items()}
                values = [f"{of(found[name]):9.3g}" if found[name] else f"{'-':>9}" for name, (_, of) in SHOWN.items()]
                print(f"{engine:12} {seed:4} {' '.join(values)} {how}", flush=True)


if __name__ == "__main__":
    main()
