"""TRL's own trainers on the CPU, asked for the loss and the gradient of rows that the tests made up.

The trainers are the real ones and their methods are called as they are; only what samples is replaced. TRL scores
tokens in float32 whatever the model's dtype, and passes no position ids, so numbers agree to about 1e-6 and not to
the last digit of a float64.
"""

import math

import pytest
import torch
from transformers import AutoTokenizer

from lit_rlhf.models.loading import ASSETS
from tests.helpers import EOS, gradients, pretend_trainer, random_experience, tiny_model

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'lit_rlhf[bench]'")
datasets = pytest.importorskip("datasets")  # comes with TRL

RELATIVE_ERROR = 1e-5
GROUP_SIZE, LONGEST = 3, 10
REWARDS = (1.0, 0.5, -0.5, 0.5, 2.0, 0.125)


def policy():
    """The policy of both sides: the same weights at every call, in float64."""
    return tiny_model().double()


def neighbour(seed):
    """A model whose log-probs lie near the policy's and are others."""
    model, generator = policy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def reference():
    """The frozen reference of both sides."""
    return neighbour(seed=1)


def rows(**arguments):
    """Six completions of two prompts' groups, of uneven lengths, off-policy, each ended by EOS."""
    batch = random_experience(group_size=GROUP_SIZE, model=policy(), **arguments)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    last = batch.response_mask.sum(1, keepdim=True) - 1
    ids = batch.response_ids.scatter(1, last.clamp(min=0), EOS)
    truncated = torch.zeros_like(batch.truncated)
    return replaced(batch, response_ids=ids, rewards=rewards, raw_rewards=rewards, truncated=truncated)


def trainer_of(kind, folder, *, model=None, micro_batches=1, **config):
    """`GRPOTrainer` or `RLOOTrainer` of six rows per optimiser step, with the reference in reach of its beta."""
    model = policy() if model is None else model
    if config.get("beta"):
        reference().save_pretrained(folder / "reference")
        model.name_or_path = model.config._name_or_path = str(folder / "reference")
    sizes = {"num_generations": GROUP_SIZE, "max_completion_length": LONGEST}
    sizes |= {"per_device_train_batch_size": 6 // micro_batches, "gradient_accumulation_steps": micro_batches}
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        reward_funcs=lambda completions, reward, **_: reward,
        args=_config(kind, folder, **{**sizes, **config}),
        train_dataset=datasets.Dataset.from_dict({"prompt": [""], "reward": [0.0]}),
        processing_class=_tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = micro_batches  # what Trainer.train would set
    return trainer


def preference_trainer(kind, folder, model, *, ref_model=None, **config):
    """`DPOTrainer` or `RewardTrainer`; the pairs come through its collator later, this one only makes it start."""
    models = {} if ref_model is None else {"ref_model": ref_model}
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=_config(kind, folder, **config),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["1"], "chosen": ["2"], "rejected": ["3"]}),
        processing_class=_tokenizer(),
        **models,
    )


def _config(kind, folder, **config):
    return getattr(trl, f"{kind}Config")(
        output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **config
    )


def _tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_base")


def scored(trainer, batch):
    """What TRL makes of the sampled rows: its own padding, masks, advantages and reference log-probs."""
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    answers = [ids[mask].tolist() for ids, mask in zip(batch.response_ids, batch.response_mask, strict=True)]
    texts = [""] * len(answers)
    sampled = (prompts, answers, texts)
    if isinstance(trainer, trl.GRPOTrainer):  # which also has tools, the sampler's log-probs and images
        sampled = (prompts, answers, None, texts, None, {}, None, [])
    trainer._generate = lambda prompts: sampled
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": "", "reward": r} for r in batch.rewards.tolist()])


def with_old_logprobs(inputs, batch):
    """Log-probs at the start of the update phase: per token for GRPO, summed over the completion for RLOO."""
    if "old_logps" in inputs:
        return {**inputs, "old_logps": torch.where(batch.response_mask, batch.old_logprobs, 0.0).sum(1)}
    return {**inputs, "old_per_token_logps": batch.old_logprobs}


def in_parts(inputs, micro_batches):
    """Equal micro-batches of TRL's inputs; counts belong to all of them."""
    size = len(inputs["completion_ids"]) // micro_batches
    starts = range(0, micro_batches * size, size)
    return [{k: v[start : start + size] if v.ndim else v for k, v in inputs.items()} for start in starts]


def theirs(trainer, *parts):
    """TRL's loss and gradients by parameter, summed over the micro-batches of an optimiser step."""
    trainer.model.train()
    trainer.model.zero_grad()
    losses = [trainer.compute_loss(trainer.model, part) for part in parts]
    for loss in losses:
        loss.backward()
    return sum(losses).item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def scaled(found, factor):
    """A loss and its gradients, times a number."""
    loss, gradient = found
    return factor * loss, {name: factor * g for name, g in gradient.items()}


def with_trl_reference(module):
    """Give the module the reference that TRL has."""
    module.models.reference.load_state_dict(reference().state_dict())
    return module


def ours(module, batch, micro_batches=1, counted=True):
    """The module's loss and gradients, as they reach the optimiser.

    `counted` says whether micro-batches know the size of their step, as they do in training.
    """
    pretend_trainer(module, accumulate=micro_batches)
    size = len(batch) // micro_batches
    parts = [batch[torch.arange(start, start + size)] for start in range(0, micro_batches * size, size)]
    if counted:
        counts = {"step_tokens": batch.response_mask.sum(), "step_rows": batch.response_mask.any(1).sum()}
        parts = [replaced(part, **counts) for part in parts]
    losses = [module.training_step(part) / micro_batches for part in parts]  # the division is Lightning's
    found = gradients(module, *losses)
    return sum(losses).item(), {name.removeprefix("policy."): g for name, g in found.items()}


def experience(module, batch):
    """The rows as the module trains on them: with its own reference log-probs, shaped rewards and advantages."""
    return module.experience(module.score_rollout(batch))


def replaced(batch, **fields):
    return type(batch)(**{**vars(batch), **fields})


def relative_errors(found, expected):
    """Of the loss, and of each parameter's gradient as a whole."""
    (loss, gradient), (expected_loss, expected_gradient) = found, expected
    assert gradient.keys() == expected_gradient.keys()
    errors = {"loss": abs(loss - expected_loss) / abs(expected_loss)}
    return errors | {n: float((gradient[n] - g).norm() / g.norm()) for n, g in expected_gradient.items()}


def assert_agree(found, expected):
    """The same loss and the same gradient of every parameter, to `RELATIVE_ERROR`; not NaN, not 0."""
    errors = relative_errors(found, expected)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    assert errors[worst] <= RELATIVE_ERROR, f"{worst}: relative error {errors[worst]:.3g}"


def assert_differ(found, expected, by=1e-2):
    """Some gradient differs by much more than a rounding error: what the test says about a departure is true."""
    assert max(relative_errors(found, expected).values()) > by
