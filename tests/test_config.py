"""The yaml files, and the checks of a command line that are made before anything heavy is imported."""

import importlib
import inspect
import sys
import typing
from functools import cache, partial

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lit_rlhf.algorithms.base import ModuleArgs, RLHFModule
from lit_rlhf.algorithms.critic import Critic, CriticArgs
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.kl_penalty import KLArgs, KLPenalty
from lit_rlhf.algorithms.on_policy import OnPolicyArgs, OnPolicyModule
from lit_rlhf.algorithms.reward_scaling import RewardArgs, RewardScaling
from lit_rlhf.cli import primary
from lit_rlhf.config import _SPECIAL, check_config, conf_dir, nearest, prepare_arguments, signature_of
from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.curriculum import CurriculumArgs, SuccessCurriculum
from lit_rlhf.rollouts.importance import ImportanceArgs, ImportanceCorrection
from lit_rlhf.train import _functions, check_run
from tests.helpers import NumberTokenizer, build, sum_of_ids, tiny_model
from tests.runs import config_of

YAML = sorted(conf_dir().rglob("*.yaml"))
GROUPS = sorted({(file.parent.name, file.stem) for file in YAML if file.parent.parent == conf_dir()})
ALGORITHMS = [name for group, name in GROUPS if group == "algo"]


def plain(config):
    return OmegaConf.to_container(config, resolve=False)


def prepared(*arguments):
    return prepare_arguments(arguments, primary("train"))


def refused(check, *arguments):
    with pytest.raises(InputError) as caught:
        check(*arguments)
    return str(caught.value)


def nodes(value, path=""):
    """Every node with a `_target_`, by path."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, child in value.items():
            yield from nodes(child, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from nodes(child, f"{path}[{i}]")


def target_of(path):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def real_keywords(target):
    """The keywords that Python itself would accept, `Unpack[...]` followed; None where they have no end."""
    function = target.__init__ if isinstance(target, type) else target
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self":
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            typed = typing.get_args(typing.get_type_hints(function)[name])
            if not typed:
                return None, found
            found |= dict.fromkeys(typing.get_type_hints(typed[0]))
        else:
            found[name] = parameter
    return set(found), found


# the signatures that keys are compared with


TARGETS = sorted({node["_target_"] for file in YAML for _, node in nodes(plain(OmegaConf.load(file)))})


@pytest.mark.parametrize("target", TARGETS)
def test_signatures_are_read_from_the_source_as_python_has_them(target):
    signature = signature_of(target)
    if signature is None:
        assert target_of(target).__init__ is object.__init__, "only what has no constructor may go unread"
        return
    real, known = real_keywords(target_of(target))
    assert signature.open == (real is None)
    assert set(signature.parameters) == set(known if real is None else real)


def test_targets_are_the_ones_expected():
    assert len(TARGETS) >= 13, "the search for targets has gone blind"
    assert {"lit_rlhf.algorithms.grpo.GRPO", "lightning.pytorch.trainer.trainer.Trainer"} <= set(TARGETS)


NAMED_BY_ITSELF = {"lr", "loss_agg", "kl_coef"}  # what an algorithm's own signature states, where it has it
SET_BY_THE_FAMILY = {"reference", "value", "value_std"}  # what the base takes and no user gives to it


def parameters_of(function):
    skipped = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.name != "self" and p.kind not in skipped}


PARTS = {
    KLPenalty: (KLArgs, {"kl_coef", "kl_in"}),
    Critic: (CriticArgs, {"clip_ratio"}),
    ImportanceCorrection: (ImportanceArgs, {"importance_correction"}),
    RewardScaling: (RewardArgs, set()),
    SuccessCurriculum: (CurriculumArgs, set()),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_arguments_of_a_part_are_those_of_its_constructor(part):
    arguments, given = PARTS[part]
    assert set(arguments.__annotations__) == set(parameters_of(part.__init__)) - given


def test_the_arguments_passed_on_are_those_of_the_constructors():
    """A name in one and not in the other would be refused or ignored."""
    base, template = set(parameters_of(RLHFModule.__init__)), set(parameters_of(OnPolicyModule.__init__))
    assert set(ModuleArgs.__annotations__) == base - SET_BY_THE_FAMILY - {"lr"}
    parts = {name for arguments, _ in PARTS.values() for name in arguments.__annotations__}
    passed_on = set(typing.get_type_hints(OnPolicyArgs))
    assert passed_on == set(ModuleArgs.__annotations__) | parts | template - {"loss_agg", "kl_coef"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_known_key_of_an_algorithm_is_accepted_by_its_constructor(name):
    """Not only by signature: the constructor is called with all of them."""
    target = target_of(OmegaConf.load(conf_dir() / "algo" / f"{name}.yaml")["_target_"])
    defaults = {}
    for base in [*PARTS, *reversed(target.__mro__)]:
        if base in PARTS or issubclass(base, RLHFModule):
            parameters = parameters_of(base.__init__).values()
            defaults |= {p.name: p.default for p in parameters if p.default is not p.empty}
    keys = set(signature_of(f"{target.__module__}.{target.__name__}").parameters)
    if issubclass(target, OnPolicyModule):
        assert keys == set(defaults) - {"reference", "value_std"}
    given = {key: defaults[key] for key in keys}
    given |= {"policy": tiny_model(), "tokenizer": NumberTokenizer(), "reward_funcs": [sum_of_ids]}
    target(**given)


def write(folder, monkeypatch, **files):
    for name, text in files.items():
        folder.joinpath(f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))


def test_a_users_classes_are_read_without_importing_them(tmp_path, monkeypatch):
    write(
        tmp_path,
        monkeypatch,
        their_module="""
raise RuntimeError("imported")
from dataclasses import dataclass
from lit_rlhf import DAPO
from lit_rlhf.algorithms.kl_penalty import KLArgs, KLPenalty
from lit_rlhf.algorithms.on_policy import OnPolicyArgs
class Inherits(DAPO):
    pass
class Adds(DAPO):
    def __init__(self, *, strength: float = 1.0, **rest: Unpack[OnPolicyArgs]): ...
class TakesAll(DAPO):
    def __init__(self, *, strength: float = 1.0, **rest): ...
@dataclass(frozen=True)
class Base:
    first: int
@dataclass
class Settings(Base):
    second: str = "x"
def function(a, b=2, /, c: int = 3, *, d=4): ...
""",
        their_other="from their_module import Settings as Renamed\nimport os",
    )
    dapo = set(signature_of("lit_rlhf.algorithms.dapo.DAPO").parameters)
    assert "max_rounds" in dapo
    assert set(signature_of("their_module.Inherits").parameters) == dapo
    assert set(signature_of("their_module.Adds").parameters) == {"strength", *OnPolicyArgs.__annotations__}
    takes_all = signature_of("their_module.TakesAll")
    assert (takes_all.open, set(takes_all.parameters)) == (True, {"strength"})
    for path in ("their_module.Settings", "their_other.Renamed"):
        assert list(signature_of(path).parameters) == ["first", "second"]
    assert set(signature_of("their_module.function").parameters) == {"a", "b", "c", "d"}
    assert signature_of("their_module.nothing") is None
    assert signature_of("no_such_module.Thing") is None
    assert "their_module" not in sys.modules


# the yaml files


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_yaml_composes_and_its_keys_exist(group, name):
    if (group, name) in {("data", "file"), ("model", "pretrained")}:
        config = config_of(f"{group}.path=somewhere")
        assert config[group].path == "somewhere"
    elif (group, name) == ("data", "reasoning_gym"):
        config = config_of("data=reasoning_gym", "data.task=chain_sum")
    elif group == "preset":
        algorithm = next(algo for algo in sorted(ALGORITHMS, key=len, reverse=True) if name.endswith(f"_{algo}"))
        config = config_of(f"algo={algorithm}", f"preset={name}")
    else:
        config = config_of(f"{group}={name}")
    check_config(plain(config))
    for path, node in nodes(plain(config)):
        signature = signature_of(node["_target_"])
        unknown = set(node) - set(_SPECIAL) - set(signature.parameters if signature else ())
        assert not unknown or signature.open, (path, unknown)


def test_defaults_live_in_signatures_and_not_in_yaml():
    """A value in a yaml file that equals the default of the signature says nothing."""
    for file in (file for file in YAML if file.parent.name in ("algo", "data", "rollout", "reward", "trainer")):
        for path, node in nodes(plain(OmegaConf.load(file))):
            parameters = inspect.signature(target_of(node["_target_"])).parameters
            for key in set(node) & set(parameters):
                default = parameters[key].default
                assert type(default) is not type(node[key]) or default != node[key], (file.name, path, key)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithms_yaml_is_short(name):
    assert len((conf_dir() / "algo" / f"{name}.yaml").read_text().splitlines()) <= 15


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_default_run_shows_at_most_60_values(name):
    def leaves(value):
        children = value.values() if isinstance(value, dict) else value
        return sum(map(leaves, children)) if isinstance(value, (dict, list)) else 1

    assert 20 < leaves(plain(config_of(f"algo={name}"))) <= 60


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_the_built_in_model_brings_its_preset_and_the_command_line_wins(name):
    preset = OmegaConf.load(conf_dir() / "preset" / f"arithmetic_tiny_{name}.yaml")
    assert config_of(f"algo={name}").trainer.max_epochs == preset.trainer.max_epochs
    assert config_of(f"algo={name}", "trainer.max_epochs=7").trainer.max_epochs == 7
    assert config_of(f"algo={name}", "algo.group_size=3").algo.group_size == 3
    for own in ("model.path=somewhere", "data.path=somewhere"):
        other = config_of(f"algo={name}", own)
        assert other.trainer.max_epochs != preset.trainer.max_epochs
        assert (set(other.algo), set(other.rollout)) == ({"_target_"}, {"_target_"})


def test_the_configuration_lies_in_the_checkout_or_in_the_package():
    assert (conf_dir() / "train.yaml").is_file()
    assert {"algo", "data", "model", "reward", "rollout", "trainer"} <= {d.name for d in conf_dir().iterdir()}


# what becomes of a command line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["algo.group_size=3"], ["++algo.group_size=3"]),
        (["seed=3", "algo=dapo"], ["seed=3", "algo=dapo"]),
        (["data.path=x.jsonl"], ["data=file", "++data.path=x.jsonl"]),
        (["data=arithmetic", "data.path=x"], ["data=arithmetic", "++data.path=x"]),
        (["model.path=m", "data.path=d"], ["data=file", "model=pretrained", "++model.path=m", "++data.path=d"]),
        (["-m", "algo=grpo,dapo", "algo.lr=1e-5,1e-4"], ["-m", "algo=grpo,dapo", "++algo.lr=1e-5,1e-4"]),
        (["reward.funcs=[a.b, c.d]", "data.path='a=b, c.jsonl'"], None),
        (["rollout.stop=['=','\\n']"], ["++rollout.stop=['=','\\n']"]),
        (["+algo.foo=1", "++algo.bar=2", "~trainer.plugins"], ["+algo.foo=1", "++algo.bar=2", "~trainer.plugins"]),
        (["hydra.run.dir=x", "--cfg", "job", "-c", "job"], ["hydra.run.dir=x", "--cfg", "job", "-c", "job"]),
        (["trainer.max_steps=5"], ["++trainer.max_epochs=-1", "++trainer.max_steps=5"]),
        (["trainer.max_steps=-1"], ["++trainer.max_steps=-1"]),
        (["trainer.max_steps=5", "trainer.max_epochs=-1"], ["++trainer.max_steps=5", "++trainer.max_epochs=-1"]),
        (["debug=null", "experiment=tiny_base"], ["experiment=tiny_base"]),
        (["logger=null", "callbacks=null"], ["~logger", "~callbacks"]),
        (["experiment=flux/dapo"], ["experiment=flux/dapo"]),
        (["algo.policy_loss._target_=a.b"], ["++algo.policy_loss._target_=a.b"]),
    ],
)
def test_a_command_line_becomes_hydras(given, expected):
    expected = expected or ["data=file", "++reward.funcs=[a.b, c.d]", "++data.path='a=b, c.jsonl'"]
    assert prepared(*given) == expected


def test_a_run_has_one_limit():
    """Lightning counts wrongly in a resumed run that has two."""
    limits = lambda *arguments: [config_of(*arguments).trainer.get(k, -1) for k in ("max_epochs", "max_steps")]  # noqa: E731
    for preset in ("algo=grpo", "algo=dapo", "algo=sft", "experiment=tiny_base", "debug=tiny"):
        assert limits(preset, "trainer.max_steps=5") == [-1, 5]
        assert limits(preset, "trainer.max_epochs=5") == [5, -1]
    assert limits("debug=tiny", "algo=sft") == [-1, 10]
    assert limits("debug=tiny") == [1, -1]
    sentence = "trainer.max_steps=5 and trainer.max_epochs=2 both limit the run; leave one of them out"
    assert refused(prepared, "trainer.max_steps=5", "trainer.max_epochs=2") == sentence


def test_no_yaml_cuts_a_rollout_in_pieces():
    for algo in ("grpo", "dapo"):
        assert "limit_train_batches" not in config_of(f"algo={algo}", "debug=tiny").trainer


@pytest.mark.parametrize(
    "path",
    [
        "a(1).jsonl",
        "a=b.jsonl",
        "a,b.jsonl",
        "a b [1] {2}.jsonl",
        " it's.jsonl",
        r"C:\dir\a.jsonl",
        "dir\\",
        r"a\'b",
        "7",
        "~/ä#",
    ],
)
def test_a_path_arrives_as_it_is_written(path):
    config = config_of(f"data.path={path}", f"model.path={path}", f"tokenizer={path}", f"ckpt_path={path}")
    assert [config.data.path, config.model.path, config.tokenizer, config.ckpt_path] == [path] * 4


def test_a_path_in_quotes_or_with_an_interpolation_is_left_to_hydra():
    config = config_of("data.path='a,b'", "model.path=${data.path}", "ckpt_path=null", "tokenizer={_target_: x}")
    assert (config.data.path, config.model.path, config.ckpt_path) == ("a,b", "a,b", None)
    assert config.tokenizer == {"_target_": "x"}
    assert prepared("data.path=a,b", "-m") == ["-m", "data=file", "++data.path=a,b"]


def test_optional_groups_can_be_left_out():
    config = config_of("logger=null", "callbacks=null", "preset=null", "debug=null", "experiment=null")
    check_run(plain(config))
    assert not {"logger", "callbacks"} & set(config)
    assert set(config.algo) == {"_target_"}
    assert plain(config_of("logger=null", "logger.wandb=null"))["logger"] == {"wandb": None}


def test_values_arrive_as_they_were_given():
    config = config_of("reward.funcs=[a.b, c.d]", "data.path='a=b, c.jsonl'", "rollout.stop=['=']", "algo.lr=3e-4")
    assert list(config.reward.funcs) == ["a.b", "c.d"]
    assert (config.data.path, list(config.rollout.stop), config.algo.lr) == ("a=b, c.jsonl", ["="], 3e-4)
    check_config(plain(config))


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("algo=dapoo", "unknown choice algo=dapoo; did you mean 'dapo'?"),
        ("algo=xyzxyz", "unknown choice algo=xyzxyz; known: " + ", ".join(ALGORITHMS)),
        ("algo=choice(grpo,dappo)", "unknown choice algo=dappo; did you mean 'dapo'?"),
        ("algo=grpo,dappo", "unknown choice algo=dappo; did you mean 'dapo'?"),
        (
            "experiment=signal/enhanced_pp",
            "unknown choice experiment=signal/enhanced_pp; did you mean 'signal/enhanced_ppo'?",
        ),
        ("experiment=dpo", "unknown choice experiment=dpo; did you mean 'flux/dpo' or 'signal/dpo'?"),
        ("experiment=signl/grop", "unknown choice experiment=signl/grop; did you mean 'signal/grpo'?"),
        ("debug=steps/tiny_sft", "unknown choice debug=steps/tiny_sft; known: tiny"),
        ("algo=grpo,dapo", "algo=grpo,dapo are several runs; add -m to start one after the other"),
        ("data=", "unknown choice data=; known: arithmetic, file, reasoning_gym"),
        ("data=null", "unknown choice data=null; known: arithmetic, file, reasoning_gym"),
        ("algo=null", "unknown choice algo=null; known: " + ", ".join(ALGORITHMS)),
        ("trainer=null", "unknown choice trainer=null; known: cpu, ddp, deepspeed, default, fsdp2, gpu"),
        ("trainr.max_epochs=3", "unknown key 'trainr.max_epochs'; did you mean 'trainer'?"),
        ("+trainr.max_epochs=3", "unknown key '+trainr.max_epochs'; did you mean 'trainer'?"),
        ("sed=3", "unknown key 'sed'; did you mean 'seed'?"),
        ("hydra_dir=3", "unknown key 'hydra_dir'; did you mean 'hydra'?"),
        ("seed", "'seed' is no assignment; write seed=VALUE"),
    ],
)
def test_unknown_groups_choices_and_keys_are_refused(argument, sentence):
    assert refused(prepared, argument) == sentence


def test_the_nearest_name_is_offered_or_all_of_them():
    assert nearest("group_sise", ["lr", "group_size"]) == "; did you mean 'group_size'?"
    assert nearest("zzz", ["lr", "group_size"]) == "; known: group_size, lr"


# keys and values against the signatures


@cache
def default_config():
    config = config_of()
    OmegaConf.set_struct(config, False)
    return config


def with_values(*assignments):
    return plain(OmegaConf.merge(default_config(), OmegaConf.from_dotlist(list(assignments))))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algo.groupsize=3", "unknown key 'algo.groupsize'; did you mean 'group_size'?"),
        ("model.paht=x", "unknown key 'model.paht'; did you mean 'path'?"),
        ("data.dificulty=1", "unknown key 'data.dificulty'; did you mean 'difficulty'?"),
        ("reward.func=[a.b]", "unknown key 'reward.func'; did you mean 'funcs'?"),
        ("engine.share_prompt=false", "unknown key 'engine.share_prompt'; did you mean 'share_prompts'?"),
        ("rollout.temprature=1", "unknown key 'rollout.temprature'; did you mean 'temperature'?"),
        ("trainer.max_epoch=1", "unknown key 'trainer.max_epoch'; did you mean 'max_epochs'?"),
        ("callbacks.chekpoint.dirpath=x", "unknown key 'callbacks.chekpoint'; did you mean 'checkpoint'?"),
        ("callbacks.export.foldr=x", "unknown key 'callbacks.export.foldr'; did you mean 'folder'?"),
        ("logger.wanbd.project=x", "unknown key 'logger.wanbd'; did you mean 'wandb'?"),
        ("logger.csv.savedir=x", "unknown key 'logger.csv.savedir'; did you mean 'save_dir'?"),
        ("algo.clip_ratio_lo=1", "unknown key 'algo.clip_ratio_lo'; did you mean 'clip_ratio_low'?"),
        ("algo.group_size=abc", "'algo.group_size' must be int, got 'abc'"),
        ("algo.group_size=4.5", "'algo.group_size' must be int, got 4.5"),
        ("algo.group_size=true", "'algo.group_size' must be int, got True"),
        ("algo.minibatches=[2]", "'algo.minibatches' must be int, got [2]"),
        ("algo.kl_coef=high", "'algo.kl_coef' must be float, got 'high'"),
        ("algo.mask_truncated=1", "'algo.mask_truncated' must be bool, got 1"),
        ("rollout.top_p=true", "'rollout.top_p' must be float, got True"),
        ("algo.group_size=null", "'algo.group_size' must be int, got null"),
        ("model.path=null", "'model.path' must be str or Path, got null"),
        (
            "callbacks.foo=1",
            "unknown key 'callbacks.foo'; known: checkpoint, export, monitor, plan, progress, report, samples, signals",
        ),
        ("data.train_size=many", "'data.train_size' must be int or Sequence[int], got 'many'"),
        ("model.lora.rr=3", "unknown key 'model.lora.rr'; did you mean 'r'?"),
        ("model.lora.target_module=x", "unknown key 'model.lora.target_module'; did you mean 'target_modules'?"),
        ("model.lora.r=4.5", "'model.lora.r' must be int, got 4.5"),
        ("model.lora=16", "'model.lora' has keys of its own, got 16; known: r, alpha, target_modules"),
    ],
)
def test_bad_keys_and_values_are_refused_with_a_sentence(override, sentence):
    assert refused(check_config, with_values(override)) == sentence


def test_a_backslash_and_an_n_of_a_template_are_a_new_line_on_the_command_line():
    template = r'data.prompt_template="Question: {prompt}\nAnswer:"'
    assert config_of("data=file", "data.path=x.jsonl", template).data.prompt_template == "Question: {prompt}\nAnswer:"


@pytest.mark.parametrize(
    "override",
    [
        "algo.kl_coef=1",  # an int is a float
        "data.train_size=null",  # int | None
        "data.difficulty=[1,2,3]",
        "trainer.max_epochs=null",  # Optional[int]
        "trainer.devices=auto",  # list[int] | str | int: not a simple type
        "algo.betas=[0.9,0.99]",
        "algo.advantage_estimator=rloo",
        "data.held_out=${seed}",  # known only when it is resolved
        "logger.wandb.tags=[a]",  # wandb_logger passes on what it does not know
        "callbacks.progress=null",
        "model.lora=null",
        "model.lora={r: 4, alpha: 8}",
        "model.lora.target_modules=[q_proj]",
    ],
)
def test_good_values_are_accepted(override):
    check_config(with_values(override))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["+algo.groupsize=3"], "unknown key 'algo.groupsize'; did you mean 'group_size'?"),  # Hydra would let it pass
        (["data=file"], "'data.path' is missing; give data.path=..."),
        (["model=pretrained"], "'model.path' is missing; give model.path=..."),
        (["engine=vllm_server", "engine.url=[x]"], "unknown key 'engine.url'; did you mean 'urls'?"),
        (["engine=vllm", "engine.timeout=soon"], "'engine.timeout' must be float, got 'soon'"),
    ],
)
def test_what_hydra_lets_pass_is_refused(overrides, sentence):
    assert refused(check_config, plain(config_of(*overrides))) == sentence


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
        ("seed=one", "'seed' must be int, got 'one'"),
        ("threads=0", "threads must be at least 1, or null for one per core, got 0"),
        ("threads=-1", "threads must be at least 1, or null for one per core, got -1"),
        *[
            (
                f"trainer.precision={precision}",
                f"trainer.precision={precision} cannot convert these batches; write model.dtype=bfloat16 instead, "
                "without trainer.precision",
            )
            for precision in ("bf16-true", "16-true")
        ],
        ("ckpt_path=3", "'ckpt_path' must be str or null, got 3"),
        ("algo._target_=7", "algo._target_ must be an import path; choose one with algo=..."),
        (
            "algo._target_=torch.optim.AdamW",
            "algo._target_=torch.optim.AdamW is no algorithm: it does not take "
            "policy, tokenizer, reward_funcs, sampling, engine, seed",
        ),
    ],
)
def test_values_that_no_run_can_have_are_refused(override, sentence):
    assert refused(check_run, with_values(override)) == sentence


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("algo.policy=gpt2", "model.path=..."),
        ("algo.tokenizer=gpt2", "tokenizer=..."),
        ("algo.reward_funcs=[a.b]", "reward.funcs=[...]"),
        ("algo.reward_weights=[1]", "reward.weights=[...]"),
        ("algo.sampling.temperature=2", "rollout.max_new_tokens=... and the like"),
        ("algo.seed=3", "seed=..."),
        ("trainer.callbacks=[]", "callbacks.NAME._target_=..."),
        ("trainer.logger=false", "logger.NAME._target_=..."),
        ("rollout.group_size=4", "algo.group_size=..."),
        ("algo.engine._target_=my.Engine", "engine=..."),
        ("engine.eos_token_ids=[1]", "rollout.stop=[...]"),
        ("engine.pad_token_id=0", "tokenizer=..."),
    ],
)
def test_what_a_run_fills_in_itself_is_refused_and_not_ignored(override, instead):
    key = ".".join(override.split("=")[0].split(".")[:2])
    assert refused(check_run, with_values(override)) == f"'{key}' would have no effect; write {instead}"


def my_loss(old_logp, logp, advantages, mask, strength=1.0):
    return strength * (old_logp - logp), {}


def make_loss(strength):
    return partial(my_loss, strength=strength)


class MyLoss:
    def __init__(self, strength=1.0):
        self.strength = strength

    def __call__(self, old_logp, logp, advantages, mask):
        return self.strength * (old_logp - logp), {}


@pytest.mark.parametrize(
    ("node", "strength"),
    [
        ("my_loss", 1),
        ("my_loss,_partial_:true", 1),
        ("my_loss,strength:3", 3),
        ("make_loss,strength:4,_partial_:false", 4),
        ("MyLoss", 1),
        ("MyLoss,strength:5", 5),
    ],
)
@pytest.mark.parametrize("key", ["policy_loss", "advantage_estimator"])
def test_a_function_is_handed_over_and_a_class_is_built(key, node, strength):
    """Hydra would call the function while it builds the algorithm."""
    config = config_of(f"algo.{key}={{_target_:{__name__}.{node}}}")
    check_run(plain(config))
    found = _functions(config.algo)
    assert set(found) == {key}
    assert found[key](3.0, 1.0, None, None) == (2.0 * strength, {})
    assert found[key] is my_loss or node not in ("my_loss", "my_loss,_partial_:true")
    built = instantiate(config.algo, _partial_=True, **found)
    assert built.keywords[key] is found[key]


def test_what_is_no_node_is_left_alone():
    assert _functions(config_of("algo.policy_loss=gspo").algo) == {}
    sentence = refused(_functions, config_of(f"algo.policy_loss={{_target_:{__name__}.my_los}}").algo)
    assert sentence == (
        f"algo.policy_loss._target_: module '{__name__}' has no 'my_los': did you mean {__name__}.my_loss?"
    )


def test_the_keys_of_an_algorithm_are_its_own():
    targets = {name: f"algo._target_=lit_rlhf.algorithms.{name}.{name.upper()}" for name in ALGORITHMS}
    check_config(with_values(targets["dapo"], "algo.max_rounds=2"))
    sentence = refused(check_config, with_values(targets["grpo"], "algo.max_rounds=2"))
    assert sentence.startswith("unknown key 'algo.max_rounds'; ")
    assert refused(check_config, with_values(targets["sft"], "algo.group_size=8")).startswith(
        "unknown key 'algo.group_size'; "
    )
    sentence = refused(check_config, with_values("algo._target_=lit_rlhf.DAPO", "algo.max_round=2"))
    assert sentence == "unknown key 'algo.max_round'; did you mean 'max_rounds'?"


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ({"loss_agg": "tokens"}, "algo.loss_agg must be one of token-mean, seq-mean-token-mean, "),
        ({"kl_estimator": "k9"}, "algo.kl_estimator must be one of k1, k2, k3, full, got 'k9'"),
        ({"scale_rewards": "yes"}, "algo.scale_rewards must be one of std, none, batch, got 'yes'"),
        ({"lr_schedule": "flat"}, "algo.lr_schedule must be one of constant, linear, cosine, got 'flat'"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_before_anything_is_sampled(argument, sentence):
    assert refused(lambda: build(GRPO, **argument)).startswith(sentence)
