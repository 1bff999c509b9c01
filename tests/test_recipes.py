"""The README's recipes, followed as they stand: each file is written, each command is run, in one folder and in order.

Runs are shortened (`shortened`), nothing else is changed; then what a new user would look for is looked for.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lit_rlhf.monitoring.run_folder import RunFolder
from tests.runs import metrics_of

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = README.split("\n## Recipes\n")[1].split("\n## ")[0]
RECIPES = dict(re.findall(r"\n### ([^\n]+)\n(.*?)(?=\n### |\Z)", SECTION, flags=re.DOTALL))
BLOCK = re.compile(r"```(python|bash)\n(.*?)```", re.DOTALL)
TASKS = [
    "Your own reward",
    "Your own data",
    "Another clip range",
    "Your own advantage",
    "Stop and resume",
    "LoRA",
    "Two processes, FSDP, several machines",
    "DPO",
    "Evaluate",
    "Take the model away",
    "Compare algorithms",
]


def shortened(script):
    """Two rollouts instead of hundreds, a fiftieth of those that a command names, and sixteen rows to validate on."""
    lines = []
    for line in script.splitlines():
        if "lit_rlhf.train" in line:
            line = re.sub(r"max_epochs=(\d+)", lambda n: f"max_epochs={int(n[1]) // 50 or n[1]}", line)
            line += " data.held_out=16" + ("" if "max_epochs" in line else " trainer.max_epochs=2")
        elif "lit_rlhf.evaluate" in line:
            line += " limit=16 samples=2"
        lines.append(line)
    return "\n".join(lines)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """What each recipe printed, and the folder they left their files in."""
    folder = tmp_path_factory.mktemp("recipes")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    printed = {}
    for name in TASKS:
        for kind, text in BLOCK.findall(RECIPES[name]):
            if kind == "python":
                (folder / re.match(r"# (\w+\.py)\n", text)[1]).write_text(text)
                continue
            script = ["bash", "-ec", shortened(text)]
            done = subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
            printed[name] = printed.get(name, "") + done.stdout
    return printed, folder


def rows(folder, key):
    return [row[key] for row in metrics_of(folder) if key in row]


def weights(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
class TestRecipes:
    def test_the_reward_is_the_users(self, followed):
        rewards = rows(followed[1] / "runs/even", "rewards/even")
        assert rewards == rows(followed[1] / "runs/even", "reward/reward_mean")
        assert all(0.2 < reward < 0.8 for reward in rewards), "about half of all numbers are even"
        assert "val/accuracy_sampled: " in followed[0]["Your own reward"], "the data's own verifier is still asked"

    def test_the_prompts_are_the_users(self, followed):
        samples = (followed[1] / "runs/mine/samples.jsonl").read_text().splitlines()
        known = {json.loads(line)["prompt"] for line in (followed[1] / "prompts.jsonl").read_text().splitlines()}
        assert {json.loads(line)["prompt"] for line in samples} <= known
        assert rows(followed[1] / "runs/mine", "reward/accuracy")

    def test_the_clip_range_is_the_one_given(self, followed):
        algo = OmegaConf.load(followed[1] / "runs/clip/config/config.yaml").algo
        assert (algo.clip_ratio_low, algo.clip_ratio_high) == (0.1, 0.3)

    def test_the_advantages_are_plus_or_minus_one(self, followed):
        mean, std = (rows(followed[1] / "runs/sign", f"stability/advantage_{of}")[0] for of in ("mean", "std"))
        assert std**2 + mean**2 == pytest.approx(1.0, abs=0.01), "every token has one of the two"

    def test_the_second_command_goes_on_where_the_first_stopped(self, followed):
        read = RunFolder.read(followed[1] / "runs/long")
        assert [row["rollout/iteration"] for row in read.rows if "rollout/iteration" in row] == [1, 2, 3, 4]

    def test_adapters_are_trained_and_merged(self, followed):
        assert (followed[1] / "runs/lora/adapter/adapter_config.json").is_file()
        assert (followed[1] / "runs/lora/model/config.json").is_file()
        names = weights(followed[1] / "runs/lora")["state_dict"]
        assert any("lora_A" in name for name in names)

    def test_two_processes_make_one_run(self, followed):
        folder = followed[1] / "runs/two"
        assert rows(folder, "rollout/iteration") == [1, 2]
        assert OmegaConf.load(folder / "config/config.yaml").trainer.devices == 2
        one, two = (rows(f, "reward/reward_mean")[0] for f in (followed[1] / "runs/long", folder))
        assert one == pytest.approx(two, abs=1e-6), "the first rollout is the same on any number of ranks"

    def test_the_chosen_completions_are_preferred(self, followed):
        assert rows(followed[1] / "runs/dpo", "preference/preference_accuracy")[-1] > 0.5

    def test_the_evaluation_has_intervals(self, followed):
        for name in ("evaluated", "evaluated_mine"):
            metrics = json.loads((followed[1] / "runs" / name / "evaluation.json").read_text())["metrics"]
            assert metrics["accuracy_sampled"]["low"] < metrics["accuracy_sampled"]["high"]

    def test_the_exported_model_adds(self, followed):
        assert followed[0]["Take the model away"].splitlines()[0].startswith("12+7=")
        assert (followed[1] / "runs/exported/model/model.safetensors").is_file()

    def test_the_sweep_ends_with_a_comparison(self, followed):
        assert {"grpo", "rloo"} <= set(re.findall(r"\w+", followed[0]["Compare algorithms"]))


def test_every_recipe_with_a_command_is_followed():
    assert [name for name, text in RECIPES.items() if "```bash" in text] == TASKS
