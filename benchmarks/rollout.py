"""Sampled tokens per second: the in-process engine against `model.generate`, same model, same sampling.

    python benchmarks/rollout.py [--repeats 5] [--threads 2]

Both run in turns in one process. Figures are medians over the repeats: of tokens really sampled (up to the first
EOS) per second, and of the ratio of a pair of runs. The engine also returns log-probs, `generate` does not. In the
workloads with geometric lengths a row ends with probability 1/64 at every step, at most after 256 tokens. Where only so
many rows are sampled at a time (`rollout.max_rows`), `generate` is given them chunk after chunk.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.types import SamplingConfig

EOS, PAD = 1, 0


@dataclass
class Workload:
    """A model shape and what to sample from it."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    prompts: int
    prompt_length: int
    group_size: int
    max_new_tokens: int
    mean_length: int | None  # None: no row ends early
    max_rows: int | None = None  # None: all at once


WORKLOADS = [
    Workload("64 rows x 64 tokens, H64 L5 V512", 64, 5, 512, 64, 32, 1, 64, None),
    Workload("prompt 256, G=8, 64 rows x 64 tokens, H256 L4 V4096", 256, 4, 4096, 8, 256, 8, 64, None),
    Workload("geometric lengths, 64 rows, H256 L4 V4096", 256, 4, 4096, 64, 32, 1, 256, 64),
    Workload("geometric lengths, 64 rows, H64 L5 V512", 64, 5, 512, 64, 32, 1, 256, 64),
    Workload("8 prompts, G=8, 64 rows x 64 tokens, H64 L5 V512", 64, 5, 512, 8, 32, 8, 64, None),
    Workload("geometric lengths, 256 rows, 64 at a time, H64 L5", 64, 5, 512, 256, 32, 1, 256, 64, max_rows=64),
]


def build_model(work: Workload) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=4 * work.hidden,
        num_hidden_layers=work.layers,
        num_attention_heads=work.hidden // 32 or 1,
        max_position_embeddings=1024,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    bias = torch.zeros(work.vocabulary)
    if work.mean_length is None:
        bias[EOS] = -1e4
    else:  # equal logits but for EOS, which then has probability 1 / mean_length
        model.lm_head.weight.data.zero_()
        bias[EOS] = math.log((work.vocabulary - 1) / (work.mean_length - 1))
    model.lm_head.bias = nn.Parameter(bias)
    return model


def time_engine(model: nn.Module, prompts: torch.Tensor, work: Workload, seed: int) -> float:
    engine = TransformersEngine([EOS], PAD)
    engine.update_weights(model, 0)
    sampling = SamplingConfig(work.max_new_tokens, group_size=work.group_size, max_rows=work.max_rows)
    start = time.perf_counter()
    rollout = engine.generate(prompts.tolist(), sampling, seed)
    return int(rollout.lengths.sum()) / (time.perf_counter() - start)


def time_generate(model: nn.Module, prompts: torch.Tensor, work: Workload, seed: int) -> float:
    torch.manual_seed(seed)
    sampled, start = 0, time.perf_counter()
    for chunk in prompts.split((work.max_rows or len(prompts) * work.group_size) // work.group_size):
        out = model.generate(
            chunk,
            attention_mask=torch.ones_like(chunk),
            max_new_tokens=work.max_new_tokens,
            num_return_sequences=work.group_size,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            eos_token_id=EOS,
            pad_token_id=PAD,
            use_cache=True,
        )
        ended = (out[:, prompts.shape[1] :] == EOS).cumsum(1)
        sampled += int((ended == 0).sum() + (ended[:, -1] > 0).sum())
    return sampled / (time.perf_counter() - start)


def compare(work: Workload, repeats: int) -> tuple[float, float, float]:
    """Tokens per second of both, and the ratio."""
    torch.manual_seed(0)
    model = build_model(work)
    prompts = torch.randint(2, work.vocabulary, (work.prompts, work.prompt_length))
    ours, theirs = [], []
    with torch.no_grad():
        for repeat in range(-1, repeats):  # the first is a warm-up
            ours.append(time_engine(model, prompts, work, repeat + 1))
            theirs.append(time_generate(model, prompts, work, repeat + 1))
    ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]
    return statistics.median(ours[1:]), statistics.median(theirs[1:]), statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads, ", end="")
    print(f"CPU, median of {args.repeats}\n")
    print(f"| {'workload':<52}| {'engine tok/s':>12} | {'generate tok/s':>14} | {'ratio':>5} |")
    print(f"|{'-' * 53}|{'-' * 14}|{'-' * 16}|{'-' * 7}|")
    for work in WORKLOADS:
        ours, theirs, ratio = compare(work, args.repeats)
        print(f"| {work.name:<52}| {ours:>12,.0f} | {theirs:>14,.0f} | {ratio:>5.2f} |", flush=True)


if __name__ == "__main__":
    main()
