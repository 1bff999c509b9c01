"""The Python code in README and docs runs as it stands: the README's recipes in `test_recipes.py`, all else here."""

import ast
import re
from pathlib import Path

import lightning.pytorch
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf import DAPO

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RECIPES = README.read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
FILES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (file, code)
    for file in FILES
    for code in re.findall(r"```python\n(.*?)```", file.read_text(), flags=re.DOTALL)
    if file != README or code not in RECIPES
]
SHORT = {"max_epochs": None, "max_steps": 1, "accelerator": "cpu", "logger": False, "limit_val_batches": 0}
SHORT |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def numbers_of(line):
    """What a line such as `f(x)  # [1.0, 2.0]` says that it gives; None where it says nothing of the kind."""
    said = re.search(r"  # (\[[-\d., ]+\])$", line)
    return said and ast.literal_eval(said[1])


def test_the_search_finds_code_beside_the_recipes():
    assert {file.name for file, _ in BLOCKS} >= {"README.md", "data.md", "options.md"}
    assert sum(numbers_of(line) is not None for _, code in BLOCKS for line in code.splitlines()) >= 1


@pytest.mark.parametrize(("file", "code"), BLOCKS, ids=[f"{file.name}-{i}" for i, (file, _) in enumerate(BLOCKS)])
def test_it_runs(file, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = lightning.pytorch.Trainer
    monkeypatch.setattr(lightning.pytorch, "Trainer", lambda **given: trainer(**{**given, **SHORT}))
    if "RUN/checkpoints/last.ckpt" in code:
        Path("RUN/checkpoints").mkdir(parents=True)
        state = DAPO(policy="tiny").state_dict()
        torch.save({"state_dict": {name: weight + 1 for name, weight in state.items()}}, "RUN/checkpoints/last.ckpt")
    exec(compile(code, file.name, "exec"), scope := {"__name__": "__main__"})
    for line in code.splitlines():
        if (said := numbers_of(line)) is not None:
            assert eval(line, scope).tolist() == pytest.approx(said, abs=1e-4)
    if "export(module" in code:
        exported = AutoModelForCausalLM.from_pretrained("model").state_dict()
        assert exported["lm_head.weight"].mean() > 0.5, "the checkpoint's, each of whose weights is 1 more"
