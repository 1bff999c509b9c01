"""Which runs a pipeline consists of, what each takes from the others, and when one is run again."""

import json

import pytest

from lit_rlhf.errors import InputError
from lit_rlhf.stages import STAGES, plan, split_arguments

DEFAULT = {"sft": "sft", "reward_model": "reward_modeling", "policy": "ppo"}
NONE = dict.fromkeys(STAGES, ())


def planned(folder, *arguments, **chosen):
    """The stages that a command line of these arguments has."""
    _, shared, of_stage = split_arguments(arguments)
    return {stage.name: stage for stage in plan({**DEFAULT, **chosen}, shared, of_stage, folder)}


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model."""
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return folder


def test_each_stage_starts_from_what_the_ones_before_have_made(tmp_path):
    stages = planned(tmp_path)
    assert list(stages) == list(STAGES)
    start, judge = f"model.path={tmp_path}/sft/model", f"{tmp_path}/reward_model/model"
    assert stages["sft"].arguments == ("algo=sft", "model=tiny_scratch")
    assert stages["reward_model"].arguments[:2] == ("algo=reward_modeling", start)
    assert stages["policy"].arguments[:2] == ("algo=ppo", start)
    assert any(judge in argument for argument in stages["policy"].arguments)
    assert not any(judge in argument for argument in stages["reward_model"].arguments)


def test_arguments_go_to_every_stage_or_to_the_one_they_name(tmp_path):
    data = ("sft.data.path=demos.jsonl", "reward_model.data.path=pairs.jsonl", "policy.data=arithmetic")
    stages = planned(tmp_path, "seed=3", "policy.algo.lr=1e-5", *data)
    assert all("seed=3" in stage.arguments for stage in stages.values())
    assert [name for name, stage in stages.items() if "algo.lr=1e-5" in stage.arguments] == ["policy"]
    assert [name for name, stage in stages.items() if "data.path=demos.jsonl" in stage.arguments] == ["sft"]


def test_a_model_given_is_where_the_first_stage_starts_and_no_other(tmp_path):
    stages = planned(tmp_path, "model.path=org/base", "model.dtype=bfloat16", "tokenizer=org/base", "data.path=x.jsonl")
    named = {name: [a for a in s.arguments if a.startswith(("model.path", "tokenizer"))] for name, s in stages.items()}
    assert named["sft"] == ["model.path=org/base", "tokenizer=org/base"]
    assert named["reward_model"] == named["policy"] == [f"model.path={tmp_path}/sft/model"]
    assert all("model.dtype=bfloat16" in stage.arguments for stage in stages.values())


def test_the_settings_of_the_built_in_task_are_for_that_task_and_model_only(tmp_path):
    def presets(*arguments):
        stages = planned(tmp_path, *arguments)
        return [a for stage in stages.values() for a in stage.arguments if a.startswith(("preset=", "model=tiny"))]

    assert presets() == [
        "model=tiny_scratch",
        "preset=arithmetic_pipeline_reward_modeling",
        "preset=arithmetic_pipeline_ppo",
    ]
    for arguments in (["data.path=x.jsonl"], ["data=file"], ["model.path=org/base"], ["model=pretrained"]):
        assert presets(*arguments) == []
    without = planned(tmp_path, sft=None)["policy"].arguments
    assert without[:2] == ("algo=ppo", "preset=arithmetic_pipeline_ppo")
    assert presets("preset=mine") == ["model=tiny_scratch", "preset=mine", "preset=mine", "preset=mine"]


def test_a_stage_may_start_from_a_model_of_its_own(tmp_path):
    stages = planned(tmp_path, "model.path=org/base", "reward_model.model.path=org/judge")
    named = {name: [a for a in s.arguments if a.startswith("model.path")] for name, s in stages.items()}
    assert named["reward_model"] == ["model.path=org/judge"]
    assert (named["sft"], named["policy"]) == (["model.path=org/base"], [f"model.path={tmp_path}/sft/model"])


def test_without_sft_the_model_given_is_where_all_stages_start(tmp_path):
    stages = planned(tmp_path, "model.path=org/base", sft=None)
    assert list(stages) == ["reward_model", "policy"]
    assert all("model.path=org/base" in stage.arguments for stage in stages.values())


def test_a_folder_takes_the_place_of_a_stage(tmp_path, model):
    judge = tmp_path / "my judge"
    judge.mkdir()
    written = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (judge / "config.json").write_text(json.dumps(written))
    stages = planned(tmp_path, sft=str(model), reward_model=str(judge))
    assert list(stages) == ["policy"]
    assert f"model.path={model}" in stages["policy"].arguments
    assert f"reward.funcs=['{judge}']" in stages["policy"].arguments  # in quotes, for its name has a space
    with pytest.raises(InputError, match="is a LlamaForCausalLM, which is of no use there"):
        planned(tmp_path, reward_model=str(model))
    (judge / "config.json").write_text(json.dumps({**written, "id2label": {"0": "bad", "1": "good"}}))
    with pytest.raises(InputError, match="has 2 labels; one is needed"):
        planned(tmp_path, reward_model=str(judge))


@pytest.mark.parametrize("policy", ["dpo", "ipo", "hinge_dpo", "robust_dpo", "sft"])
def test_what_learns_without_rewards_has_no_reward_model(tmp_path, policy):
    stages = planned(tmp_path, policy=policy)
    assert list(stages) == ["sft", "policy"]
    assert not any(argument.startswith("reward.funcs") for argument in stages["policy"].arguments)


@pytest.mark.parametrize("policy", ["ppo", "grpo", "dapo", "rloo", "importance_sampling"])
def test_what_learns_from_rewards_learns_from_the_reward_model_alone(tmp_path, policy):
    judged = [a for a in planned(tmp_path, policy=policy)["policy"].arguments if a.startswith("reward.funcs")]
    assert judged == [f"reward.funcs=[{tmp_path}/reward_model/model]"]


def test_a_reward_given_goes_before_the_reward_model_and_without_one_the_data_decides(tmp_path):
    both = f"reward.funcs=[mine.reward,{tmp_path}/reward_model/model]"
    assert both in planned(tmp_path, f"policy.{both}")["policy"].arguments
    alone = planned(tmp_path, "reward.funcs=[mine.reward]", reward_model=None)["policy"].arguments
    assert [a for a in alone if a.startswith("reward.funcs")] == ["reward.funcs=[mine.reward]"]
    verified = planned(tmp_path, reward_model=None, policy="grpo")["policy"].arguments
    assert not any(argument.startswith("reward.funcs") for argument in verified)


@pytest.mark.parametrize(
    ("arguments", "chosen", "said"),
    [
        ([], {"policy": "pppo"}, "pipeline.policy=pppo: no such algorithm; did you mean 'ppo'"),
        ([], {"sft": "/nowhere"}, "pipeline.sft=/nowhere: there is no model"),
        ([], {"policy": "reward_modeling"}, "makes a reward model; use sft or ppo"),
        (["model.lora.r=8"], {}, "random weights; write reward_model.model.lora.r=8 policy.model.lora.r=8"),
        (["reward.funcs=[mine.reward]"], {}, "leaves nothing for the reward model to do"),
        (["sft.data.path=x.jsonl"], {}, "the stage reward_model has no data; give reward_model.data.path"),
        (["sft=null"], {}, "write pipeline.sft=null"),
        ([], {"reward_model": "dpo"}, "makes a policy; use reward_modeling"),
        ([], dict.fromkeys(STAGES), "nothing to run"),
        (["sft.algo.lr=1"], {"sft": None}, "no effect: pipeline.sft is null"),
        (["policy.algo=grpo"], {}, "write pipeline.policy=NAME"),
        (["algo=grpo"], {}, "write pipeline.policy=NAME"),
        (["ckpt_path=x"], {}, "write hydra.run.dir=FOLDER"),
        (["reward_model.algo.lr=1"], {"policy": "dpo"}, "dpo learns without a reward model"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_sentence(tmp_path, arguments, chosen, said):
    with pytest.raises(InputError, match=said):
        planned(tmp_path, *arguments, **chosen)


def test_arguments_for_a_folder_have_no_effect(tmp_path, model):
    with pytest.raises(InputError, match=r"no effect: pipeline\.sft is a model that is there already"):
        planned(tmp_path, "sft.algo.lr=1", sft=str(model))


def test_a_stage_is_finished_once_and_for_the_same_arguments(tmp_path):
    stage = planned(tmp_path)["reward_model"]
    assert not stage.finished
    stage.note(12.34, finished=False)
    assert not stage.finished
    stage.note(1.0, finished=True)
    assert stage.finished
    assert stage.record["seconds"] == 13.3
    with pytest.raises(InputError, match=r"other arguments \(they differ in seed=2\)"):
        _ = planned(tmp_path, "seed=2")["reward_model"].finished
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    assert planned(moved)["reward_model"].finished


def test_a_stage_that_was_stopped_goes_on_with_the_same_arguments_unless_it_had_trained_nothing(tmp_path):
    stage, other = (planned(tmp_path, *arguments)["sft"] for arguments in ([], ["seed=2"]))
    stage.note(1.0, finished=False)
    assert not other.finished
    stage.checkpoint.parent.mkdir()
    stage.checkpoint.touch()
    assert not stage.finished
    with pytest.raises(InputError, match="made with other arguments"):
        _ = other.finished
