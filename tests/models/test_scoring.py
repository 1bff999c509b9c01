"""The one scoring path, against plain forwards of every row on its own."""

import math

import pytest
import torch
from torch import nn

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.models.scoring import score
from lit_rlhf.models.wrapper import PolicyReferenceValue
from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.types import CompletionBatch, SamplingConfig
from tests.helpers import (
    EOS,
    KINDS,
    PAD,
    VOCABULARY,
    build,
    mask_of,
    plain_logprobs,
    prompt_rows,
    random_experience,
    tiny_model,
    trainer,
    with_columns,
)

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


def scored(model, rows, **keywords):
    return score(model, rows, **keywords)


def parameter_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_sampling_and_scoring_give_the_same_log_probs(kind, temperature):
    model = tiny_model(kind)
    engine = TransformersEngine(range(EOS, 12), PAD)  # many ends: responses of different lengths
    engine.update_weights(model, 0)
    sampling = SamplingConfig(max_new_tokens=12, temperature=temperature, group_size=3)
    rollout = engine.generate(PROMPTS, sampling, seed=0)
    assert rollout.lengths.unique().numel() > 2

    found = scored(model, rollout, temperature=temperature).logprobs

    torch.testing.assert_close(found, rollout.behavior_logprobs, atol=1e-4, rtol=0)
    other = scored(model, rollout, temperature=temperature + 0.3).logprobs
    assert (other - found).abs().max() > 0.05, "the temperature changes nothing"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_scoring_equals_a_plain_forward_of_every_row_alone(kind, temperature):
    model, rows = tiny_model(kind).double(), random_experience(lengths=(3, 7, 1, 0, 2, 6))

    found = scored(model, rows, temperature=temperature).logprobs

    torch.testing.assert_close(found, plain_logprobs(model, rows, temperature), atol=1e-9, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_whole_distribution(temperature):
    model, rows = tiny_model().double(), random_experience()

    found = scored(model, rows, temperature=temperature, entropy=True).entropy

    for i, (P, T) in enumerate(zip(rows.prompt_mask.sum(1), rows.response_mask.sum(1), strict=True)):
        ids = torch.cat([rows.prompt_ids[i, -P:], rows.response_ids[i, :T]])
        p = (model(ids.unsqueeze(0)).logits[0, P - 1 : P + T - 1] / temperature).softmax(-1)
        torch.testing.assert_close(found[i, :T], -(p * p.log()).sum(-1), atol=1e-9, rtol=0)
        assert (found[i, T:] == 0).all()
    assert (found >= 0).all()
    assert (found <= math.log(VOCABULARY)).all()


def test_entropy_is_left_out_unless_asked_for():
    assert scored(tiny_model(), random_experience()).entropy is None


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
@pytest.mark.parametrize("ids", [0, 7, -100, 10**6])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_columns_change_nothing(kind, ids, left, right):
    model, rows = tiny_model(kind).double(), random_experience()
    weights = torch.randn(rows.response_mask.shape, dtype=torch.float64)
    T = weights.shape[1]

    def value(scores):
        return (scores.logprobs[:, :T] * weights).sum() + (scores.entropy[:, :T] * weights).sum()

    before = scored(model, rows, entropy=True)
    after = scored(model, with_columns(rows, left, right, ids=ids), entropy=True)

    torch.testing.assert_close(after.logprobs[:, :T], before.logprobs, atol=1e-9, rtol=0)
    torch.testing.assert_close(after.entropy[:, :T], before.entropy, atol=1e-9, rtol=0)
    assert (after.logprobs[:, T:] == 0).all()
    expected = parameter_gradients(model, value(before))
    for name, gradient in parameter_gradients(model, value(after)).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-8, rtol=0)


def test_padding_columns_change_nothing_in_float32():
    model, rows = tiny_model("gpt2"), random_experience(dtype=torch.float32)
    before, after = scored(model, rows).logprobs, scored(model, with_columns(rows, 4, 4)).logprobs
    torch.testing.assert_close(after[:, : before.shape[1]], before, atol=1e-4, rtol=0)


def test_what_stands_in_padded_cells_does_not_matter():
    model, rows = tiny_model().double(), random_experience()
    garbage = (
        rows.prompt_ids.masked_fill(~rows.prompt_mask, -100),
        rows.response_ids.masked_fill(~rows.response_mask, 10**9),
    )
    found = score(model, CompletionBatch(garbage[0], rows.prompt_mask, garbage[1], rows.response_mask)).logprobs
    torch.testing.assert_close(found, scored(model, rows).logprobs, atol=0, rtol=0)


def test_tool_tokens_are_attended_to_and_not_scored():
    model = tiny_model().double()
    prompt, response = torch.tensor([[5, 6, 7]]), torch.tensor([[10, 11, 12, 13, 14, 15]])
    mask = torch.tensor([[True, True, False, False, True, False]])  # two tool tokens; the last is padding

    found = score(model, CompletionBatch(prompt, torch.ones_like(prompt).bool(), response, mask), entropy=True)

    z = model(torch.cat([prompt, response[:, :5]], 1)).logits[0].log_softmax(-1)
    zero = torch.zeros((), dtype=torch.float64)
    expected = torch.stack([z[2, 10], z[3, 11], zero, zero, z[6, 14], zero])
    torch.testing.assert_close(found.logprobs[0], expected, atol=1e-9, rtol=0)
    assert (found.entropy[0] != 0).tolist() == mask[0].tolist()
    changed = response.index_fill(1, torch.tensor([3]), 50)
    other = score(model, CompletionBatch(prompt, torch.ones_like(prompt).bool(), changed, mask))
    assert abs(other.logprobs[0, 4] - found.logprobs[0, 4]) > 1e-3, "the tool's output was not read"
    assert (other.logprobs[0, :2] == found.logprobs[0, :2]).all(), "an earlier token saw a later one"


class TableModel(nn.Module):
    """Logits are a table by position, whatever the ids: their gradient says which positions predict."""

    def __init__(self, logits):
        super().__init__()
        self.table = nn.Parameter(logits)

    def forward(self, input_ids, use_cache=None):
        return type("Output", (), {"logits": self.table[: len(input_ids), : input_ids.shape[1]]})()


def test_only_the_positions_that_predict_a_response_token_get_a_gradient():
    P, T, lengths, prompt_lengths = 3, 4, [4, 2, 0], [3, 1, 2]  # the longest first, as the rows are read
    model = TableModel(torch.zeros(3, P + T, 5, dtype=torch.float64))
    ids = torch.randint(0, 5, (3, P + T))
    masks = mask_of(prompt_lengths, P, left=True), mask_of(lengths, T)

    scores = score(model, CompletionBatch(ids[:, :P], masks[0], ids[:, P:], masks[1]), entropy=True)
    (scores.logprobs.sum() + 0.5 * scores.entropy.sum()).backward()

    assert -scores.logprobs[masks[1]].mean().item() == pytest.approx(
        math.log(5), abs=1e-12
    )  # C25: log V whatever the mask
    assert scores.entropy[masks[1]].mean().item() == pytest.approx(math.log(5), abs=1e-12)
    reached = (model.table.grad != 0).any(-1)
    expected = torch.zeros(3, P + T, dtype=torch.bool)
    for i, (prompt, length) in enumerate(zip(prompt_lengths, lengths, strict=True)):
        expected[i, prompt - 1 : prompt - 1 + length] = True
    assert reached.tolist() == expected.tolist()
    for i, t in [(0, 0), (0, 3), (1, 1)]:  # the gradient of log p is onehot - p
        onehot = torch.eye(5, dtype=torch.float64)[ids[i, P + t]]
        torch.testing.assert_close(model.table.grad[i, prompt_lengths[i] + t - 1], onehot - 0.2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_computed_only_where_they_are_needed(kind):
    model, rows, seen = tiny_model(kind), random_experience(dtype=torch.float32), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel() // 32))
    scored(model, rows, entropy=True)
    assert sum(seen) == int(rows.response_mask.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_valid_token_has_finite_zero_gradients(kind):
    model, rows = tiny_model(kind), random_experience(lengths=(0, 0), prompt_lengths=(2, 1), dtype=torch.float32)

    scores = scored(model, rows, entropy=True)
    found = parameter_gradients(model, scores.logprobs.sum() + scores.entropy.sum())

    assert (scores.logprobs == 0).all()
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all((gradient == 0).all() for gradient in found.values())


class WithoutLogitsToKeep(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, use_cache):
        return self.model(input_ids=input_ids, use_cache=use_cache)


def test_a_model_that_cannot_leave_logits_out_scores_the_same():
    model, rows = tiny_model().double(), random_experience(lengths=(3, 0, 1, 5, 2, 6))
    found, expected = scored(WithoutLogitsToKeep(model), rows, entropy=True), scored(model, rows, entropy=True)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-10, rtol=0)


def test_bfloat16_logits_are_reduced_in_float32():
    model, rows = tiny_model().to(torch.bfloat16), random_experience(dtype=torch.float32)
    assert scored(model, rows).logprobs.dtype == torch.float32


def test_dropout_is_switched_off():
    dropouts = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    rows, model = random_experience(dtype=torch.float32), tiny_model("gpt2", **dropouts)
    model.train()
    assert (scored(model, rows).logprobs != scored(model, rows).logprobs).any(), (
        "the model has no dropout to begin with"
    )

    models = PolicyReferenceValue(model).train()

    assert models.policy.training
    assert (models.score(rows).logprobs == models.score(rows).logprobs).all()


def test_the_reference_is_a_frozen_copy_that_stays_in_eval_mode():
    models, rows = PolicyReferenceValue(tiny_model(), reference=True), random_experience(dtype=torch.float32)

    models.train()

    assert models.policy.training
    assert not any(module.training for module in models.reference.modules())
    assert not any(p.requires_grad for p in models.reference.parameters())
    shared = {p.data_ptr() for p in models.policy.parameters()} & {p.data_ptr() for p in models.reference.parameters()}
    assert not shared
    before = models.score_reference(rows, temperature=0.7).logprobs
    torch.testing.assert_close(before, models.score(rows, temperature=0.7).logprobs.detach(), atol=1e-6, rtol=0)
    assert not before.requires_grad
    with torch.no_grad():
        for p in models.policy.parameters():
            p.add_(0.1)
    assert (models.score_reference(rows, temperature=0.7).logprobs == before).all()
    assert (models.score(rows, temperature=0.7).logprobs - before).abs().max() > 1e-3


def test_without_a_reference_asking_for_it_is_an_error():
    models = PolicyReferenceValue(tiny_model())
    assert models.reference is None
    with pytest.raises(RuntimeError, match="no reference"):
        models.score_reference(random_experience(dtype=torch.float32))


def test_no_reference_is_held_when_nothing_needs_it():
    assert build(GRPO, kl_coef=0.0).models.reference is None
    assert build(GRPO, kl_coef=0.01).models.reference is not None


class WatchesModes(GRPO):
    def training_step(self, batch, batch_idx=0):
        self.modes.append((self.models.policy.training, any(m.training for m in self.models.reference.modules())))
        self.losses.append(batch.ref_logprobs.clone())
        return super().training_step(batch, batch_idx)


def test_inside_a_fit_the_reference_neither_trains_nor_moves():
    module = build(
        WatchesModes,
        tiny_model(),
        kl_coef=0.1,
        lr=1e-2,
        group_size=2,
        prompts_per_rollout=2,
        sampling=SamplingConfig(max_new_tokens=4),
    )
    module.modes, module.losses = [], []
    policy, reference = (
        {name: p.clone() for name, p in model.state_dict().items()}
        for model in (module.models.policy, module.models.reference)
    )

    trainer(epochs=2, limit_val_batches=1).fit(module, datamodule=RowsDataModule(prompt_rows(4), prompt_rows(2)))

    assert module.modes == [(True, False)] * 2
    assert all((p == reference[name]).all() for name, p in module.models.reference.state_dict().items())
    assert any((p != policy[name]).any() for name, p in module.models.policy.state_dict().items())
