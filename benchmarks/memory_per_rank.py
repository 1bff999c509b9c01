"""What a rank holds under FSDP2 and under DDP, on two ranks of this machine's CPU.

    python benchmarks/memory_per_rank.py [--hidden 512] [--layers 8] [--ranks 2]

PPO with a reference and a separate critic, float32, AdamW. Counted are the bytes of the tensors that parameters,
gradients and optimiser state really hold on a rank, before the optimiser step of the second rollout, each memory once;
and, beside them, by how much the process has grown since its imports, then and at most while it sampled and computed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workers import forget_peak, memory

KINDS = ("parameters", "gradients", "optimiser state")


def held(tensors: Iterable[Any]) -> int:
    """Bytes of the memory behind these tensors on this rank."""
    from lit_rlhf.models.parallel import local

    storages = [local(x.detach()).untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def of_rank(arguments: argparse.Namespace) -> None:
    """One rank's run."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from lit_rlhf import PPO, strategies
    from lit_rlhf.data.modules import ArithmeticData
    from lit_rlhf.models.loading import load_tokenizer, tiny_llama
    from lit_rlhf.types import SamplingConfig

    class Count(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            forget_peak()

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            peak = memory("VmHWM")
            forget_peak()
            weights = list(module.models.parameters())
            states = [x for state in optimizer.state.values() for x in state.values()]
            gradients = [p.grad for p in weights if p.grad is not None]
            counted = [held(x) for x in (weights, gradients, states)]
            found = {
                **dict(zip(KINDS, counted, strict=True)),
                "process": memory("VmRSS") - before,
                "peak": peak - before,
            }
            Path(arguments.folder, f"{trainer.global_rank}.json").write_text(json.dumps(found))

    torch.set_num_threads(1)
    forget_peak()
    before = memory("VmRSS")
    model = tiny_llama(hidden_size=arguments.hidden, layers=arguments.layers, heads=8)
    strategy: Any = {"ddp": strategies.ddp, "fsdp2": strategies.FSDP2Strategy}[arguments.strategy]()
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        devices=arguments.ranks,
        strategy=strategy,
        max_epochs=2,
        limit_val_batches=0,
        enable_model_summary=False,
        callbacks=[Count()],
        **quiet,
    )
    module = PPO(
        policy=model,
        tokenizer=load_tokenizer(),
        kl_coef=0.1,
        prompts_per_rollout=4,
        group_size=2,
        minibatches=1,
        update_epochs=1,
        sampling=SamplingConfig(max_new_tokens=4),
    )
    trainer.fit(module, datamodule=ArithmeticData())


def measure(strategy: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """What each rank held."""
    folder = tempfile.mkdtemp()
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={arguments.ranks}", "--standalone"]
    command += [__file__, "--strategy", strategy, "--folder", folder, "--hidden", str(arguments.hidden)]
    command += ["--layers", str(arguments.layers), "--ranks", str(arguments.ranks)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(arguments.ranks)]


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--strategy", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.strategy:
        of_rank(arguments)
        return
    ddp, fsdp2 = (measure(strategy, arguments) for strategy in ("ddp", "fsdp2"))
    rows = {kind: [max(rank[kind] for rank in ranks) for ranks in (ddp, fsdp2)] for kind in ddp[0]}
    sums = [sum(rows[kind][i] for kind in KINDS) for i in (0, 1)]
    print("| MB on the rank that holds most | DDP | FSDP2 | FSDP2 / DDP |\n|---|---|---|---|")
    of_process = {"the process, beside its code": rows["process"], "its peak in the rollout": rows["peak"]}
    for name, (a, b) in {**{kind: rows[kind] for kind in KINDS}, "together": sums, **of_process}.items():
        print(f"| {name} | {a / 2**20:.0f} | {b / 2**20:.0f} | {b / a:.2f} |")
    if sums[1] > 0.6 * sums[0]:
        raise SystemExit("FSDP2 holds more than 0.6 of what DDP does")


if __name__ == "__main__":
    main()
