"""`help(DAPO)`: objective, choice, example, every argument with its default, hooks; of a user's subclass likewise."""

import ast
import inspect
import pydoc
import re
import sys
from functools import partial

import lightning.pytorch
import pytest
from typing_extensions import Unpack

import lit_rlhf
from lit_rlhf import DAPO, DPO, GRPO, OnPolicyModule
from lit_rlhf.algorithms.documentation import arguments
from lit_rlhf.algorithms.on_policy import OnPolicyArgs
from tests.helpers import NumberTokenizer, sum_of_ids, tiny_model
from tests.test_config import PARTS
from tests.test_layers import algorithms

ALGORITHMS = sorted(set(algorithms()), key=lambda cls: cls.__name__)
EITHER_WAY = {"importance_clip_min", "importance_clip_max", "staleness_decay"}  # of ImportanceSampling: by clip_ratio
IDLE = pytest.mark.filterwarnings("ignore:.*has no effect")
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda cls: cls.__name__)


def documented_defaults(doc):
    """`{argument: default}` from lines such as `lr (float | None = None): ...`, however they are wrapped."""
    items = re.findall(r"^ {4}(\w+) \(((?:.|\n {8})*?)\)(?:: \S|$)", doc, flags=re.MULTILINE)
    return {name: kind.partition("=")[2].strip() for name, kind in items}


def settings(value):
    """The plain settings inside of a module and its parts."""
    if isinstance(value, (bool, int, float, str, tuple, type(None))):
        return value
    if type(value).__module__.startswith("lit_rlhf") and hasattr(value, "__dict__"):
        return {name: settings(inner) for name, inner in vars(value).items() if name not in ("models", "encoder")}
    return type(value).__name__


@each_algorithm
def test_help_teaches_in_this_order(algorithm):
    doc = inspect.getdoc(algorithm)
    objective = inspect.cleandoc(sys.modules[algorithm.__module__].__doc__)
    expected = [objective, "Choose it ", "Example:\n", "Args:\n", "Hooks, to override in a subclass:\n"]
    places = [doc.index(part) for part in expected]
    assert places == sorted(places)
    assert doc.index("\n\n") < places[0] < 200, "a sentence, then the objective"
    assert not re.search(r"^ {4}\*\*", doc, flags=re.MULTILINE), "the arguments themselves, not where to look for them"
    shown = pydoc.plain(pydoc.render_doc(algorithm))
    assert shown.index("Choose it ") < shown.index("Method resolution order")


@each_algorithm
def test_every_argument_is_explained(algorithm):
    known = arguments(algorithm)
    accepted = set(inspect.signature(algorithm).parameters)
    written = inspect.signature(algorithm.__init__).parameters
    own = {name for name, parameter in written.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert own <= accepted
    assert accepted == set(known) == set(documented_defaults(algorithm.__doc__))
    assert {name for name, argument in known.items() if len(argument.text) < 8} == set()
    if issubclass(algorithm, OnPolicyModule):
        assert accepted == own | set(OnPolicyArgs.__annotations__)
        assert {argument.home for argument in known.values()} >= set(PARTS)


@IDLE
@each_algorithm
def test_the_defaults_of_the_help_are_those_in_effect(algorithm):
    """A module built with all of them has the settings of one that is built with none."""
    given = {"policy": tiny_model(), "tokenizer": NumberTokenizer(), "reward_funcs": [sum_of_ids]}
    documented = documented_defaults(algorithm.__doc__)
    without = {name for name, text in documented.items() if not text}
    assert without == (EITHER_WAY if algorithm.__name__ == "ImportanceSampling" else set())
    named = {name: ast.literal_eval(text) for name, text in documented.items() if text and name != "engine"}
    assert documented["engine"] == "TransformersEngine"
    parameters = inspect.signature(algorithm).parameters
    assert {name: parameters[name].default for name in named} == named
    usual, explicit = algorithm(**given), algorithm(**{**named, **given})
    assert settings(usual) == settings(explicit)
    attributes = {name: settings(getattr(usual, name, None)) for name in named}
    checked = [name for name, value in attributes.items() if type(value) is type(named[name]) and value is not None]
    assert {name: attributes[name] for name in checked} == {name: named[name] for name in checked}
    assert len(checked) >= 7


def test_a_default_is_the_algorithms_own():
    defaults = {algorithm.__name__: documented_defaults(algorithm.__doc__) for algorithm in ALGORITHMS}
    assert (defaults["PPO"]["update_epochs"], defaults["GRPO"]["update_epochs"]) == ("4", "1")
    assert (defaults["PPO"]["value"], defaults["GRPO"]["value"]) == ("'separate'", "'none'")
    assert defaults["GSPO"]["policy_loss"] == "'gspo'"
    assert defaults["RLOO"]["kl_in"] == "'reward'"


@each_algorithm
def test_the_example_runs(algorithm, monkeypatch):
    code = algorithm.__doc__.split("Example:\n")[1].split("\nArgs:")[0]
    short = {"max_epochs": None, "max_steps": 1, "accelerator": "cpu", "logger": False, "limit_val_batches": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.pytorch.Trainer
    found = []
    monkeypatch.setattr(
        lightning.pytorch, "Trainer", lambda **given: found.append(trainer(**{**given, **short, **quiet})) or found[0]
    )
    exec(inspect.cleandoc(code), scope := {})
    assert type(scope["module"]) is algorithm
    assert found[0].global_step == 1


def test_the_hooks_are_those_of_the_family():
    hooks = {cls.__name__: cls.__doc__.split("Hooks, to override in a subclass:\n")[1] for cls in ALGORITHMS}
    for name in ("shape_rewards(rollout)", "compute_advantages(rollout)", "compute_loss(scores, batch)", "gather("):
        assert name in hooks["DAPO"]
    assert "compare(batch) -> Comparison" in hooks["DPO"]
    assert "compute_loss" not in hooks["DPO"] + hooks["SFT"]


class Silent(DAPO):
    pass


class Median(DAPO):
    """DAPO with a median baseline.

    Robust to one lucky sample.
    """

    clip_ratio_high = 1.0  # nothing: the constructor has the default
    update_epochs = 3


class Stronger(DAPO):
    """DAPO, stronger.

    Args:
        strength: how strong.
        seed: a seed of its own.
    """

    def __init__(self, *, strength: float = 2.0, kl_coef: float = 0.5, unsaid: int = 1, **rest) -> None:
        super().__init__(kl_coef=kl_coef, **rest)


class Fewer(OnPolicyModule):
    """A new algorithm."""

    def __init__(self, *, margin: float = 1.0, **on_policy: "Unpack[OnPolicyArgs]") -> None:
        super().__init__(**on_policy)


def test_a_users_subclass_is_described_too():
    usual = documented_defaults(DAPO.__doc__)
    assert documented_defaults(Silent.__doc__) == usual
    assert documented_defaults(Median.__doc__) == {**usual, "update_epochs": "3"}
    assert Median.__doc__.startswith("DAPO with a median baseline.\n\nRobust to one lucky sample.\n\nArgs of `DAPO`:\n")
    stronger = documented_defaults(Stronger.__doc__)
    assert stronger == {**usual, "strength": "2.0", "kl_coef": "0.5", "seed": "", "unsaid": "1"}
    assert "    strength (float = 2.0): how strong.\n" in Stronger.__doc__
    assert "    kl_coef (float = 0.5): weight of a KL term" in Stronger.__doc__
    assert "    unsaid (int = 1)\n" in Stronger.__doc__
    fewer = documented_defaults(Fewer.__doc__)
    assert "margin" in fewer
    assert not {"clip_ratio_low", "kl_coef", "reference"} & set(fewer), "what its TypedDict has not, it does not take"


def test_the_signature_is_that_of_the_class_alone():
    assert list(inspect.signature(Median).parameters) == list(inspect.signature(DAPO).parameters)
    assert "strength" in inspect.signature(Stronger).parameters
    assert "strength" not in inspect.signature(DAPO).parameters
    assert inspect.signature(partial(DAPO, seed=1)).parameters["seed"].default == 1


def test_an_unknown_argument_is_answered_with_the_nearest():
    with pytest.raises(TypeError, match=r"^GRPO has no argument 'group_sise'; did you mean 'group_size'\?$"):
        GRPO(policy=tiny_model(), tokenizer=NumberTokenizer(), group_sise=3)
    with pytest.raises(TypeError, match=r"^Stronger has no argument 'strenght'; did you mean 'strength'"):
        Stronger(strenght=3)
    with pytest.raises(TypeError, match=r"^DPO has no argument 'group_size'; known: batch_size, beta,"):
        DPO(group_size=8)


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("from lit_rlhf import Dapo", "has no attribute 'Dapo'; did you mean 'DAPO'?"),
        ("from lit_rlhf import RewardModelling", "did you mean 'RewardModeling'?"),
        ("from lit_rlhf import GRPO, Trainer", "has no attribute 'Trainer'; known: CISPO, ConservativePPO, DAPO"),
    ],
)
def test_a_wrong_import_names_the_nearest(statement, sentence):
    with pytest.raises(ImportError, match=re.escape(sentence)):
        exec(statement, {})


def test_what_is_no_attribute_is_none_in_the_usual_way():
    assert not hasattr(lit_rlhf, "Dapo")
    assert not hasattr(lit_rlhf, "__path_of_nothing__")
    exec("from lit_rlhf import errors, functional\nfrom lit_rlhf import *", scope := {})
    assert set(lit_rlhf.__all__) | {"errors", "functional"} <= set(scope)
