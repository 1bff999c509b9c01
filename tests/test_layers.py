"""The architecture: imports go downwards only, importing the package is cheap, no algorithm is another's parent."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_rlhf

PACKAGE = Path(lit_rlhf.__file__).parent
LAYERS = (  # lowest first; parts of one layer do not know each other
    {"errors"},
    {"signatures", "durable"},
    {"types", "text", "functional", "config", "hub", "monitoring", "confidential", "versions"},
    {"ranks", "failing", "loggers", "subprocesses"},
    {"registry"},
    {"metrics", "models"},
    {"rewards"},
    {"rollouts", "data"},
    {"sharded_checkpoints"},
    {"callbacks", "checkpoints", "strategies", "evaluation"},
    {"algorithms"},
    {"sweep_jobs", "usage"},
    {"cli", "stages"},
    {"train", "evaluate", "stage_results", "report", "workspace", "compare"},
    {"pipeline", "export", "sweeps"},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
ENTRY_POINTS = {"cli", "train", "evaluate", "export", "pipeline", "sweep_jobs", "sweeps"}
FILES = {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source):
    """The modules that a source imports anywhere, but for those that only a type checker sees."""
    tree = ast.parse(source)
    unseen = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            unseen |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [name for name in submodules if part_of(name) in RANK and name.count(".") == 1]
            yield from inside or [node.module]


def part_of(module):
    return module.removeprefix("lit_rlhf.").split(".")[0]


def upward(importer, source):
    """The imports that a layer may not have."""
    for module in imports_of(source):
        imported = part_of(module)
        if module.split(".")[0] == "lit_rlhf" and imported != importer and RANK[imported] >= RANK[importer]:
            yield module


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_imports_go_downwards(name):
    assert list(upward(part_of(name), FILES[name].read_text())) == []


@pytest.mark.parametrize(
    ("importer", "source", "found"),
    [
        ("rollouts", "from lit_rlhf.algorithms.base import RLHFModule", ["lit_rlhf.algorithms.base"]),
        ("models", "import lit_rlhf.rewards", ["lit_rlhf.rewards"]),
        ("types", "from lit_rlhf import functional as F", ["lit_rlhf.functional"]),
        ("functional", "def f():\n    from lit_rlhf import types", ["lit_rlhf.types"]),
        ("data", "if TYPE_CHECKING:\n    from lit_rlhf.train import train", []),
        ("algorithms", "from lit_rlhf.data import rows\nfrom lit_rlhf.algorithms import base", []),
    ],
)
def test_the_search_for_upward_imports_sees(importer, source, found):
    assert list(upward(importer, source)) == found


@pytest.mark.parametrize("name", [name for name in FILES if part_of(name) == "functional"])
def test_the_mathematics_needs_torch_alone(name):
    outside = {module.split(".")[0] for module in imports_of(FILES[name].read_text())} - {"lit_rlhf"}
    assert outside <= {"torch", "jaxtyping"} | sys.stdlib_module_names
    assert all(part_of(m) == "functional" for m in imports_of(FILES[name].read_text()) if m.startswith("lit_rlhf"))


@pytest.mark.parametrize("name", FILES)
def test_hydra_is_for_the_entry_points(name):
    outside = {module.split(".")[0] for module in imports_of(FILES[name].read_text())}
    assert part_of(name) in ENTRY_POINTS or not outside & {"hydra", "omegaconf"}
    assert name != "train" or "hydra" in outside, "the search sees nothing"


HEAVY = ("torch", "lightning", "transformers", "torchmetrics", "wandb")


@pytest.mark.parametrize("module", ["lit_rlhf", "lit_rlhf.errors", "lit_rlhf.config", "lit_rlhf.cli", "lit_rlhf.train"])
def test_importing_is_cheap(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_resolves_to_what_has_that_name():
    assert {"SFT", "GRPO", "DAPO", "SamplingConfig", "InputError"} <= set(lit_rlhf.__all__)
    assert dir(lit_rlhf) == sorted(lit_rlhf.__all__)
    for name in set(lit_rlhf.__all__) - {"__version__"}:
        assert getattr(lit_rlhf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'GRPOO'"):
        lit_rlhf.GRPOO  # noqa: B018


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {f"{node.module}.{node.names[0].name}" for node in block.body}
    assert declared == {f"{home}.{name}" for name, home in lit_rlhf._HOMES.items()}


def algorithms():
    for name, file in FILES.items():
        if part_of(name) == "algorithms":
            for node in ast.parse(file.read_text()).body:
                if isinstance(node, ast.ClassDef) and node.name in lit_rlhf.__all__ and "Module" not in node.name:
                    yield getattr(lit_rlhf, node.name)


def test_no_algorithm_inherits_from_another():
    found = list(algorithms())
    assert len(found) >= 15, "the search for algorithms has gone blind"
    for algorithm in found:
        ancestors = algorithm.__mro__[1:]
        assert not set(ancestors) & set(found), f"{algorithm.__name__} has an algorithm above it"
        ours = [base for base in ancestors if base.__module__.startswith("lit_rlhf.")]
        assert 1 <= len(ours) <= 2, "at most three levels: the base, the family, the algorithm"


def test_an_algorithm_is_read_in_a_minute():
    """One file of at most 135 lines, in which no variant is chosen by comparing names."""
    for algorithm in algorithms():
        source = inspect.getsource(inspect.getmodule(algorithm))
        assert len(source.splitlines()) <= 135, algorithm.__name__
        assert not re.search(r"if (self\.)?(loss_type|policy_loss|kind|loss_agg) ==", source), algorithm.__name__
