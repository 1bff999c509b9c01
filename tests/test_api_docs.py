"""Every public name is documented: what it is, shapes of tensors, what it raises, where a formula is from, numbers."""

import ast
import dataclasses
import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest
from torchmetrics import Metric

from lit_rlhf import functional, metrics
from lit_rlhf.models.scoring import Scores
from lit_rlhf.types import Rollout

EXPORTING = ("", "functional", "metrics", "rewards", "data", "types", "registry", "rollouts.engines")
ALONE = ("compare", "loggers", "strategies", "workspace", "monitoring.healthy", "monitoring.run_folder")  # modules
WHOLE = ("models", "callbacks")  # packages that export nothing: every public name of their modules
SHAPE = r"`\[[^\]`\"]+\]`|\[[\d.]*[NTVBGHKF](, [\dNTVBGHKF]+)*\]|\b[Ss]calars?\b|any shape|\b[Ss]hapes"
SOURCE = r"arXiv \d{4}\.\d{4,5}|\d{4}\.\d{4,5}|\b(19|20)\d\d\b"
# definitions, which nobody's paper proposes, and counts
DEFINITIONS = {"aggregation_unit", "masked_mean", "token_logprobs", "token_entropy", "exact_kl", "explained_variance"}
DEFINITIONS |= {"clip_statistics", "mean_interval"}


def exported(name):
    module = importlib.import_module(f"lit_rlhf.{name}".rstrip("."))
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    found = {n: getattr(module, n) for n in names}
    return {n: thing for n, thing in found.items() if getattr(thing, "__module__", "").startswith("lit_rlhf")}


def public():
    """Every public class and function, by where it stands."""
    found = [thing for package in EXPORTING + ALONE for thing in exported(package).values()]
    for package in WHOLE:
        for info in pkgutil.iter_modules(importlib.import_module(f"lit_rlhf.{package}").__path__):
            module = importlib.import_module(f"lit_rlhf.{package}.{info.name}")
            here = [thing for n, thing in vars(module).items() if not n.startswith("_")]
            found += [thing for thing in here if getattr(thing, "__module__", None) == module.__name__]
    return {f"{t.__module__}.{t.__qualname__}": t for t in found if inspect.isclass(t) or inspect.isfunction(t)}


def functions_of(thing):
    """The function itself, or the class's own public methods and properties, by name."""
    if inspect.isfunction(thing):
        return {thing.__name__: thing}
    methods = {n: getattr(m, "fget", None) or getattr(m, "__func__", m) for n, m in vars(thing).items()}
    return {n: inspect.unwrap(m) for n, m in methods.items() if inspect.isroutine(m) and not n.startswith("_")}


def said_of(thing, name):
    """What `help` says of a function or method: its own docstring and those of what it overrides."""
    if inspect.isfunction(thing):
        return thing.__doc__ or ""
    ours = [base for base in thing.__mro__ if base.__module__.startswith("lit_rlhf")]
    found = [inspect.getdoc(vars(base)[name]) or "" for base in ours if name in vars(base)]
    return "\n".join(found)


PUBLIC = public()
FUNCTIONAL = {name: getattr(functional, name) for name in functional.__all__}
METRICS = {name: getattr(metrics, name) for name in metrics.__all__ if inspect.isclass(getattr(metrics, name))}


def every_function():
    """(where, the class or function itself, the name of a method, the function)."""
    for name, thing in PUBLIC.items():
        for method, function in functions_of(thing).items():
            yield f"{name}.{method}" if inspect.isclass(thing) else name, thing, method, function


def test_the_search_finds_the_public_names():
    assert len(PUBLIC) > 110
    for name in ("algorithms.dapo.DAPO", "models.loading.load_causal_lm", "rewards.verifiers.exact_match"):
        assert f"lit_rlhf.{name}" in PUBLIC
    assert len(METRICS) >= 12
    assert all(issubclass(metric, Metric) for metric in METRICS.values())


def test_each_has_a_docstring_and_so_have_its_methods():
    own = {name: vars(t).get("__doc__") if inspect.isclass(t) else t.__doc__ for name, t in PUBLIC.items()}
    assert [name for name, text in own.items() if len((text or "").split()) < 4] == []
    functions = list(every_function())
    assert len(functions) > 300
    assert [where for where, *_, function in functions if len((function.__doc__ or "").split()) < 2] == []


def test_shapes_of_tensors_are_stated():
    with_tensors, unstated = 0, []
    for where, thing, method, function in every_function():
        annotations = " ".join(map(str, function.__annotations__.values()))
        if re.search(r"\bTensor\b", annotations):
            with_tensors += 1
            typed = re.search(r"(Float|Int|Bool)\[", annotations)
            unstated += [] if typed or re.search(SHAPE, said_of(thing, method)) else [where]
    assert with_tensors > 80
    assert unstated == []


def test_help_of_a_batch_states_the_shapes_of_its_tensors_inherited_ones_too():
    found, unstated = 0, []
    for name, thing in PUBLIC.items():
        batch = dataclasses.is_dataclass(thing) and name.startswith("lit_rlhf.types")
        for field in dataclasses.fields(thing) if batch else ():
            if "Tensor" in str(field.type):
                found += 1
                stated = re.search(rf"^    {field.name} \(Tensor[^)]*\): `?\[.*\]", thing.__doc__, flags=re.MULTILINE)
                unstated += [] if stated else [f"{name}.{field.name}"]
    assert found > 70
    assert unstated == []
    assert "    kl (Tensor | None): [N, T] nats, exact KL(policy, reference)" in Scores.__doc__
    rows = Rollout.__doc__.split("Fields:\n")[1].splitlines()
    assert [row.split()[0] for row in rows] == [field.name for field in dataclasses.fields(Rollout)]
    assert "    truncated (Tensor): [N] bool, ended by max_new_tokens and not by EOS or a stop token" in rows


def test_what_is_raised_is_said():
    found, unsaid = 0, []
    for where, thing, method, function in every_function():
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        for error in {ast.unparse(call.func) for call in raised} - {"NotImplementedError", "AttributeError"}:
            found += 1
            unsaid += [] if error in said_of(thing, method) else [f"{where}: {error}"]
    assert found > 40
    assert unsaid == []


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_a_formula_has_its_source(name):
    text = FUNCTIONAL[name].__doc__
    assert name in DEFINITIONS or re.search(SOURCE, text)
    assert name not in DEFINITIONS or not re.search(r"arXiv", text), "it has a source: take it off the list"


def doctests(thing):
    """The doctests of its own docstring: what is run and what is expected."""
    examples = doctest.DocTestParser().get_examples(thing.__doc__ or "")
    return [example for example in examples if not example.options.get(doctest.SKIP)]


@pytest.mark.parametrize("name", [*FUNCTIONAL, *METRICS])
def test_its_doctest_prints_numbers(name):
    thing = FUNCTIONAL.get(name) or METRICS[name]
    found = [example for example in doctests(thing) if re.search(r"\d|'tokens'", example.want)]
    assert found, "a doctest whose result is a number"
    assert any(name.split(".")[-1] in example.source for example in doctests(thing))


@functools.cache
def options():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    return text.split("[tool.pytest.ini_options]")[1].split("\n[")[0]


def test_doctests_run_by_default():
    assert '"lit_rlhf"' in re.search(r"testpaths = (.*)", options())[1]
    assert "--doctest-modules" in re.search(r"addopts = (.*)", options())[1]
