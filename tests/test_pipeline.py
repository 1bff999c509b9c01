"""The pipeline: stages are run once each, in order, and what they brought is read from what they logged."""

import json
import subprocess

import pytest

from lit_rlhf import pipeline
from lit_rlhf.errors import InputError
from lit_rlhf.stage_results import curves_of, draw, results_of, table
from lit_rlhf.stages import Stage
from tests.runs import new_process


def stage(folder, name, algorithm="sft"):
    return Stage(name, algorithm, (f"algo={algorithm}",), folder / name)


def write_metrics(folder, name, **columns):
    folder.mkdir(exist_ok=True)
    rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (folder / name).write_text("\n".join(rows) + "\n")


@pytest.fixture
def started(monkeypatch):
    """The commands that were started, in place of processes; each ends with the code its algorithm is given."""
    commands, codes = [], {}

    def run(command, env):
        folder = next(a for a in command if a.startswith("hydra.run.dir=")).partition("=")[2]
        pipeline.Path(folder).mkdir(parents=True, exist_ok=True)
        commands.append((command[3:], env))
        return subprocess.CompletedProcess(command, codes.get(pipeline.Path(folder).name, 0))

    monkeypatch.setattr(pipeline.subprocess, "run", run)
    run.commands, run.codes = commands, codes
    return run


def test_stages_run_in_order_and_those_finished_not_again(tmp_path, started):
    stages = [stage(tmp_path, "sft"), stage(tmp_path, "policy", "ppo")]
    pipeline.run_stages(stages)
    assert [c[0][0] for c in started.commands] == ["algo=sft", "algo=ppo"]
    assert [c[1]["WANDB_NAME"] for c in started.commands] == ["sft", "policy"]
    pipeline.run_stages(stages)
    assert len(started.commands) == 2


def test_a_failed_stage_ends_the_pipeline_and_goes_on_from_its_checkpoint(tmp_path, started):
    stages = [stage(tmp_path, "sft"), stage(tmp_path, "policy", "ppo")]
    started.codes["policy"] = 3
    with pytest.raises(InputError, match=f"the stage policy failed with exit code 3; .*hydra.run.dir={tmp_path}"):
        pipeline.run_stages(stages)
    stages[1].checkpoint.parent.mkdir()
    stages[1].checkpoint.touch()
    started.codes.clear()
    pipeline.run_stages(stages)
    assert [c[0][0] for c in started.commands] == ["algo=sft", "algo=ppo", "algo=ppo"]
    assert f"ckpt_path={stages[1].checkpoint}" in started.commands[-1][0]
    assert not any(a.startswith("ckpt_path") for a in started.commands[0][0])


def test_what_was_made_from_a_former_stage_is_not_taken_for_new(tmp_path, started):
    stages = [stage(tmp_path, "sft"), stage(tmp_path, "policy", "ppo")]
    pipeline.run_stages(stages)
    (stages[0].folder / "stage.json").unlink()
    with pytest.raises(InputError, match="policy was made from a former stage sft; remove it"):
        pipeline.run_stages(stages)


def test_results_are_the_first_and_the_last_value_also_of_a_continued_run(tmp_path):
    run = stage(tmp_path, "policy", "ppo")
    steps = {"step": [0, 10, 20], "val/accuracy_sampled": [0.25, "", 0.5], "val/reward_sampled": [-1.5, "", 0.5]}
    write_metrics(run.folder, "metrics.1.csv", **steps)
    write_metrics(run.folder, "metrics.csv", **{"step": [20, 30], "val/accuracy_sampled": [0.75, 1.0]})
    run.finish(7.0)
    assert curves_of(run)["val/accuracy_sampled"] == [(0, 0.25), (20, 0.75), (30, 1.0)]
    result = results_of([run])["policy"]
    assert result["held_out"]["val/accuracy_sampled"] == {"before": 0.25, "after": 1.0}
    assert result["held_out"]["val/reward_sampled"] == {"before": -1.5, "after": 0.5}
    lines = table({"policy": result}).splitlines()
    assert lines[1].split() == ["policy", "ppo", "7", "sampled", "accuracy", "0.250", "1.000"]
    assert lines[2].split() == ["mean", "reward", "-1.500", "0.500"]


def test_a_reward_that_is_the_accuracy_is_told_once(tmp_path):
    run = stage(tmp_path, "sft")
    same = [0.25, 0.5]
    write_metrics(
        run.folder, "metrics.csv", **{"step": [0, 9], "val/accuracy_sampled": same, "val/reward_sampled": same}
    )
    assert list(curves_of(run)) == ["val/accuracy_sampled"]


def test_a_stage_without_held_out_data_has_an_empty_line(tmp_path):
    run = stage(tmp_path, "sft")
    run.folder.mkdir()
    run.finish(1.0)
    assert table(results_of([run])).splitlines()[1].split() == ["sft", "sft", "1", "-", "-", "-"]


def test_the_figure_has_a_panel_for_each_stage(tmp_path):
    stages = [stage(tmp_path, "sft"), stage(tmp_path, "policy", "ppo")]
    write_metrics(stages[0].folder, "metrics.csv", **{"step": [0, 9], "val/accuracy_sampled": [0.1, 0.5]})
    write_metrics(stages[1].folder, "metrics.csv", **{"step": [0, 9], "val/reward_sampled": [-2, 3]})
    draw(stages, tmp_path / "pipeline.png")
    assert (tmp_path / "pipeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["policy.algo.clip_ratio=1"], "in the stage policy: unknown key 'algo.clip_ratio'"),
        (["sft.algo.lr=much"], "in the stage sft: 'algo.lr' must be float"),
        (["pipeline.reward=null"], "unknown key 'pipeline.reward'; did you mean 'reward_model'"),
        (["pipeline.policy=gpro"], "did you mean"),
        (["sft=null"], "unknown key 'sft'"),
    ],
)
def test_a_mistake_in_any_stage_is_said_before_the_first_is_run(tmp_path, arguments, said):
    ended = new_process(*arguments, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, command=("-m", "lit_rlhf.pipeline"))
    assert said in ended.sentence()
    assert not list(tmp_path.glob("run/[sp]*"))


@pytest.mark.slow
def test_three_stages_from_the_command_line(tmp_path):
    """Small ones: what each makes is what the next one takes, and the policy is judged by the verifier all the same."""
    arguments = ("debug=tiny", "logger.wandb=null", f"hydra.run.dir={tmp_path}/run", "sft.trainer.max_steps=3")
    ended = new_process(*arguments, cwd=tmp_path, command=("-m", "lit_rlhf.pipeline"))
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"{tmp_path}/run"
    results = json.loads((tmp_path / "run" / "pipeline.json").read_text())
    assert list(results) == ["sft", "reward_model", "policy"]
    assert "val/preference_accuracy" in results["reward_model"]["held_out"]
    assert {"val/accuracy_sampled", "val/reward_sampled"} <= set(results["policy"]["held_out"])
    assert (tmp_path / "run" / "pipeline.png").exists()
    again = new_process(*arguments, cwd=tmp_path, command=("-m", "lit_rlhf.pipeline"))
    assert again.out.count("finished before") == 3
