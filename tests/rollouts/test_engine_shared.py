"""Prompts stored once for all their samples, and rows that join: the same rollout as with a cache per row."""

from dataclasses import fields

import pytest
import torch
import transformers

from lit_rlhf.rollouts.engines import TransformersEngine
from lit_rlhf.rollouts.engines import shared as shared_module
from lit_rlhf.types import Rollout, SamplingConfig

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20]]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 64, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARING = {
    "Llama": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Qwen3Moe": {**SIZES, **EXPERTS},
    "Mixtral": {**SIZES, "num_local_experts": 4, "sliding_window": None},
    "Mistral": {**SIZES, "sliding_window": None},
    "GPT2": GPT2,
    "Phi": SIZES,
    "Phi3": SIZES,
    "Gemma": SIZES,
    "Granite": SIZES,
    "SmolLM3": SIZES,
    "Olmo2": SIZES,
    "OPT": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTNeoX": SIZES,
    "Cohere": SIZES,
    "Glm": SIZES,
}
NOT_SHARING = {
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},  # ALiBi
    "Mpt": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "initializer_range": 0.3},
    "Falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    "GPTNeo": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 6,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    },
    "GPTJ": {**GPT2, "rotary_dim": 8},
    "Gemma2": {**SIZES, "sliding_window": 6, "attn_logit_softcapping": 2.0},  # capped scores, sliding layers
    "Gemma3": {**SIZES, "sliding_window": 6},
    "Mistral": {**SIZES, "sliding_window": 6},
    "GptOss": {**SIZES, "num_local_experts": 4, "sliding_window": 6},  # attention sinks
    "Lfm2": {**SIZES, "layer_types": ["conv", "full_attention"]},
}


def build(name, sizes, **extra):
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")
    return model(config_class(**sizes, **extra)).eval()


def generate(model, sampling, prompts=PROMPTS, seed=3, **how):
    """The rollout, and whether the model was found fit to share its prompts."""
    engine = TransformersEngine([1], 0, **how)
    engine.update_weights(model, 0)
    return engine.generate(prompts, sampling, seed), not engine._not_shared


def assert_same(a, b):
    for field in fields(Rollout):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, atol=5e-5, rtol=0, msg=lambda m, name=field.name: f"{name}: {m}")


def ending(model, strength):
    """Raise the probability of EOS, token 1, so that rows end at different lengths."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(64).index_fill(0, torch.tensor([1]), strength))
    return model


@pytest.mark.parametrize(
    ("name", "shares"), [(name, True) for name in SHARING] + [(name, False) for name in NOT_SHARING]
)
def test_every_architecture_samples_as_with_a_cache_per_row(name, shares):
    model, sampling = build(name, (SHARING if shares else NOT_SHARING)[name]), SamplingConfig(12, group_size=3)
    expected, _ = generate(model, sampling, share_prompts=False)
    usual = model.config._attn_implementation
    rollout, shared = generate(model, sampling)
    assert shared == shares
    assert_same(rollout, expected)
    assert model.config._attn_implementation == usual


def test_eager_attention_is_left_alone():
    """Only `sdpa` is one known function: a model's own eager attention may do more."""
    assert not generate(build("Llama", SIZES, attn_implementation="eager"), SamplingConfig(4))[1]


def test_attention_that_does_more_is_found_out_at_the_first_token(monkeypatch):
    """Whatever passes the look at the configuration: scores that are capped, keys changed after the cache, no call."""
    model, sampling = build("Llama", SIZES), SamplingConfig(8, group_size=2)
    expected, _ = generate(model, sampling, share_prompts=False)
    original = transformers.models.llama.modeling_llama.LlamaAttention.forward
    for change in ({"softcap": 30.0}, {"attention_mask": torch.zeros(1, 1, 1, 1)}):
        calls = []

        def forward(self, *args, change=change, calls=calls, **kwargs):
            if self.config._attn_implementation == shared_module.ATTENTION:
                calls.append(kwargs.update(change))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaAttention, "forward", forward)
        rollout, shared = generate(model, sampling)
        assert_same(rollout, expected)
        assert not shared
        assert len(calls) == 1


def test_attention_that_is_not_called_is_found_out(monkeypatch):
    """A layer that keeps to its own function would see the row's own tokens alone."""
    model, sampling = build("Llama", SIZES), SamplingConfig(8, group_size=2)
    expected, _ = generate(model, sampling, share_prompts=False)
    own = transformers.LlamaConfig(**SIZES, attn_implementation="sdpa")
    model.model.layers[1].self_attn.config = own
    rollout, shared = generate(model, sampling)
    assert_same(rollout, expected)
    assert not shared


def test_a_failure_restores_the_attention_of_the_model(monkeypatch):
    model = build("Llama", SIZES)
    monkeypatch.setattr(shared_module.SharedLayer, "attend", lambda *args: [][0])
    with pytest.raises(IndexError):
        generate(model, SamplingConfig(8))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("counts", [[2, 2], [3, 1], [1, 1]])
def test_attention_equals_sdpa_over_repeated_prompts(heads, kv_heads, counts):
    torch.manual_seed(0)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    prompt = [torch.randn(2, kv_heads, 3, 4), torch.randn(2, kv_heads, 3, 5)]
    cache, prefilled = shared_module.SharedPrompts(1, 4), transformers.DynamicCache()
    prefilled.update(*prompt, 0)
    cache.admit(prefilled, mask, counts)
    rows = torch.arange(2).repeat_interleave(torch.tensor(counts))
    n, own = len(rows), [torch.empty(len(rows), kv_heads, 0, d) for d in (4, 5)]
    for _ in range(3):
        new = torch.randn(n, kv_heads, 1, 4), torch.randn(n, kv_heads, 1, 5)
        own = [torch.cat(pair, 2) for pair in zip(own, new, strict=True)]
        query, views = torch.randn(n, heads, 1, 4), cache.update(*new, 0)
        got, _ = shared_module.attend(None, query, *views, None, scaling=0.3)
        keys, values = (torch.cat([p[rows], o], 2) for p, o in zip(prompt, own, strict=True))
        seen = torch.cat([mask[rows], torch.ones(n, keys.shape[2] - 3, dtype=torch.bool)], 1)[:, None, None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-6, rtol=0)
        cache.length += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_is_held_once(dtype):
    model, held = build("Llama", SIZES).to(dtype), []
    original = shared_module.SharedPrompts.admit

    def admit(self, *args):
        original(self, *args)
        held.append([[tuple(x.shape) for x in (layer.prompt[0], layer.own[0])] for layer in self.layers])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_module.SharedPrompts, "admit", admit)
        generate(model, SamplingConfig(7, group_size=6))
    assert held == [[[(5, 2, 6, 8), (30, 2, 7, 8)]] * 2]


@pytest.mark.parametrize("share_prompts", [True, False])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_max_rows_changes_nothing_but_the_rows_at_a_time(name, group_size, share_prompts):
    model, prompts = ending(build(name, SHARING[name]), 2.5), PROMPTS + PROMPTS[::-1]
    expected, _ = generate(model, SamplingConfig(24, group_size=group_size), prompts)
    assert expected.lengths.unique().numel() > 4
    for max_rows in (1, 3, 4, 7, 10, 1000):
        sizes = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        sampling = SamplingConfig(24, group_size=group_size, max_rows=max_rows)
        rollout, _ = generate(model, sampling, prompts, share_prompts=share_prompts)
        handle.remove()
        assert_same(rollout, expected)
        assert max(sizes) <= max_rows


def test_freed_rows_are_refilled(monkeypatch):
    """Fewer passes than chunk after chunk; the rows at hand are busy, and prompts are held no longer than rows."""
    model, prompts = ending(build("Llama", SIZES), 2.5), PROMPTS * 8
    sampling, held = SamplingConfig(40, max_rows=8), []
    original = shared_module.SharedPrompts.admit
    monkeypatch.setattr(
        shared_module.SharedPrompts, "admit", lambda self, *args: held.append((original(self, *args), self.prompts)[1])
    )

    def decoded(**how):
        sizes = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        generate(model, sampling, prompts, **how)
        handle.remove()
        return [rows for rows, columns in sizes if columns == 1]

    refilled, chunks = decoded(), decoded(share_prompts=False)
    assert len(refilled) < 0.7 * len(chunks)
    assert min(refilled[: len(refilled) // 2]) == 8
    assert max(held) <= 16


@pytest.mark.parametrize("share_prompts", [True, False])
def test_max_rows_keeps_seldom_checks(monkeypatch, share_prompts):
    from lit_rlhf.rollouts.engines import transformers as engine_module

    model, sampling = ending(build("GPT2", GPT2), 2.5), SamplingConfig(24, group_size=2, max_rows=6)
    expected, _ = generate(model, SamplingConfig(24, group_size=2))
    limit = max(map(len, PROMPTS)) + 24  # a step too many would be one position too many
    model.config.n_positions = limit
    model.transformer.wpe.weight = torch.nn.Parameter(model.transformer.wpe.weight[:limit].detach())
    for every in (5, 8, 1000):
        monkeypatch.setitem(engine_module._STEPS_BETWEEN_CHECKS, "cpu", every)
        assert_same(generate(model, sampling, share_prompts=share_prompts)[0], expected)
