"""Builders that the tests share: tiny models, random experience, and runs on two ranks."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher, _WorkerOutput
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lit_rlhf.strategies import FSDP2Strategy
from lit_rlhf.types import CompletionBatch, Experience, PromptBatch

SHARED = Path(__file__).resolve().parents[2] / "shared"  # data and models that may lie beside the checkout
VOCABULARY, PAD, EOS = 64, 0, 1
KINDS = ("llama", "qwen2", "gpt2")


def tiny_model(kind="llama", vocab_size=VOCABULARY, seed=0, **extra):
    """A random model of hidden size 32 and 2 layers whose logits are far from flat."""
    common = {"vocab_size": vocab_size, "initializer_range": 0.2, "bos_token_id": None}
    common |= {"eos_token_id": EOS, "pad_token_id": PAD}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "gpt2":
            dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
            return GPT2LMHeadModel(GPT2Config(**{**common, **dropouts, **sizes, **extra}))
        config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[kind]
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128, **heads}
        return model(config(**{**common, **sizes, **extra}))


class NumberTokenizer:
    """Text is numbers joined by spaces: `"5 6 7"` is `[5, 6, 7]`. All that the modules ask of a tokenizer."""

    pad_token_id, eos_token_id, bos_token_id, name_or_path = PAD, EOS, None, ""

    def encode(self, text, add_special_tokens=True):
        return [int(word) for word in text.split()]

    def decode(self, ids, skip_special_tokens=False):
        kept = [i for i in ids if not (skip_special_tokens and i in (PAD, EOS))]
        return " ".join(str(i) for i in kept)

    def batch_decode(self, rows, skip_special_tokens=False):
        return [self.decode(row, skip_special_tokens) for row in rows]


def build(algorithm, model=None, **arguments):
    """An algorithm on a tiny model in float64 (or the model given), with a reward nobody needs."""
    defaults = {"tokenizer": NumberTokenizer(), "reward_funcs": [sum_of_ids]}
    model = tiny_model().double() if model is None else model
    return algorithm(policy=model, **{**defaults, **arguments})


def sum_of_ids(completion_ids, **kwargs):
    """A reward that differs from sample to sample."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def prompt_rows(count, longest=4):
    """Rows with prompts of different lengths, all different."""
    return [{"prompt": " ".join(str(2 + (i + j) % 60) for j in range(1 + i % longest))} for i in range(count)]


def prompts(count, longest=4, start=0):
    texts = [row["prompt"] for row in prompt_rows(count, longest)]
    return PromptBatch(
        [NumberTokenizer().encode(t) for t in texts], {"prompt": texts}, list(range(start, start + count))
    )


def mask_of(lengths, width, left=False):
    mask = torch.arange(width) < torch.as_tensor(lengths).unsqueeze(1)
    return mask.flip(1) if left else mask


def random_experience(
    lengths=(3, 7, 1, 5, 2, 6), prompt_lengths=(2, 5, 1, 4, 5, 3), group_size=2, seed=0, dtype=torch.float64, model=None
):
    """Rows of uneven lengths (0 is a row without weight) whose old and reference policies are others than now.

    With `model` its log-probs are the centre that old and reference scatter about, so that ratios lie around 1 and
    some are clipped.
    """
    g = torch.Generator().manual_seed(seed)
    N, P, T = len(lengths), max(prompt_lengths), max(max(lengths), 1)
    noise = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    rows = {
        "prompt_ids": torch.randint(2, VOCABULARY, (N, P), generator=g),
        "prompt_mask": mask_of(prompt_lengths, P, left=True),
        "response_ids": torch.randint(2, VOCABULARY, (N, T), generator=g),
        "response_mask": mask_of(lengths, T),
    }
    base = plain_logprobs(model, rows).to(dtype) if model is not None else noise(N, T) * 0.3 - 2
    rewards = noise(N).round(decimals=2)
    return Experience(
        **rows,
        behavior_logprobs=base + 0.3 * noise(N, T),
        old_logprobs=base + 0.3 * noise(N, T),
        ref_logprobs=base + 0.5 * noise(N, T),
        truncated=torch.rand(N, generator=g) < 0.3,
        group_ids=torch.arange(N) // group_size,
        version=torch.zeros(N, dtype=torch.long),
        raw_rewards=rewards,
        reward_parts=rewards.unsqueeze(1),
        rewards=rewards,
        advantages=noise(N, T),
    )


@torch.no_grad()
def plain_logprobs(model, rows, temperature=1.0):
    """Log-probs `[N, T]` of each row on its own: no padding, no cache, no masks. 0 outside the response mask.

    `rows` has the four id and mask tensors, by name or as attributes; the masks have no holes.
    """
    get = rows.__getitem__ if isinstance(rows, dict) else lambda name: getattr(rows, name)
    found = torch.zeros(get("response_ids").shape, dtype=torch.float64)
    for i in range(len(found)):
        prompt = get("prompt_ids")[i][get("prompt_mask")[i]]
        response = get("response_ids")[i][get("response_mask")[i]]
        if not len(response):
            continue
        logits = model(torch.cat([prompt, response]).unsqueeze(0), use_cache=False).logits[0].double() / temperature
        for t, token in enumerate(response.tolist()):
            z = logits[len(prompt) + t - 1]
            found[i, t] = z[token] - z.exp().sum().log()
    return found


def as_completions(experience):
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask")
    return CompletionBatch(**{name: getattr(experience, name) for name in names})


def with_columns(batch, left=0, right=0, poison=float("nan"), ids=-100):
    """The batch with columns that no mask covers: ids out of the vocabulary, NaN everywhere else."""
    changed = {}
    for name, x in vars(batch).items():
        if not isinstance(x, torch.Tensor) or x.ndim < 2 or name == "reward_parts":
            continue
        value = False if x.dtype == torch.bool else ids if not x.is_floating_point() else poison
        size = (left, 0) if name.startswith("prompt_") else (0, right)
        changed[name] = torch.nn.functional.pad(x, size, value=value)
    return type(batch)(**{**vars(batch), **changed})


def gradients(module, *losses):
    """Parameter gradients by name of the sum of the losses; parameters that are not reached are left out."""
    module.zero_grad()
    for loss in losses:
        loss.backward()
    return {n: p.grad.clone() for n, p in module.models.named_parameters() if p.grad is not None}


def assert_gradients_equal(found, expected, atol=1e-10):
    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-4, "a test on zero gradients proves nothing"
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=atol, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def pretend_trainer(module, accumulate=1, world_size=1, rank=0):
    """Give the module what it reads off a trainer."""
    module._trainer = SimpleNamespace(
        world_size=world_size,
        global_rank=rank,
        accumulate_grad_batches=accumulate,
        global_step=0,
        train_dataloader=None,
        max_steps=-1,
        max_epochs=None,
        limit_train_batches=1.0,
        precision="32-true",
        precision_plugin=Precision(),
    )
    return module


class _ForkLauncher(_MultiProcessingLauncher):
    """Without the weights for the parent process: it could not load shards."""

    def _collect_rank_zero_results(self, trainer, results):
        if self._strategy.local_rank == 0:
            return _WorkerOutput(None, None, trainer.state, results, self.get_extra_results(trainer))
        return None


class ForkedFSDP2(FSDP2Strategy):
    """FSDP2 on forked processes."""

    def _configure_launcher(self):
        self._launcher = _ForkLauncher(self, start_method="fork")


def forked_ddp(timeout):
    return DDPStrategy(start_method="fork", timeout=timedelta(seconds=timeout))


FORKED = {
    "ddp": forked_ddp,
    "fsdp2": ForkedFSDP2,
    "fsdp2 in shards": partial(ForkedFSDP2, save_distributed_checkpoint=True),
}


def trainer(devices=1, accumulate=1, epochs=1, strategy="ddp", seconds=60, **extra):
    """A quiet trainer on the CPU; two devices are two forked processes, which wait a minute for each other."""
    strategy = FORKED[strategy](timeout=seconds) if devices > 1 else "auto"
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    arguments = {**quiet, "max_epochs": epochs, "accumulate_grad_batches": accumulate, **extra}
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, **arguments)
