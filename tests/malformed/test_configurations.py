"""Command lines and yaml files that cannot be run."""

from pathlib import Path

import pytest

from lit_rlhf import evaluate, pipeline
from tests.malformed.answers import QUICK, evaluated, refused, trained

ALGO = [  # one algorithm's arguments
    ("algo=dapoo", "unknown choice algo=dapoo; did you mean 'dapo'?"),
    ("algo.groupsize=3", "unknown key 'algo.groupsize'; did you mean 'group_size'?"),
    ("+algo.foo=3", "unknown key 'algo.foo'; known: "),
    ("algo.group_size=many", "'algo.group_size' must be int, got 'many'"),
    ("algo.group_size=[4]", "'algo.group_size' must be int, got [4]"),
    ("algo.group_size=0", "sampling: group_size must be at least 1, got 0"),
    ("algo.group_size=1", "algo.group_size=1: GRPO compares the samples of one prompt"),
    ("algo.group_size=1000000000000", "algo.prompts_per_rollout=8 x algo.group_size=1000000000000 are 8000000000000 c"),
    ("algo.lr=nan", "algo.lr must be a finite number, got nan"),
    ("algo.lr=1e400", "algo.lr must be a finite number, got inf"),
    ("algo.lr=-1", "algo.lr must be above 0, got -1"),
    ("algo.lr={a: 1}", "'algo.lr' must be float, got {'a': 1}"),
    ("algo.betas=0.9", "'algo.betas' must be tuple[float, float], got 0.9"),
    ("algo.betas=[a,b]", "'algo.betas' must be tuple[float, float], got ['a', 'b']"),
    ("algo.betas=[0.9,1.5]", "algo.betas must be two numbers from 0 to below 1, got [0.9, 1.5]"),
    (
        "algo.minibatches=7",
        "32 samples per device (algo.prompts_per_rollout=8 x algo.group_size=4 / 1 devices) do n",
    ),
    ("algo.kl_coef=-0.1", "algo.kl_coef must be at least 0, got -0.1"),
    ("algo.loss_agg=mean", "algo.loss_agg must be one of token-mean, "),
    ("algo.policy_loss=[a]", "policy loss: ['a'] is no function"),
    ("algo.advantage_estimator=gea", "unknown advantage estimator 'gea': did you mean 'gae'?"),
    ("algo.value=both", "algo.value must be one of none, shared, separate, got 'both'"),
    ("algo._target_=builtins.dict", "algo._target_=builtins.dict is no algorithm"),
]
REST = [  # everything else that `train` reads
    ("rollout.temperature=inf", "sampling: temperature must be 0 (greedy) or more, and finite, got inf"),
    ("rollout.temperature=nan", "sampling: temperature must be 0 (greedy) or more, and finite, got nan"),
    ("rollout.top_p=2", "sampling: top_p must be in (0, 1], got 2"),
    ("rollout.max_new_tokens=0", "sampling: max_new_tokens must be at least 1, got 0"),
    ("rollout.max_new_tokens=100000000000", "9984 of 9984 training prompts do not fit the model: the longest has 6"),
    ("rollout.stop=abc", "'rollout.stop' must be Sequence[str], got 'abc'"),
    ("rollout.stop=[null]", "'rollout.stop' must be Sequence[str], got [None]"),
    ("rollout.stop=[abc]", "rollout.stop: 'abc' is 3 tokens of this tokenizer; give a single token"),
    ("trainer.max_epochs=-5", "`max_epochs` must be a non-negative integer or -1. You passed in -5."),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be at least 0, got -1"),
    ("trainer.gradient_clip_val=nan", "trainer.gradient_clip_val must be a finite number, got nan"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be at least 1, got 0"),
    ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch must be at least 1, got 0"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval must be above 0, got 0"),
    ("trainer.limit_train_batches=0", "trainer.limit_train_batches must be above 0, got 0"),
    ("trainer.max_steps=5 trainer.max_epochs=2", "trainer.max_steps=5 and trainer.max_epochs=2 both limit the run"),
    ("trainer.precision=99", "Precision 99 is invalid."),
    ("~seed", "~seed: nothing runs without it; choose seed=..."),
    ("~algo", "~algo: nothing runs without it; choose algo=..."),
    ("~model._target_", "model._target_ must be an import path; choose one with model=..."),
    ("algo.lr=${nowhere}", "algo.lr: Interpolation key 'nowhere' not found"),
    ("algo.lr=${algo.lr}", "algo.lr: Recursive interpolation detected"),
    ("seed=${oc.env:NO_SUCH_VARIABLE}", 'seed: KeyError raised while resolving interpolation: "Environment variable'),
    ("algo.group_size=${oc.env:HOME}", "'algo.group_size' must be int, got '/"),
    ("algo.lr=${", "algo.lr=${ cannot be read: "),
    ("algo.lr='", "algo.lr=' cannot be read: token recognition error"),
    ("algo..lr=3", "algo..lr=3 cannot be read: "),
    ("algo.lr=1e-4,1e-3", "algo.lr=1e-4,1e-3 are several values; write [...] for a list, or add -m"),
    ("seed", "'seed' is no assignment; write seed=VALUE"),
    ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
    ("seed={}", "'seed' must be int, got {}"),
    ("threads=0", "threads must be at least 1, or null for one per core, got 0"),
    ("validate_first=perhaps", "'validate_first' must be bool, got 'perhaps'"),
    ("plugins=[3]", "plugins: 3 is no module; give import paths"),
    ("plugins=[nowhere]", "plugins: there is no module 'nowhere'"),
    ("callbacks.x={_target_: os.getcwd}", "callbacks.x._target_=os.getcwd makes a str; expected a Callback"),
    ("logger.x={_target_: os.getcwd}", "logger.x._target_=os.getcwd makes a str; expected a Logger"),
    ("callbacks.x={_target_: nowhere.X}", "Error loading 'nowhere.X'"),
    ("trainer._target_=torch.nn.Linear", "trainer: Linear.__init__() got an unexpected keyword argument"),
    ("data._target_=os.getcwd", "data: posix.getcwd() takes no keyword arguments"),
    ("tokenizer={a: 1}", "tokenizer: give a name, a path or a node with a _target_"),
    ("hydra.foo=1", "Could not override 'hydra.foo'."),
    ("hydra/launcher=nope", "In 'hydra/config': Could not find 'hydra/launcher/nope'"),
    ("--config-dir nowhere", "Additional config directory '"),
    ("--config-name nope", "Cannot find primary config 'nope'."),
]
DEVICES = [
    ("trainer.devices=0", "`Trainer(devices=0)` value is not a valid input using cpu accelerator."),
    ("trainer.devices=many", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    ("trainer.devices=[0,0]", "trainer: `devices` selected with `CPUAccelerator` should be an int > 0."),
    ("trainer.num_nodes=0", "`num_nodes` must be a positive integer, but got 0."),
    ("trainer.accelerator=gpu", "No supported gpu backend found!"),
    ("trainer.accelerator=foo", "You selected an invalid accelerator name: `accelerator='foo'`."),
    ("trainer.strategy=foo", "You selected an invalid strategy name: `strategy='foo'`."),
    ("trainer.plugins=[foo]", "Found invalid type for plugin foo."),
]
FOLDERS = [
    ("hydra.run.dir=file", "file cannot be used (File exists); give another hydra.run.dir"),
    ("hydra.run.dir=file/x", "file/x cannot be used (Not a directory); give another hydra.run.dir"),
    ("hydra.run.dir=/proc/x", "/proc/x cannot be used (No such file or directory); give another hydra.run.dir"),
    ("hydra.run.dir=/proc/self", "hydra.run.dir: /proc/self cannot be written to (No such file or directory); give"),
]
YAML = [
    ("algo: {lr: 1\n  x", "a yaml file cannot be read: while parsing a flow mapping in"),
    ("seed: 1\nseed: 2\n", "a yaml file cannot be read: while constructing a mapping in"),
    ("algo:\n  groupsize: 3\n", "unknown key 'algo.groupsize'; did you mean 'group_size'?"),
    ("newkey: 3\n", "unknown key 'newkey'; "),
    ("defaults:\n  - override /algo: nope\n", "In 'train': Could not find 'algo/nope'"),
    (
        "reward:\n  funcs: [{_target_: mine.Judge, api_key: sk-1234}]\n",
        "'reward.funcs.0.api_key' is a secret, and a",
    ),
]
EVALUATE = [
    ("samples=0", "samples must be at least 1, got 0"),
    ("ks=[9]", "ks must be from 1 to samples=2, got 9"),
    ("ks=all", "'ks' must be list or null, got 'all'"),
    ("rows=test", "rows must be one of held_out, train, got 'test'"),
    ("limit=0", "limit must be at least 1, got 0"),
    ("device=nowhere", "device=nowhere cannot be used here: "),
    ("judge=mine.judge", "judge decides who wins, and there is nobody to win against; give against.path=..."),
    ("against=tiny", "against must be given as against.path=..., got 'tiny'"),
    ("against.path=./nowhere", "against.path: there is no folder ./nowhere"),
    ("rollout.group_size=3", "'rollout.group_size' would have no effect; write samples=..."),
    ("rollout.max_staleness=2", "'rollout.max_staleness' would have no effect: nothing is trained here; leave it out"),
    ("data.held_out=0", "rows=held_out of the data are none; give the other of held_out, train"),
    ("algo.lr=1", "unknown key 'algo.lr'; "),
]
PIPELINE = [
    ("pipeline.policy=nope", "pipeline.policy=nope: no such algorithm"),
    ("pipeline.sft=./nowhere", "pipeline.sft=./nowhere: there is no model"),
    ("pipeline.sft=broken", "broken/config.json cannot be read (Expecting property name"),
    ("pipeline.reward_model=ppo", "pipeline.reward_model=ppo makes a policy; use reward_modeling"),
    ("pipeline.nope=3", "unknown key 'pipeline.nope'; known: policy, reward_model, sft"),
    ("policy.algo.lr=many", "in the stage policy: 'algo.lr' must be float, got 'many'"),
    ("policy.algo.groupsize=3", "in the stage policy: unknown key 'algo.groupsize'; did you mean 'group_size'?"),
    ("sft.data.path=nowhere.jsonl", "the stage reward_model has no data; give reward_model.data.path=..."),
    ("data.path=nowhere.jsonl", "in the stage sft: data.path=nowhere.jsonl does not exist"),
    ("policy.algo.api_key=sk-1234", "in the stage policy: 'algo.api_key' is a secret"),
]


@pytest.mark.parametrize(("arguments", "sentence"), [*ALGO, *REST, *DEVICES])
def test_train(arguments, sentence):
    several = arguments.split(" ") if arguments.startswith(("--", "trainer.max_steps")) else [arguments]
    assert trained(*several).startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), FOLDERS)
def test_folders_of_a_run(argument, sentence):
    Path("file").write_text("mine")
    assert refused(*QUICK, argument).startswith(sentence)
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize(("content", "sentence"), YAML)
def test_yaml_files(content, sentence):
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/mine.yaml").write_text(f"# @package _global_\n{content}")
    given = ["--config-dir", "conf", *QUICK, "hydra.run.dir=earlier", "experiment=mine"]
    assert refused(*given).startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), EVALUATE)
def test_evaluate(argument, sentence):
    assert evaluated(argument).startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), PIPELINE)
def test_pipeline(argument, sentence):
    Path("broken").mkdir()
    Path("broken/config.json").write_text("{")
    assert refused("hydra.run.dir=earlier", argument, main=pipeline.main).startswith(sentence)


def test_what_is_refused_leaves_no_configuration_behind():
    trained("algo.lr=nan", "hydra.run.dir=new")
    assert list(Path("new").iterdir()) == []
    refused("samples=0", "hydra.run.dir=new", main=evaluate.main)
    assert list(Path("new").iterdir()) == []
