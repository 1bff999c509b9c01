"""Shortcuts of the scoring path: the same numbers and gradients with each of them and without, on fewer tokens."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from lit_rlhf.models import forward, scoring
from lit_rlhf.models.forward import Shortcuts, by_length
from lit_rlhf.models.heads import ScalarHead
from lit_rlhf.models.output_layer import continues_from_cache, output_layer
from lit_rlhf.models.scoring import score, score_values
from lit_rlhf.models.wrapper import PolicyReferenceValue
from lit_rlhf.types import CompletionBatch, pad_left, pad_right
from tests.helpers import KINDS, VOCABULARY, tiny_model

NONE = Shortcuts(share_prompts=False, sort_by_length=False, chunk_vocabulary=False)
EACH = [Shortcuts(*flags) for flags in product((False, True), repeat=3)][1:]
PROMPTS = ([5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [5, 6])


@pytest.fixture(autouse=True, params=[(0, 8192), (0, 14), (5, 8192)], ids=str)
def a_forward_pass_costs_little(request, monkeypatch):
    """So that even a handful of tokens are split and shared: all, or where lengths differ much; limited, or not."""
    cost, most = request.param
    monkeypatch.setattr(forward, "_TOKENS_OF_A_PASS", {"cpu": cost})
    monkeypatch.setattr(forward, "_TOKENS_AT_ONCE", {"cpu": most})


def group_rows(lengths=(3, 7, 1, 0, 2, 6, 4, 4, 5, 2, 9, 1), samples=3):
    """Responses of several prompts, three of each, in a mixed order; one with a tool's output in the middle."""
    generator = torch.Generator().manual_seed(1)
    responses = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    prompts = [p for p in PROMPTS for _ in range(samples)]
    order = torch.randperm(len(responses), generator=generator)
    rows = CompletionBatch(*pad_left(prompts), *pad_right(responses))[order]
    mask = rows.response_mask.clone()
    mask[rows.response_mask.sum(1) > 6, 2:4] = False
    return replace(rows, response_mask=mask)


def alone(model, rows, temperature):
    """Log-probs by one plain forward pass per row, without padding."""
    found = torch.zeros(rows.response_mask.shape, dtype=torch.float64)
    for i, mask in enumerate(rows.response_mask):
        prompt, length = rows.prompt_ids[i][rows.prompt_mask[i]], int(mask.nonzero().max()) + 1 if mask.any() else 0
        response = rows.response_ids[i, :length]
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1] / temperature
        found[i, :length] = logits.log_softmax(-1)[torch.arange(length), response] * mask[:length]
    return found.detach()


def everything(model, shortcuts, rows=None, **keywords):
    """Scores of the rows, and the gradient of a weighted sum of all of them."""
    rows = group_rows() if rows is None else rows
    model.zero_grad()
    found = score(model, rows, temperature=0.8, entropy=True, shortcuts=shortcuts, **keywords)
    weights = torch.linspace(-1, 1, rows.response_mask.numel(), dtype=torch.float64).view(rows.response_mask.shape)
    (weights * found.logprobs + 0.3 * weights.flip(0) * found.entropy).sum().backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradient(found, expected):
    """To what is left of float32: the models normalise in it whatever their weights are."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12, name


@pytest.mark.parametrize("shortcuts", EACH, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_shortcut_changes_a_score_or_a_gradient(kind, shortcuts):
    model = tiny_model(kind).double()
    (plain, plain_gradient), (found, gradient) = everything(model, NONE), everything(model, shortcuts)
    torch.testing.assert_close(plain.logprobs, alone(model, group_rows(), 0.8), atol=1e-10, rtol=0)
    torch.testing.assert_close(found.logprobs, plain.logprobs, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.entropy, plain.entropy, atol=1e-10, rtol=0)
    assert_same_gradient(gradient, plain_gradient)


@pytest.mark.parametrize("shortcuts", EACH, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_shortcut_changes_a_value(kind, shortcuts):
    model, found = tiny_model(kind).double(), []
    head = ScalarHead(model, 0.5)
    for chosen in (NONE, shortcuts):
        model.zero_grad()
        values = score_values(model.base_model, head, group_rows(), chosen)
        (values.values.sum() + values.last.square().sum()).backward()
        shared = score(model, group_rows(), head=head, shortcuts=chosen).values
        found.append((values, shared, model.get_input_embeddings().weight.grad.clone()))
    (values, shared, gradient), (values2, shared2, gradient2) = found
    torch.testing.assert_close(values2.values, values.values, atol=1e-10, rtol=0)
    torch.testing.assert_close(values2.last, values.last, atol=1e-10, rtol=0)
    torch.testing.assert_close(shared2, values.values, atol=1e-10, rtol=0)
    torch.testing.assert_close(shared, values.values, atol=1e-10, rtol=0)
    assert_same_gradient({"embedding": gradient2}, {"embedding": gradient})


@pytest.mark.parametrize("shortcuts", EACH, ids=str)
def test_no_shortcut_changes_the_exact_kl(shortcuts):
    model, reference, found = tiny_model().double(), tiny_model(seed=1).double(), []
    for chosen in (NONE, shortcuts):
        model.zero_grad()
        kl = score(model, group_rows(), reference=reference, shortcuts=chosen).kl
        kl.sum().backward()
        found.append((kl, model.lm_head.weight.grad.clone(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-10, rtol=0)
    assert_same_gradient(dict(enumerate(found[1][1:])), dict(enumerate(found[0][1:])))
    assert reference.lm_head.weight.grad is None


def tokens_read(model, rows, shortcuts):
    """Tokens, padding included, that go into the trunk for these rows."""
    score(model, rows, shortcuts=NONE)  # what the model consists of is known from here on
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score(model, rows, shortcuts=shortcuts)
    hook.remove()
    return sum(seen)


def test_shortcuts_read_fewer_tokens(monkeypatch):
    monkeypatch.setattr(forward, "_TOKENS_OF_A_PASS", {"cpu": 0})
    monkeypatch.setattr(forward, "_TOKENS_AT_ONCE", {"cpu": 8192})
    rows, model = group_rows(), tiny_model()
    of_prompts, of_responses = 3 * (3 + 1 + 6 + 2), 3 + 7 + 1 + 0 + 2 + 6 + 4 + 4 + 5 + 2 + 9 + 1
    assert tokens_read(model, rows, NONE) == 12 * (2 + 9)  # the longest row
    assert tokens_read(model, rows, Shortcuts(share_prompts=False)) == of_prompts + of_responses
    assert tokens_read(model, rows, Shortcuts()) == (3 + 1 + 6 + 2) + of_responses


def test_rows_are_split_where_it_saves_more_than_a_pass():
    assert [b.tolist() for b in by_length(torch.tensor([5, 900, 4, 1000]), (100, 10_000))] == [[3, 1], [0, 2]]
    assert [b.tolist() for b in by_length(torch.tensor([5, 900, 4, 1000]), (99, 10_000))] == [[3], [1], [0, 2]]
    assert [b.tolist() for b in by_length(torch.tensor([5, 900, 4, 1000]), (9000, 10_000))] == [[3, 1, 0, 2]]
    assert [b.tolist() for b in by_length(torch.tensor([5, 900, 4, 1000]), None)] == [[3, 1, 0, 2]]
    assert [b.tolist() for b in by_length(torch.tensor([7]), (0, 1))] == [[0]]
    assert [b.tolist() for b in by_length(torch.tensor([5, 900, 4, 1000]), (9000, 2000))] == [[3, 1], [0, 2]]
    ragged = torch.randint(1, 300, (500,), generator=torch.Generator().manual_seed(0))
    batches = by_length(ragged, (50, 10_000))
    assert torch.cat(batches).sort().values.tolist() == list(range(500))
    padded = sum(len(b) * int(ragged[b].max()) for b in batches)
    assert padded + 50 * len(batches) < 1.1 * int(ragged.sum())


def capped():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    config = Gemma2Config(vocab_size=VOCABULARY, **sizes, **heads, final_logit_softcapping=2.0, sliding_window=4)
    return Gemma2ForCausalLM(config)


def sliding():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, **sizes, num_key_value_heads=2, sliding_window=4))


def alibi():
    return BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))


def alibi_by_column():
    return MptForCausalLM(MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64))


def local_by_column():
    kinds = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 5}
    config = GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_heads=4, max_position_embeddings=64, **kinds)
    return GPTNeoForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "plain_head", "cache"),
    [
        (capped, False, False),
        (sliding, True, False),
        (alibi, True, True),
        (alibi_by_column, True, True),
        (local_by_column, True, True),
    ],
)
def test_models_that_not_every_shortcut_is_valid_for(build, plain_head, cache):
    torch.manual_seed(0)
    model = build().double()
    assert (output_layer(model) is not None) == plain_head
    assert continues_from_cache(model.base_model) == cache
    (plain, plain_gradient), (found, gradient) = everything(model, NONE), everything(model, Shortcuts())
    torch.testing.assert_close(plain.logprobs, alone(model, group_rows(), 0.8), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.logprobs, plain.logprobs, atol=1e-7, rtol=0)
    assert_same_gradient(gradient, plain_gradient)


def test_with_activation_checkpointing_prompts_are_not_shared():
    model = tiny_model().double().train()
    expected = everything(model, NONE)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not continues_from_cache(model.base_model)
    found = everything(model, Shortcuts())[1]
    assert_same_gradient(found, expected)


@pytest.mark.slow
def test_compiled_passes_give_the_same(monkeypatch):
    monkeypatch.setattr(forward, "_TOKENS_AT_ONCE", {"cpu": 8192})
    model = tiny_model()
    (plain, plain_gradient), (found, gradient) = (
        everything(model, NONE),
        everything(model, replace(NONE, torch_compile=True)),
    )
    assert forward._compiled.cache_info().currsize
    torch.testing.assert_close(found.logprobs, plain.logprobs, atol=1e-5, rtol=0)
    for name, expected in plain_gradient.items():
        assert (gradient[name] - expected).norm() <= 1e-5 * expected.norm(), name


class Tripled(LlamaForCausalLM):
    """Changes its logits in place."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits.mul_(3.0)
        return out


def test_logits_that_are_changed_in_place_or_by_a_later_hook_are_those_scored():
    rows, model = group_rows(), Tripled(tiny_model().config).double()
    assert output_layer(model) is None
    torch.testing.assert_close(score(model, rows).logprobs, alone(model, rows, 1.0), atol=1e-10, rtol=0)
    model = tiny_model().double()
    score(model, rows)
    assert output_layer(model) is not None
    model.register_forward_hook(lambda _, inputs, out: type(out)(logits=out.logits * 3))
    torch.testing.assert_close(score(model, rows).logprobs, alone(model, rows, 1.0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_prompts_of_no_width(kind):
    model, rows = tiny_model(kind).double(), group_rows()
    nothing = score(model, rows[:0], entropy=True)
    assert nothing.logprobs.shape == nothing.entropy.shape == (0, 9)
    bare = replace(rows, prompt_ids=rows.prompt_ids[:, :0], prompt_mask=rows.prompt_mask[:, :0])
    zero = replace(rows, prompt_ids=rows.prompt_ids[:, :1] * 0, prompt_mask=torch.ones(12, 1, dtype=torch.bool))
    torch.testing.assert_close(score(model, bare).logprobs, alone(model, zero, 1.0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("precision", [torch.bfloat16])
@pytest.mark.parametrize("shortcuts", EACH, ids=str)
def test_under_autocast_the_scores_are_those_of_its_precision(shortcuts, precision):
    model, rows = tiny_model(), group_rows()
    exact = score(model, rows, shortcuts=NONE).logprobs
    with torch.autocast("cpu", dtype=precision):
        plain = score(model, rows, shortcuts=NONE).logprobs
        found = score(model, rows, shortcuts=shortcuts).logprobs
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    assert (found - exact).abs().mean() <= 1.5 * (plain - exact).abs().mean()


def test_a_head_of_a_policys_own_kind_keeps_its_logits():
    """An output layer that is scaled after the fact is no plain one, and its logits are those that are scored."""
    model = tiny_model().double()
    model.lm_head.register_forward_hook(lambda _, inputs, out: out * 0.5)
    assert output_layer(model) is None
    rows = group_rows()
    torch.testing.assert_close(score(model, rows).logprobs, alone(model, rows, 1.0), atol=1e-10, rtol=0)


@pytest.mark.parametrize("chunked", [True, False])
def test_the_wrapper_hands_its_shortcuts_on(monkeypatch, chunked):
    models, calls = PolicyReferenceValue(tiny_model(), reference=True), []
    fused = scoring.linear_logprobs
    monkeypatch.setattr(scoring, "linear_logprobs", lambda *args: calls.append(1) or fused(*args))
    models.shortcuts = Shortcuts(sort_by_length=False, chunk_vocabulary=chunked)
    models.score(group_rows())
    models.score_reference(group_rows())
    assert len(calls) == 2 * chunked
