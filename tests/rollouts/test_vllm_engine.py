"""vLLM in process, against an LLM that answers as vLLM's does and samples with Transformers."""

import importlib.machinery
import importlib.util
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.engines import (
    ClonableEngine,
    EngineError,
    EngineTimeoutError,
    RolloutEngine,
    TransformersEngine,
    VLLMEngine,
    has_exact_logprobs,
)
from lit_rlhf.rollouts.engines import vllm as engine_module
from lit_rlhf.types import SamplingConfig
from tests.adapted import adapted, by_hand
from tests.helpers import EOS, PAD, tiny_model

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
SEEDS = [11, 12, 13, 14]
STOPS = range(3, 12)
SAMPLING = SamplingConfig(max_new_tokens=8, temperature=0.9, top_p=0.9, top_k=30, group_size=3)
DEFAULTS = {"min_tokens": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class FakeLLM:
    """Keeps what it was asked; its weights are random until they are pushed."""

    made: ClassVar[list] = []

    def __init__(self, model, **arguments):
        self.arguments, self.calls = arguments, []
        config = AutoConfig.from_pretrained(model)
        assert config.architectures
        torch.manual_seed(99)  # as vLLM does
        self.model = AutoModelForCausalLM.from_config(config)
        self.used = self.broken = self.slow = False
        FakeLLM.made.append(self)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        tensors = dict(kwargs["weights_iterator"])
        if self.model.config.tie_word_embeddings:  # vLLM keeps the head that it has unless it gets one
            assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        self.model.load_state_dict(tensors)
        self.calls.append("reload_weights")

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")
        return not self.used

    def generate(self, prompts, params, use_tqdm):
        assert not use_tqdm
        if self.broken:
            raise RuntimeError("EngineCore encountered\nan issue")
        if self.slow:
            time.sleep(30)
        self.calls.append(len(prompts))
        return [self.answer(prompt["prompt_token_ids"], p) for prompt, p in zip(prompts, params, strict=True)]

    def answer(self, ids, params):
        assert {name: vars(params)[name] for name in DEFAULTS} == DEFAULTS
        assert (params.ignore_eos, params.logprobs, params.detokenize) == (True, 0, False)
        engine = TransformersEngine(params.stop_token_ids, PAD)
        engine.update_weights(self.model, 0)
        how = SamplingConfig(params.max_tokens, params.temperature, params.top_p, params.top_k, params.n)
        rollout = engine.generate([ids], how, [params.seed])
        outputs = []
        for x, mask, lp in zip(rollout.response_ids, rollout.response_mask, rollout.behavior_logprobs, strict=True):
            tokens = x[mask].tolist()
            steps = zip(tokens, lp[mask].tolist(), strict=True)
            steps = [{63: SimpleNamespace(logprob=-99.0), t: SimpleNamespace(logprob=p)} for t, p in steps]
            outputs.append(SimpleNamespace(token_ids=tuple(tokens), logprobs=steps))
        return SimpleNamespace(outputs=outputs)


@pytest.fixture(autouse=True)
def _fake_vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = importlib.machinery.ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = FakeLLM, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    for name in (*engine_module.ENVIRONMENT, "VLLM_LOGGING_LEVEL", "VLLM_ENABLE_V1_MULTIPROCESSING"):
        monkeypatch.setenv(name, "1")
    FakeLLM.made.clear()


def engine_of(model, version=7, **settings):
    engine = VLLMEngine([EOS], PAD, STOPS, **settings)
    engine.update_weights(model, version)
    return engine


def transformers(model, version=7):
    engine = TransformersEngine([EOS], PAD, STOPS)
    engine.update_weights(model, version)
    return engine


def assert_same(found, expected):
    for name, x in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), x, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("temperature", [0.9, 0.0])
@pytest.mark.parametrize("max_rows", [None, 7])
def test_what_it_samples_is_what_the_llm_does(temperature, max_rows):
    model = tiny_model()
    engine, how = engine_of(model), SamplingConfig(8, temperature, 0.9, 30, 3, max_rows=max_rows)
    assert isinstance(engine, RolloutEngine)
    assert not isinstance(engine, ClonableEngine)  # and so rollout.max_staleness is refused
    assert not has_exact_logprobs(engine)
    assert has_exact_logprobs(transformers(model))
    found, expected = (e.generate(PROMPTS, how, SEEDS) for e in (engine, transformers(model)))
    assert 0 < expected.truncated.sum() < len(expected)
    assert_same(found, expected)
    assert FakeLLM.made[0].calls[2:] == ([2, 2] if max_rows and temperature else [4])


def test_the_llm_is_made_once_without_weights_and_with_its_log_probs_as_sampled():
    state = torch.random.get_rng_state()
    engine = engine_of(tiny_model(), dtype="bfloat16", options={"max_model_len": 64})
    assert torch.equal(torch.random.get_rng_state(), state)
    engine.update_weights(tiny_model(seed=1), 8)
    (llm,) = FakeLLM.made
    assert llm.calls == ["reload_weights", "reset_prefix_cache"] * 2
    assert llm.arguments == {
        "dtype": "bfloat16",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "gpu_memory_utilization": 0.4,
        "max_model_len": 64,
    }


def test_weights_made_in_validation_can_be_changed_in_training():
    with torch.inference_mode():  # as Lightning validates
        engine = engine_of(tiny_model())
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert not any(x.is_inference() for x in FakeLLM.made[0].model.parameters())
    engine.update_weights(tiny_model(seed=1), 8)
    torch.testing.assert_close(FakeLLM.made[0].model.lm_head.weight, tiny_model(seed=1).lm_head.weight)


def test_adapters_are_pushed_merged():
    model = adapted(dtype=torch.float32)
    plain = by_hand(model, tiny_model(), 5 / 3)
    engine_of(model)
    for name, x in plain.state_dict().items():
        torch.testing.assert_close(FakeLLM.made[0].model.state_dict()[name], x, msg=name)


def test_what_vllm_raises_is_one_sentence_and_it_starts_anew():
    model = tiny_model()
    engine = engine_of(model)
    FakeLLM.made[0].broken = True
    with pytest.raises(EngineError, match=r"vLLM has failed \(RuntimeError: EngineCore encountered an issue\)"):
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    with pytest.raises(InputError, match="no weights"):
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    engine.update_weights(model, 7)
    assert_same(*(e.generate(PROMPTS, SAMPLING, SEEDS) for e in (engine, transformers(model))))
    assert len(FakeLLM.made) == 2


def test_one_that_hangs_is_a_timeout():
    engine = engine_of(tiny_model(), timeout=0.3)
    FakeLLM.made[0].slow = True
    with pytest.raises(EngineTimeoutError, match=r"within engine.timeout=0.3 seconds"):
        engine.generate(PROMPTS, SAMPLING, SEEDS)


def test_a_cache_of_old_weights_is_an_error():
    engine = engine_of(tiny_model())
    FakeLLM.made[0].used = True
    with pytest.raises(EngineError, match="the prefix cache of the old weights is in use"):
        engine.update_weights(tiny_model(), 8)


def test_all_ranks_push_where_one_ranks_weights_have_changed(monkeypatch):
    engine, model = engine_of(tiny_model()), tiny_model()
    engine.update_weights(model, 7)
    pushes = FakeLLM.made[0].calls.count("reload_weights")
    monkeypatch.setattr(engine_module, "sum_over_ranks", lambda x: x + 1)
    engine.update_weights(model, 7)
    assert FakeLLM.made[0].calls.count("reload_weights") == pushes + 1


def test_several_processes_are_told_to_share_servers(monkeypatch):
    monkeypatch.setattr(engine_module, "sum_over_ranks", lambda x: x)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="samples in a single process and there are 2; write engine=vllm_server"):
        engine_of(tiny_model())


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"engine=vllm needs the package vllm: pip install 'lit_rlhf\[vllm\]'"):
        VLLMEngine([EOS], PAD)
