"""Both engines with vLLM itself: what it samples, its log-probs, and the weights it samples from.

python -m pytest tests/rollouts/test_vllm_real.py -m vllm       where vllm is installed, see docs/vllm.md
"""

import importlib.util
import os
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rlhf.models.adapters import LoRA, add_lora
from lit_rlhf.rollouts.engines import TransformersEngine, VLLMEngine, VLLMServerEngine
from lit_rlhf.rollouts.random import mix_seed
from lit_rlhf.types import SamplingConfig
from tests.adapted import by_hand, learn
from tests.helpers import EOS, PAD, VOCABULARY, plain_logprobs

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the package vllm is not installed"),
]
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20]]
STOPS = list(range(3, 9))
GREEDY = SamplingConfig(max_new_tokens=16, temperature=0.0, group_size=2)
SAMPLED = SamplingConfig(max_new_tokens=16, temperature=0.8, group_size=4)
NEAR = {"atol": 1e-3, "rtol": 0}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def llama(seed=0, **extra):
    """Head size 64, which vLLM has kernels for on every device; logits far from flat."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "initializer_range": 0.15}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ends, **extra)).eval()


@pytest.fixture(scope="module", params=["in process", "server"])
def make(request):
    """Makes engines of one kind; all are closed in the end."""
    made = []

    def engine(**settings):
        kind = VLLMEngine if request.param == "in process" else VLLMServerEngine
        made.append(kind([EOS], PAD, STOPS, **{"options": {"enforce_eager": True}, **settings}))
        return made[-1]

    yield engine
    for one in made:
        one.close()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request, make):
    """An engine and the model that it has weights of; tests may change both."""
    return make(), llama(tie_word_embeddings=request.param)


def transformers(model, version=0):
    engine = TransformersEngine([EOS], PAD, STOPS)
    engine.update_weights(model, version)
    return engine


def assert_greedy_is_transformers(engine, model):
    found, expected = (e.generate(PROMPTS, GREEDY, 0) for e in (engine, transformers(model, engine.version)))
    for name, x in vars(expected).items():
        if name == "behavior_logprobs":
            torch.testing.assert_close(found.behavior_logprobs, x, **NEAR)
        else:
            assert torch.equal(getattr(found, name), x), name
    return found


def test_greedy_completions_are_transformers_own_and_follow_the_weights(pair):
    engine, model = pair
    seen = []
    for seed in (0, 1, 2):
        model.load_state_dict(llama(seed, tie_word_embeddings=model.config.tie_word_embeddings).state_dict())
        engine.update_weights(model, seed)
        found = assert_greedy_is_transformers(engine, model)
        seen.append(found.response_ids[:, :2].tolist())
    assert seen[0] != seen[1] != seen[2]


def test_the_head_alone_can_change(pair):
    """A tied one is the embedding, and vLLM keeps what it had unless it is sent both."""
    engine, model = pair
    engine.update_weights(model, 0)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
    engine.update_weights(model, 0)
    assert_greedy_is_transformers(engine, model)


def test_samples_are_a_function_of_the_seed_and_their_log_probs_the_policys(pair):
    engine, model = pair
    engine.update_weights(model, 0)
    found, again, other = (engine.generate(PROMPTS, SAMPLED, seed) for seed in (3, 3, 4))
    for name, x in vars(found).items():
        assert torch.equal(getattr(again, name), x), name
    assert not torch.equal(found.response_ids[:, :1], other.response_ids[:, :1])
    scored = plain_logprobs(model, found, temperature=0.8)
    torch.testing.assert_close(found.behavior_logprobs.double(), scored, **NEAR)
    last = found.response_ids.gather(1, found.lengths.unsqueeze(1) - 1).squeeze(1)
    ended = torch.isin(last, torch.tensor([EOS, *STOPS]))
    assert torch.equal(found.truncated, ~ended)
    assert 0 < ended.sum() < len(ended)
    assert (found.lengths[found.truncated] == 16).all()
    alone = engine.generate(PROMPTS[2:3], SAMPLED, [mix_seed(3, 2)])
    assert (
        alone.response_ids[0][alone.response_mask[0]].tolist() == found.response_ids[8][found.response_mask[8]].tolist()
    )


def test_a_distribution_that_is_cut_off_has_its_own_log_probs(pair):
    engine, model = pair
    engine.update_weights(model, 0)
    how = SamplingConfig(max_new_tokens=1, temperature=0.8, top_p=0.9, top_k=12, group_size=64)
    found = engine.generate(PROMPTS[:1], how, 0)
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.8
    best, ids = logits.topk(12)
    probs = best.softmax(0)
    kept = probs.cumsum(0) - probs < 0.9
    expected = dict(zip(ids[kept].tolist(), (probs[kept] / probs[kept].sum()).log().tolist(), strict=True))
    for token, logprob in zip(found.response_ids[:, 0].tolist(), found.behavior_logprobs[:, 0].tolist(), strict=True):
        assert logprob == pytest.approx(expected[token], abs=1e-3)


def test_what_is_drawn_is_distributed_as_the_policy_says(pair):
    engine, model = pair
    engine.update_weights(model, 0)
    found = engine.generate(PROMPTS[:1], SamplingConfig(max_new_tokens=1, temperature=0.8, group_size=4000), 1)
    with torch.no_grad():
        probs = (model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.8).softmax(0).double()
    counts = torch.bincount(found.response_ids[:, 0], minlength=VOCABULARY).double()
    likely = probs > 5 / 4000
    chi2 = float(((counts - 4000 * probs).square() / (4000 * probs))[likely].sum())
    assert chi2 < 2 * int(likely.sum()) + 20  # some eight deviations


def test_adapters_are_merged(make):
    engine, model = make(), llama()
    add_lora(model, LoRA(r=3, alpha=5))
    learn(model)
    engine.update_weights(model, 0)
    assert_greedy_is_transformers(engine, by_hand(model, llama(), 5 / 3))


def test_in_bfloat16_the_log_probs_are_near(make):
    engine, model = make(dtype="bfloat16"), llama()
    engine.update_weights(model, 0)
    found = engine.generate(PROMPTS, SAMPLED, 3)
    gap = (found.behavior_logprobs.double() - plain_logprobs(model, found, temperature=0.8)).abs()
    assert 1e-4 < float(gap[found.response_mask].mean()) < 0.2


def test_a_server_that_is_killed_comes_back_with_the_weights_of_now(pair):
    engine, model = pair
    if isinstance(engine, VLLMEngine):
        pytest.skip("there is no server")
    model.load_state_dict(llama(5, tie_word_embeddings=model.config.tie_word_embeddings).state_dict())
    engine.update_weights(model, 9)
    before = engine.generate(PROMPTS, SAMPLED, 3)
    (process,) = engine._held.processes
    os.killpg(process.pid, signal.SIGKILL)
    after = engine.generate(PROMPTS, SAMPLED, 3)
    assert process.starts == 2
    for name, x in vars(before).items():
        assert torch.equal(getattr(after, name), x), name
    engine.update_weights(model, 10)
    assert_greedy_is_transformers(engine, model)
