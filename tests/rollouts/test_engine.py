import itertools
import math
from dataclasses import fields

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.engines import RolloutEngine, TransformersEngine, cache
from lit_rlhf.rollouts.engines import draw as draw_module
from lit_rlhf.rollouts.engines import transformers as engine_module
from lit_rlhf.rollouts.random import mix_seed
from lit_rlhf.types import Rollout, SamplingConfig, pad_left

V, EOS, PAD = 64, 1, 0
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20], [21], [22, 23, 24], [60, 61, 62, 63]]
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def build(kind="llama", vocab_size=V, eos_bias=0.0, **extra):
    """A tiny random model in eval mode; `eos_bias` raises the EOS logit."""
    torch.manual_seed(0)
    if kind == "gpt2":
        ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            **ends,
            **extra,
        )
        model = GPT2LMHeadModel(config)
    else:
        config_class, model_class = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
            "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
            "lfm2": (Lfm2Config, Lfm2ForCausalLM),
        }[kind]
        model = model_class(config_class(vocab_size=vocab_size, **{**LLAMA_LIKE, **extra}))
    bias = torch.zeros(vocab_size)
    bias[EOS] = eos_bias
    model.lm_head.bias = nn.Parameter(bias)
    return model.eval()


def engine_for(model, eos=(EOS,), pad=PAD, **kwargs):
    engine = TransformersEngine(eos, pad, **kwargs)
    engine.update_weights(model, version=7)
    return engine


def record_forwards(model):
    """The shapes `(rows, columns)` of every call to the model's forward, and of its logits."""
    shapes = []

    def hook(module, args, kwargs, output):
        shapes.append((tuple(kwargs["input_ids"].shape), tuple(output.logits.shape)))

    model.register_forward_hook(hook, with_kwargs=True)
    return shapes


def hf_greedy(model, prompts, steps, eos=EOS, pad=PAD):
    ids, mask = pad_left(prompts, pad)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=mask.long(),
            do_sample=False,
            max_new_tokens=steps,
            eos_token_id=eos,
            pad_token_id=pad,
            use_cache=True,
        )
    return out[:, ids.shape[1] :]


@torch.no_grad()
def logprobs_alone(model, prompt, response, temperature=1.0):
    """Log-probs of a response: a plain forward of the row on its own, without padding or cache."""
    z = model(torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.stack([row[token] - row.logsumexp(0) for row, token in zip(z, response, strict=True)])


def assert_same(a: Rollout, b: Rollout):
    for field in fields(Rollout):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0, msg=lambda m, name=field.name: f"{name}: {m}")


def responses(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


# --- agreement with Transformers and with a plain forward


@pytest.mark.parametrize("how", [{}, {"share_prompts": False}, {"share_prompts": False, "preallocate": False}])
@pytest.mark.parametrize(("kind", "eos_bias"), [("llama", 2.0), ("qwen2", 1.0), ("gpt2", 1.0)])
def test_greedy_equals_generate(kind, eos_bias, how):
    model = build(kind, eos_bias=eos_bias)
    expected = hf_greedy(model, PROMPTS, steps=16)
    rollout = engine_for(model, **how).generate(PROMPTS, SamplingConfig(16, temperature=0), seed=0)
    assert torch.equal(rollout.response_ids, expected)
    assert rollout.lengths.min() < 16, "no row ends early: the test says nothing about EOS"
    assert rollout.lengths.max() == 16
    assert torch.equal(rollout.truncated, ~(expected == EOS).any(1))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
        ("gemma3", {"sliding_window": 6, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_models_without_plain_attention_equal_generate(kind, extra):
    model = build(kind, **extra)
    rollout = engine_for(model).generate(PROMPTS, SamplingConfig(16, temperature=0, group_size=2), seed=0)
    assert torch.equal(rollout.response_ids, hf_greedy(model, PROMPTS, steps=16).repeat_interleave(2, 0))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_behavior_logprobs_equal_a_plain_forward_of_each_row(kind, temperature):
    model = build(kind, eos_bias=1.0)
    sampling = SamplingConfig(24, temperature=temperature, group_size=3)
    rollout = engine_for(model).generate(PROMPTS, sampling, seed=1)
    assert rollout.behavior_logprobs.dtype == torch.float32
    assert (rollout.behavior_logprobs[~rollout.response_mask] == 0).all()
    for i, response in enumerate(responses(rollout)):
        expected = logprobs_alone(model, PROMPTS[i // 3], response, temperature or 1.0)
        got = rollout.behavior_logprobs[i][rollout.response_mask[i]]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_half_precision_models_give_float32_logprobs():
    model = build("llama").to(torch.bfloat16)
    rollout = engine_for(model).generate(PROMPTS, SamplingConfig(8, group_size=2), seed=0)
    assert rollout.behavior_logprobs.dtype == torch.float32
    assert ((rollout.behavior_logprobs < 0) == rollout.response_mask).all()


# --- the distribution


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pairs_of_tokens_follow_the_model(temperature):
    """All 64 two-token continuations of a vocabulary of 8, against their exact probabilities."""
    model, n = build("llama", vocab_size=8), 40_000
    pairs = list(itertools.product(range(8), repeat=2))
    exact = torch.stack([logprobs_alone(model, [3, 4], list(p), temperature).sum().exp() for p in pairs]).double()
    sampling = SamplingConfig(2, temperature=temperature, group_size=n)
    rollout = engine_for(model, eos=()).generate([[3, 4]], sampling, seed=0)
    counts = torch.bincount(rollout.response_ids[:, 0] * 8 + rollout.response_ids[:, 1], minlength=64)
    kept = exact * n >= 5
    expected = torch.cat([exact[kept], exact[~kept].sum().view(1)]) * n
    observed = torch.cat([counts[kept], counts[~kept].sum().view(1)])
    dof = int(kept.sum())
    assert dof >= 20
    assert ((observed - expected) ** 2 / expected.clamp(min=1)).sum() < dof + 4 * math.sqrt(2 * dof)


def permitted(probs, top_k, top_p):
    """The tokens that top-k, then top-p leave, by a loop over the ranking."""
    ranking = sorted(range(len(probs)), key=lambda v: -probs[v])
    if top_k:
        ranking = ranking[:top_k]
    total, kept, mass = sum(probs[v] for v in ranking), [], 0.0
    for v in ranking:
        if mass >= top_p:
            break
        kept.append(v)
        mass += probs[v] / total
    return kept


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (12, 0.8), (1, 1.0), (0, 1e-6), (500, 1.0)])
def test_top_k_and_top_p(top_k, top_p):
    model, n, temperature = build("llama"), 4000, 2.0
    with torch.no_grad():
        probs = (model(torch.tensor([[5, 6]])).logits[0, -1].double() / temperature).softmax(0).tolist()
    kept = permitted(probs, top_k, top_p)
    sampling = SamplingConfig(1, temperature=temperature, top_k=top_k, top_p=top_p, group_size=n)
    rollout = engine_for(model, eos=()).generate([[5, 6]], sampling, seed=3)
    token = rollout.response_ids[:, 0]
    assert set(token.tolist()) <= set(kept)
    total = sum(probs[v] for v in kept)
    assert {v for v in kept if probs[v] / total * n > 20} <= set(token.tolist())
    expected = torch.tensor([math.log(probs[v] / total) for v in token.tolist()])
    torch.testing.assert_close(rollout.behavior_logprobs[:, 0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 2), (0.4999, 2), (0.5001, 4), (1 - 2**-52, 4)])
def test_a_token_of_probability_zero_is_never_drawn(uniform, expected):
    never = float("-inf")
    logits = torch.tensor([[never, never, 0.0, never, 0.0, never]]).repeat(3, 1)
    token, logprob = draw_module.draw(logits, torch.full((3,), uniform, dtype=torch.float64), SamplingConfig())
    assert token.tolist() == [expected] * 3
    torch.testing.assert_close(logprob, torch.full((3,), -math.log(2)))


def test_the_boundary_between_two_tokens_belongs_to_the_second():
    logits = torch.zeros(1, 4)
    tokens = [int(draw_module.draw(logits, torch.tensor([k / 4]).double(), SamplingConfig())[0]) for k in range(4)]
    assert tokens == [0, 1, 2, 3]


def test_single_precision_uniforms_stay_below_one():
    largest = torch.tensor([1 - 2**-52], dtype=torch.float64)
    assert draw_module.for_sampling(largest, torch.device("cpu")).item() < 1
    assert draw_module.for_sampling(largest, torch.device("cpu")).dtype == torch.float64


def test_logits_that_are_not_finite_show_in_the_logprobs():
    model = build("llama")
    model.lm_head.bias.data[3] = float("nan")
    rollout = engine_for(model).generate([[5]], SamplingConfig(3), seed=0)
    assert rollout.behavior_logprobs.isnan().all()


# --- randomness belongs to the prompt


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_samples_of_a_prompt_do_not_depend_on_the_batch(kind):
    engine, sampling = engine_for(build(kind, eos_bias=2.0)), SamplingConfig(20, group_size=3)
    seeds = [100 + i for i in range(len(PROMPTS))]
    together = responses(engine.generate(PROMPTS, sampling, seeds))
    for i, prompt in enumerate(PROMPTS):
        assert responses(engine.generate([prompt], sampling, [seeds[i]])) == together[3 * i : 3 * i + 3]
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    shuffled = responses(engine.generate([PROMPTS[i] for i in order], sampling, [seeds[i] for i in order]))
    assert shuffled == [together[3 * i + g] for i in order for g in range(3)]
    larger = responses(engine.generate(PROMPTS, SamplingConfig(20, group_size=5), seeds))
    assert [larger[5 * i + g] for i in range(len(PROMPTS)) for g in range(3)] == together


def test_an_integer_seed_is_mixed_with_the_position():
    engine, sampling = engine_for(build()), SamplingConfig(12, group_size=2)
    rollout = engine.generate(PROMPTS, sampling, 5)
    assert_same(rollout, engine.generate(PROMPTS, sampling, [mix_seed(5, i) for i in range(len(PROMPTS))]))
    assert responses(rollout) != responses(engine.generate(PROMPTS, sampling, 6))
    same_prompt = responses(engine.generate([[5, 6]] * 8, sampling, 5))
    assert len({tuple(response) for response in same_prompt}) == 16


def test_more_new_tokens_keep_the_earlier_ones():
    engine = engine_for(build(eos_bias=2.0))
    short = engine.generate(PROMPTS, SamplingConfig(6, group_size=2), 0)
    long = engine.generate(PROMPTS, SamplingConfig(30, group_size=2), 0)
    assert responses(short) == [response[:6] for response in responses(long)]


def test_the_global_generator_is_neither_read_nor_moved():
    engine, sampling = engine_for(build()), SamplingConfig(5)
    state = torch.get_rng_state()
    first = engine.generate(PROMPTS, sampling, 0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(first, engine.generate(PROMPTS, sampling, 0))


# --- where a response ends


def test_fields_and_layout():
    model = build(eos_bias=3.0)
    rollout = engine_for(model).generate(PROMPTS, SamplingConfig(20, group_size=3), seed=0)
    ids, mask = pad_left(PROMPTS, PAD)
    assert torch.equal(rollout.prompt_ids, ids.repeat_interleave(3, 0))
    assert torch.equal(rollout.prompt_mask, mask.repeat_interleave(3, 0))
    assert rollout.group_ids.tolist() == [i for i in range(8) for _ in range(3)]
    assert rollout.version.tolist() == [7] * 24
    assert (rollout.response_ids[~rollout.response_mask] == PAD).all()
    assert not any(getattr(rollout, f.name).is_inference() for f in fields(Rollout)[:8])
    ended = 0
    for response, truncated in zip(responses(rollout), rollout.truncated.tolist(), strict=True):
        assert EOS not in response[:-1]
        assert (response[-1] != EOS) == truncated
        assert len(response) == 20 or not truncated
        ended += not truncated
    assert 0 < ended < 24


def test_a_row_that_ends_at_the_last_token_is_not_truncated():
    engine = engine_for(build(eos_bias=3.0))
    for response in responses(engine.generate(PROMPTS, SamplingConfig(20), 0)):
        if 1 < len(response) < 20:
            break
    index = responses(engine.generate(PROMPTS, SamplingConfig(20), 0)).index(response)
    exact = engine.generate(PROMPTS, SamplingConfig(len(response)), 0)
    assert not exact.truncated[index]
    assert exact.response_mask[index].all()
    shorter = engine.generate(PROMPTS, SamplingConfig(len(response) - 1), 0)
    assert shorter.truncated[index]


def test_pad_may_be_eos():
    """The mask comes from generation: the first EOS is in, whatever the padding is."""
    model, sampling = build(eos_bias=3.0), SamplingConfig(20, group_size=3)
    separate = engine_for(model).generate(PROMPTS, sampling, 0)
    same = engine_for(model, pad=EOS).generate(PROMPTS, sampling, 0)
    assert torch.equal(separate.response_mask, same.response_mask)
    assert responses(separate) == responses(same)
    assert any(response[-1] == EOS for response in responses(same))
    assert torch.equal(separate.truncated, same.truncated)


def test_a_pad_token_that_is_sampled_counts():
    model = build()
    model.lm_head.bias.data[PAD] = 6.0
    rollout = engine_for(model).generate(PROMPTS, SamplingConfig(10), 0)
    assert rollout.response_mask.all()
    assert (rollout.response_ids == PAD).any()


def test_several_eos_and_stop_tokens_end_a_response():
    model, ends = build(), {1, 9, 30, 41}
    rollout = engine_for(model, eos=(1, 9), stop_token_ids=(30, 41)).generate(PROMPTS, SamplingConfig(60), 0)
    endless = engine_for(model, eos=()).generate(PROMPTS, SamplingConfig(60), 0)
    last = set()
    for response, whole in zip(responses(rollout), responses(endless), strict=True):
        cut = next((i + 1 for i, token in enumerate(whole) if token in ends), 60)
        assert response == whole[:cut]
        last.add(response[-1])
    assert len(last & ends) >= 2
    assert endless.truncated.all()


def test_the_response_is_as_wide_as_the_longest():
    rollout = engine_for(build(eos_bias=8.0)).generate(PROMPTS, SamplingConfig(100), 0)
    assert rollout.response_ids.shape[1] == rollout.lengths.max() < 100
    assert not rollout.truncated.any()


# --- how the work is done


def test_each_prompt_is_prefilled_once_for_its_last_position():
    model = build()
    shapes = record_forwards(model)
    engine_for(model).generate(PROMPTS, SamplingConfig(4, group_size=5), 0)
    assert shapes == [((8, 6), (8, 1, V))] + [((40, 1), (40, 1, V))] * 3


def test_finished_rows_leave_the_batch_and_change_nothing(monkeypatch):
    model, sampling = build(eos_bias=3.0), SamplingConfig(40, group_size=3)
    engine = engine_for(model)
    shapes = record_forwards(model)
    dropped = engine.generate(PROMPTS, sampling, 0)
    rows = [ids[0] for ids, _ in shapes[1:]]
    alive = [int((dropped.lengths > step).sum()) for step in range(1, len(rows) + 1)]
    assert rows[0] > rows[len(rows) // 2] > rows[-1]
    assert all(0.75 * n <= a <= n for n, a in zip(rows, alive, strict=True))
    monkeypatch.setattr(engine_module, "_KEEP_FRACTION", 0.0)
    assert_same(dropped, engine.generate(PROMPTS, sampling, 0))
    assert shapes[-1][0][0] == 24


@pytest.mark.parametrize("every", [5, 8, 1000])
def test_seldom_checks_change_nothing(monkeypatch, every):
    model, sampling = build(eos_bias=4.0), SamplingConfig(60, group_size=3)
    engine, shapes = engine_for(model), record_forwards(model)
    expected = engine.generate(PROMPTS, sampling, 0)
    longest = expected.response_ids.shape[1]
    assert len(shapes) == longest < 60
    shapes.clear()
    monkeypatch.setitem(engine_module._STEPS_BETWEEN_CHECKS, "cpu", every)
    assert_same(expected, engine.generate(PROMPTS, sampling, 0))
    assert len(shapes) == min(60, math.ceil(longest / every) * every)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_preallocated_cache_changes_nothing(monkeypatch, kind):
    model, sampling = build(kind, eos_bias=2.0), SamplingConfig(30, group_size=3)
    growing = engine_for(model, share_prompts=False, preallocate=False).generate(PROMPTS, sampling, 0)
    used = []
    original = cache.PreallocatedLayer.update
    monkeypatch.setattr(
        cache.PreallocatedLayer, "update", lambda self, *args, **kw: used.append(1) or original(self, *args, **kw)
    )
    assert_same(growing, engine_for(model, share_prompts=False).generate(PROMPTS, sampling, 0))
    assert used


def test_only_plain_layers_are_preallocated():
    layer_types = ["sliding_attention", "full_attention"]
    mixed = build("gemma3", sliding_window=6, head_dim=8, layer_types=layer_types).config
    kinds = [type(layer).__name__ for layer in cache.new_cache(mixed, capacity=8).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "PreallocatedLayer"]
    plain = cache.new_cache(build("llama").config, capacity=8)
    assert [type(layer).__name__ for layer in plain.layers] == ["PreallocatedLayer"] * 2


def test_the_cache_keeps_the_contract_of_a_dynamic_layer():
    ours, theirs = cache.PreallocatedLayer(capacity=11), cache.DynamicLayer()
    assert ours.get_seq_length() == 0
    ours.batch_repeat_interleave(2)

    def same():
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)

    def update(rows, new):
        keys, values = torch.randn(rows, 2, new, 4), torch.randn(rows, 2, new, 3)
        for a, b in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(a, b)
        same()

    for call in (
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([0, 2, 3])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    ):
        update(2 if theirs.get_seq_length() == 0 else len(theirs.keys), 3)
        call(ours)
        call(theirs)
        same()
    update(3, 1)
    ours.reset()
    assert ours.get_seq_length() == 0
    ours.update(torch.ones(1, 2, 10, 4), torch.ones(1, 2, 10, 3))
    assert ours.get_seq_length() == 10


def test_modes_are_restored_and_dropout_is_off():
    model = build("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = engine_for(model).generate(PROMPTS, SamplingConfig(8), 0)
    model.train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    assert_same(expected, engine_for(model).generate(PROMPTS, SamplingConfig(8), 0))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(IndexError):
        _broken(model)
    assert [module.training for module in model.modules()] == before


def _broken(model):
    handle = model.register_forward_pre_hook(lambda *_: [][0])
    try:
        engine_for(model).generate([[5]], SamplingConfig(2), 0)
    finally:
        handle.remove()


def test_gradient_checkpointing_does_not_disturb_generation():
    model = build()
    expected = engine_for(model).generate(PROMPTS, SamplingConfig(12, group_size=2), 0)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    assert_same(expected, engine_for(model).generate(PROMPTS, SamplingConfig(12, group_size=2), 0))
    assert model.training


def test_weights_are_referred_to_and_the_version_follows():
    model, engine = build(), TransformersEngine((EOS,), PAD)
    engine.update_weights(model, 1)
    before = engine.generate(PROMPTS, SamplingConfig(8), 0)
    model.lm_head.weight.data.neg_()
    engine.update_weights(model, 2)
    after = engine.generate(PROMPTS, SamplingConfig(8), 0)
    assert isinstance(engine, RolloutEngine)
    assert set(before.version.tolist()) == {1}
    assert set(after.version.tolist()) == {2}
    assert responses(before) != responses(after)


# --- errors


@pytest.mark.parametrize(
    ("prompts", "sampling", "seed", "sentence"),
    [
        ([], SamplingConfig(4), 0, "there are no prompts to sample for: give at least one"),
        ([[5], []], SamplingConfig(4), 0, "prompt 1 is empty: every prompt needs at least one token"),
        (
            [[5], [5] * 100],
            SamplingConfig(29),
            0,
            "a prompt of 100 tokens with max_new_tokens=29 exceeds .* limit of 128",
        ),
        ([[5, 6], [64]], SamplingConfig(4), 0, "token id 64 in prompt 1 is outside the model's vocabulary of 64"),
        ([[5, -1], [7]], SamplingConfig(4), 0, "token id -1 in prompt 0 is outside the model's vocabulary of 64"),
        ([[5], [6]], SamplingConfig(4), [1, 2, 3], "got 3 seeds for 2 prompts: give one per prompt, or one integer"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bad_input_gets_one_sentence(kind, prompts, sampling, seed, sentence):
    with pytest.raises(InputError, match=f"^{sentence}"):
        engine_for(build(kind)).generate(prompts, sampling, seed)


def test_the_whole_context_can_be_used():
    rollout = engine_for(build("gpt2"), eos=()).generate([[5] * 100], SamplingConfig(28), 0)
    assert rollout.response_mask.sum() == 28


def test_a_pad_token_outside_the_vocabulary_is_named():
    with pytest.raises(InputError, match=r"token id 64 in the padding \(pad_token_id\) is outside"):
        engine_for(build(), pad=64).generate(PROMPTS, SamplingConfig(4), 0)


def test_weights_come_first():
    with pytest.raises(InputError, match="no weights to sample from: call update_weights"):
        TransformersEngine((EOS,), PAD).generate([[5]], SamplingConfig(4), 0)


def test_a_model_without_a_key_value_cache_is_refused():
    model = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(InputError, match=r"^MambaForCausalLM takes no past_key_values"):
        engine_for(model).generate(PROMPTS, SamplingConfig(4), 0)


def test_a_compiled_model_samples_as_it_did_before():
    model = build("qwen2")
    before = engine_for(model).generate(PROMPTS, SamplingConfig(4), 0)
    assert_same(engine_for(torch.compile(model, backend="eager")).generate(PROMPTS, SamplingConfig(4), 0), before)
