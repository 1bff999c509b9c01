"""The pipeline: stages are run once each, in order, and what they brought is read from what they logged."""

import json
import os
import signal
from pathlib import Path
from typing import ClassVar

import pytest

from lit_rlhf import pipeline, subprocesses
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


class Process:
    """In place of a run: it leaves a model unless its folder's name is given another exit code."""

    started: ClassVar[list] = []
    codes: ClassVar[dict] = {}
    signals: ClassVar[list] = []

    def __init__(self, command, env):
        self.folder = Path(next(a for a in command if a.startswith("hydra.run.dir=")).partition("=")[2])
        self.started.append((command[3:], env))

    def wait(self, timeout=None):
        code = self.codes.get(self.folder.name, 0)
        if isinstance(code, list):  # one answer after the other
            code = code.pop(0)
        if isinstance(code, BaseException):
            raise code
        if code == 0:
            (self.folder / "model").mkdir(parents=True)
            (self.folder / "model" / "config.json").touch()
        return max(code, 0) if code != NO_MODEL else 0

    def terminate(self):
        self.signals.append("terminate")

    def kill(self):
        self.signals.append("kill")


NO_MODEL = -99


@pytest.fixture
def started(monkeypatch):
    """The processes that were started, in place of real ones."""
    monkeypatch.setattr(subprocesses.subprocess, "Popen", Process)
    for found in (Process.started, Process.codes, Process.signals):
        found.clear()
    return Process


def test_stages_run_in_order_and_those_finished_not_again(tmp_path, started):
    stages = [stage(tmp_path, "sft"), stage(tmp_path, "policy", "ppo")]
    pipeline.run_stages(stages)
    assert [c[0][0] for c in started.started] == ["algo=sft", "algo=ppo"]
    assert [c[1]["WANDB_NAME"] for c in started.started] == ["sft", "policy"]
    pipeline.run_stages(stages)
    assert len(started.started) == 2


def test_a_failed_stage_ends_the_pipeline_and_goes_on_from_its_checkpoint(tmp_path, started):
    stages = [stage(tmp_path, "sft"), stage(tmp_path, "policy", "ppo")]
    started.codes["policy"] = 3
    with pytest.raises(
        InputError, match=f"the stage policy failed with exit code 3; .*hydra.run.dir={tmp_path} begins that stage anew"
    ):
        pipeline.run_stages(stages)
    stages[1].checkpoint.parent.mkdir(parents=True)
    stages[1].checkpoint.touch()
    started.codes.clear()
    pipeline.run_stages(stages)
    assert [c[0][0] for c in started.started] == ["algo=sft", "algo=ppo", "algo=ppo"]
    assert f"ckpt_path={stages[1].checkpoint}" in started.started[-1][0]
    assert not any(a.startswith("ckpt_path") for a in started.started[0][0])


def test_a_stage_that_left_no_model_is_not_finished(tmp_path, started):
    stages = [stage(tmp_path, "sft")]
    started.codes["sft"] = NO_MODEL
    with pytest.raises(InputError, match="has left no model"):
        pipeline.run_stages(stages)
    assert not stages[0].finished


def test_an_interrupt_waits_for_the_stage_and_a_second_one_ends_it(tmp_path, started):
    for answers, sent in (([KeyboardInterrupt(), 1], []), ([KeyboardInterrupt(), KeyboardInterrupt(), 9], ["kill"])):
        started.codes["sft"], started.signals[:] = answers, []
        with pytest.raises(InputError, match=r"the stage sft .*begins that stage anew"):
            pipeline.run_stages([stage(tmp_path, "sft")])
        assert started.signals == sent


def test_what_a_scheduler_stops_stops_the_stage_as_well(tmp_path, started):
    class Terminated(Process):
        def wait(self, timeout=None):
            if timeout is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return 143

    subprocesses.subprocess.Popen = Terminated
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InputError, match="the stage sft was stopped"):
        pipeline.run_stages([stage(tmp_path, "sft")])
    assert started.signals == ["terminate"]
    assert signal.getsignal(signal.SIGTERM) is before


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
    run.note(3.0, finished=False)
    run.note(4.0, finished=True)
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
    run.note(1.0, finished=True)
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
        (["dry_run=true"], "in the stage sft: dry_run=true would leave no model for the next stage"),
        (["pipeline.reward=null"], "unknown key 'pipeline.reward'; did you mean 'reward_model'"),
        (["pipeline.policy=gpro"], "did you mean"),
        (["sft=null"], "write pipeline.sft=null"),
        (
            ["policy.data.path=nowhere.jsonl", "sft.data=arithmetic", "reward_model.data=arithmetic"],
            "nowhere.jsonl does not",
        ),
        (["seed=1,2"], "only the choices of pipeline can be swept"),
    ],
)
def test_a_mistake_in_any_stage_is_said_before_the_first_is_run(tmp_path, arguments, said):
    ended = new_process(*arguments, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, command=("-m", "lit_rlhf.pipeline"))
    assert said in ended.sentence()
    assert not list(tmp_path.glob("run/[sp]*"))


@pytest.mark.slow
def test_three_stages_from_the_command_line(tmp_path):
    """Small ones: what each makes is what the next one takes, and the policy is judged by the verifier all the same."""
    one = ("trainer.devices=1", "trainer.strategy=auto", "logger.wandb=null")
    arguments = ("debug=tiny", *one, f"hydra.run.dir={tmp_path}/run", "sft.trainer.max_steps=3")
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
