"""The exported folder is the trained model, for anyone who has never heard of this library."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.hf_export import HFExport
from lit_rlhf.data.modules import ArithmeticData
from lit_rlhf.types import SamplingConfig
from tests.helpers import trainer

SHORT = SamplingConfig(max_new_tokens=8)


def exported(folder, algorithm=GRPO, **arguments):
    sizes = {"prompts_per_rollout": 4, "group_size": 2} if algorithm is GRPO else {"batch_size": 4}
    module = algorithm(policy="tiny", sampling=SHORT, lr=1e-2, **sizes, **arguments)
    fitter = trainer(max_steps=1, callbacks=[HFExport(folder / "deep" / "model")])
    fitter.fit(module, datamodule=ArithmeticData(held_out=16))
    return module, folder / "deep" / "model"


def test_the_folder_holds_the_trained_weights_and_greedily_says_the_same(tmp_path):
    module, folder = exported(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    trained, start = module.models.policy.state_dict(), AutoModelForCausalLM.from_pretrained
    untrained = start(GRPO(policy="tiny").models.policy.name_or_path).state_dict()
    assert model.state_dict().keys() == trained.keys()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in trained.items())
    assert not torch.equal(model.state_dict()["lm_head.weight"], untrained["lm_head.weight"])

    texts = ["2+3=", "12+34=", "99+99="]
    prompts = [module.encode_prompt(text) for text in texts]
    assert [tokenizer(text)["input_ids"] for text in texts] == prompts
    greedy = SamplingConfig(max_new_tokens=8, temperature=0.0)
    module.engine.update_weights(module.models.policy, 0)
    rollout = module.engine.generate(prompts, greedy, seed=0)
    for row, prompt in enumerate(prompts):
        ours = rollout.response_ids[row][rollout.response_mask[row]].tolist()
        theirs = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :].tolist()
        assert theirs == ours


def test_the_reference_is_not_exported(tmp_path):
    module, folder = exported(tmp_path, kl_coef=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert module.models.reference is not None
    assert torch.equal(model.lm_head.weight, module.models.policy.lm_head.weight)
    assert not torch.equal(model.lm_head.weight, module.models.reference.lm_head.weight)
    assert model.num_parameters() == module.models.policy.num_parameters()


def test_the_export_of_one_run_is_the_policy_of_the_next(tmp_path):
    trained, folder = exported(tmp_path, SFT)
    reloaded = GRPO(policy=folder)
    assert torch.equal(reloaded.models.policy.lm_head.weight, trained.models.policy.lm_head.weight)
    assert reloaded.tokenizer.eos_token_id == trained.tokenizer.eos_token_id
    assert reloaded.encode_prompt("1+2=") == trained.encode_prompt("1+2=")


def test_only_the_first_rank_writes(tmp_path):
    class Rank:
        is_global_zero = False

    HFExport(tmp_path / "model").on_fit_end(Rank(), None)
    assert not (tmp_path / "model").exists()
