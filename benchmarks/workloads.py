"""The work that the benchmarks time: models, tokens, prompts, completions and rewards, the same for every library."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

PAD, BOS, EOS = 0, 1, 2
LEARNING_RATE = 1e-6  # so low that the lengths and the losses of a run stay those of its beginning
STORIES = {"hidden": 64, "layers": 5, "vocabulary": 512}


@dataclass(frozen=True)
class Workload:
    """A model and what is done with it in one step.

    `rows` is the number of completions, or of pairs, of an optimiser step.
    """

    name: str
    title: str
    algorithm: Literal["grpo", "ppo", "dpo", "sft"] = "grpo"
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4096
    prompt_length: int = 32
    new_tokens: int = 64  # of a completion; the most of them where `mean_length` is given
    mean_length: int | None = None  # a completion ends with probability 1 / mean_length after each token
    group_size: int = 8
    rows: int = 64
    stories: str | None = None  # a folder: the model is loaded from it

    @property
    def samples(self) -> bool:
        """Whether completions are sampled; otherwise they are given."""
        return self.algorithm in ("grpo", "ppo")

    @property
    def steps_per_pass(self) -> int:
        """Optimiser steps of a pass over the given completions."""
        return 4

    @property
    def ragged(self) -> bool:
        """Whether the number of sampled tokens is random."""
        return self.samples and self.mean_length is not None


WORKLOADS = {
    work.name: work
    for work in (
        Workload("W1", "GRPO, stories260k, 8 x 8 samples x 64 tokens", **STORIES),
        Workload("W2", "GRPO, prompt 256, 8 x 8 x 64", prompt_length=256),
        Workload("W3", "GRPO, lengths geometric, mean 64, max 256", new_tokens=256, mean_length=64),
        Workload("W4", "GRPO, vocabulary 64,000, 8 x 8 x 64", vocabulary=64_000),
        Workload("W5", "DPO, 32 pairs, lengths 16 to 256", "dpo", new_tokens=256, rows=32),
        Workload("W6", "SFT, 32 rows, lengths 16 to 256", "sft", new_tokens=256, rows=32),
        Workload("W7", "PPO, value function, 4 passes x 2 minibatches", "ppo"),
    )
}


def build_model(work: Workload) -> Any:
    """The workload's model with the same weights at every call.

    EOS has the probability that the lengths want after every token, by a bias of the head that is not trained: none,
    or `1 / mean_length` beside logits that are nearly equal.
    """
    torch.manual_seed(0)
    if work.stories is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(work.stories, dtype="float32")
    else:
        model = transformers.LlamaForCausalLM(_config(work))
    bias = torch.zeros(work.vocabulary)
    bias[EOS] = -1e4 if work.mean_length is None else math.log((work.vocabulary - 1) / (work.mean_length - 1))
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    model.generation_config = transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, bos_token_id=BOS)
    return model.train()


def _config(work: Workload) -> transformers.LlamaConfig:
    """Of stories260k where the sizes are its own."""
    sizes = {"intermediate_size": 4 * work.hidden, "num_attention_heads": work.hidden // 32}
    if work.hidden == STORIES["hidden"]:
        sizes = {"intermediate_size": 172, "num_attention_heads": 8, "num_key_value_heads": 4}
    return transformers.LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        num_hidden_layers=work.layers,
        max_position_embeddings=1024,
        tie_word_embeddings=work.hidden == STORIES["hidden"],
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        **sizes,
    )


def build_tokenizer(work: Workload) -> transformers.PreTrainedTokenizerFast:
    """One word per token, `t17` for token 17."""
    special = {PAD: "<pad>", BOS: "<s>", EOS: "</s>"}
    words = {special.get(i, f"t{i}"): i for i in range(work.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": special[PAD], "bos_token": special[BOS], "eos_token": special[EOS]}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **names)


def build_rows(work: Workload) -> list[dict[str, str]]:
    """Prompts, or those of one pass with the completions that the algorithm is given, as a dataset has them."""
    generator = random.Random(0)
    count = 512 if work.samples else work.rows * work.steps_per_pass
    rows = [{"prompt": words(generator, work, work.prompt_length)} for _ in range(count)]
    for row in rows:
        first, second = (" " + words(generator, work, generator.randint(16, 256) - 1) for _ in range(2))  # EOS follows
        if work.algorithm == "dpo":
            row |= {"chosen": first, "rejected": second}
        elif work.algorithm == "sft":
            row["completion"] = first
    return rows


def sampled_rows(work: Workload, groups: int) -> dict[str, Tensor]:
    """Random completions of some prompts, with old log-probs near the model's own, on both sides of the clip range.

    `prompts` `[N, P]`, `responses` and `mask` `[N, T]`, `old` `[N, T]`, `advantages` `[N]`.
    """
    generator, lengths = torch.Generator().manual_seed(0), random.Random(0)
    rows = groups * work.group_size
    prompts = torch.randint(EOS + 1, work.vocabulary, (groups, work.prompt_length), generator=generator)
    prompts = prompts.repeat_interleave(work.group_size, 0)
    responses = torch.randint(EOS + 1, work.vocabulary, (rows, work.new_tokens), generator=generator)
    drawn = [min(work.new_tokens, 1 + int(lengths.expovariate(1 / (work.mean_length or 1e9)))) for _ in range(rows)]
    mask = torch.arange(work.new_tokens) < torch.tensor(drawn).unsqueeze(1)
    with torch.no_grad():
        logits = build_model(work)(torch.cat([prompts, responses], 1), logits_to_keep=work.new_tokens + 1).logits
        logps = logits[:, :-1].log_softmax(-1).gather(2, responses.unsqueeze(2)).squeeze(2)
    old = logps + 0.2 * torch.randn(logps.shape, generator=generator)
    advantages = torch.randn(rows, generator=generator)
    return {"prompts": prompts, "responses": responses, "mask": mask, "old": old, "advantages": advantages}


def words(generator: random.Random, work: Workload, count: int) -> str:
    """Text of `count` random tokens."""
    return " ".join(f"t{generator.randrange(EOS + 1, work.vocabulary)}" for _ in range(count))


def reward_of(ids: Sequence[int]) -> float:
    """A cheap reward that differs from completion to completion."""
    return sum(ids) % 97 / 97


def with_stories(work: Workload, folder: Path | None) -> Workload:
    """W1 with the weights in `folder`, where there is one."""
    return replace(work, stories=str(folder)) if folder is not None and work.name == "W1" else work
