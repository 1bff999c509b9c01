"""Every name that `algo=` takes, from the command line to its exported model."""

import pytest

from tests.runs import QUIET, fork, metrics_of
from tests.test_config import ALGORITHMS

NAMES = [
    *("sft", "reward_modeling", "dpo", "ipo", "hinge_dpo", "robust_dpo", "ppo", "conservative_ppo", "grpo", "dr_grpo"),
    *("dapo", "gspo", "rloo", "reinforce", "reinforce_pp", "remax", "cispo", "importance_sampling"),
]


def test_there_is_a_yaml_for_every_name():
    assert set(NAMES) <= set(ALGORITHMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_it_runs_from_the_command_line(tmp_path, name):
    folder = tmp_path / "run"
    ended = fork(f"algo={name}", "debug=tiny", f"hydra.run.dir={folder}", *QUIET, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == str(folder)
    assert (folder / "model" / "config.json").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    losses = [row["loss/loss"] for row in metrics_of(folder) if "loss/loss" in row]
    assert losses, "nothing was trained"
