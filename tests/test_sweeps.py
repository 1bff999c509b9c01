"""Sweeps: each run a process of its own in a folder named after it, and at the end a comparison of them all."""

import csv
import json
import re
import signal
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

from lit_rlhf import sweep_jobs
from lit_rlhf.compare import compare, main
from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.comparison import FAILED, LAST, grouped, runs_in
from lit_rlhf.monitoring.run_folder import ENDED, SECONDS
from tests.monitoring.test_report import FINDING, leave_run
from tests.runs import QUIET, fork, metrics_of, new_process


def leave(
    folder, *overrides, held_out=(0.25, 0.75), measure="val/accuracy_sampled", rewards=(0.5,), findings=(), ended=True
):
    """A run's folder, as far as a comparison reads it."""
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "overrides.yaml").write_text("".join(f"- {one}\n" for one in overrides))
    (folder / "config" / "config.yaml").write_text(
        "algo: {_target_: lit_rlhf.GRPO}\nseed: 5\ntrainer: {max_epochs: 200}\n"
    )
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, ["step", "rollout/iteration", "reward/reward_mean", measure])
        rows.writeheader()
        rows.writerow({"step": 0, measure: held_out[0]})
        for n, reward in enumerate(rewards):
            rows.writerow({"step": 4 * n + 3, "rollout/iteration": n + 1, "reward/reward_mean": reward})
        rows.writerow({"step": 4 * len(rewards), measure: held_out[1]})
    (folder / "findings.json").write_text(json.dumps([{**FINDING, "gate": gate} for gate in findings]))
    (folder / "environment.json").write_text(json.dumps({SECONDS: 12.0, ENDED: ended}))
    return folder


def cells(line):
    return re.split(r"  +", line.strip())


# the comparison


def test_a_group_is_told_by_mean_and_spread_over_its_seeds(tmp_path, capsys):
    after = {1: 0.9, 2: 0.7, 3: 0.75}
    rewards = [0.0] * 7 + [float(n) for n in range(LAST)]
    for seed, value in after.items():
        found = ["kl", "clipping"] if seed == 2 else ["kl"]
        leave(
            tmp_path / f"a{seed}", "algo=grpo", f"seed={seed}", held_out=(0.5, value), rewards=rewards, findings=found
        )
    leave(tmp_path / "b", "algo=rloo", "seed=1", held_out=(0.5, 0.6))
    compare([tmp_path], tmp_path)
    head, *lines = capsys.readouterr().out.strip().splitlines()
    assert cells(head) == ["runs", "on held-out data", "before", "after", "reward", "seconds", "findings"]
    spread = f"{mean(after.values()):.3f} ± {stdev(after.values()):.3f}"
    assert cells(lines[0])[:6] == ["grpo", "3", "sampled accuracy", "0.500 ± 0.000", spread, "4.500 ± 0.000"]
    assert cells(lines[0])[6:] == ["12", "clipping (1 of 3), kl"]
    assert cells(lines[1]) == ["rloo", "1", "sampled accuracy", "0.500", "0.600", "0.500", "12", "none"]
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["group"], row["seed"], row["after"], row["findings"]) for row in rows] == [
        ("grpo", "1", "0.9", "kl"),
        ("grpo", "2", "0.7", "kl; clipping"),
        ("grpo", "3", "0.75", "kl"),
        ("rloo", "1", "0.6", ""),
    ]
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "comparison.md").read_text()
    assert f"| grpo | 3 | sampled accuracy | 0.500 ± 0.000 | {spread} |" in page
    assert "(comparison.png)" in page


def test_what_differs_names_the_groups(tmp_path):
    for lr in ("1e-4", "1e-3"):
        for seed in (1, 2):
            leave(tmp_path / f"{lr}{seed}", "algo=grpo", f"seed={seed}", f"++algo.lr={lr}", "debug=tiny")
    leave(tmp_path / "other", "algo=dapo", "debug=tiny")
    names = {group.name: len(group.runs) for group in grouped(runs_in([tmp_path]))}
    assert names == {"grpo algo.lr=1e-4": 2, "grpo algo.lr=1e-3": 2, "dapo": 1}
    alike = runs_in([tmp_path / "1e-41", tmp_path / "1e-42"])
    assert [(group.name, len(group.runs)) for group in grouped(alike)] == [("grpo", 2)]
    assert grouped([*runs_in([leave(tmp_path / "plain")])])[0].name == "GRPO"


def test_families_are_judged_each_by_its_own_measure(tmp_path, capsys):
    leave(tmp_path / "sft", "algo=sft", measure="val/perplexity", held_out=(9.0, 2.0))
    leave(tmp_path / "rm", "algo=reward_modeling", measure="val/preference_accuracy")
    compare([tmp_path], tmp_path)
    lines = {cells(line)[0]: cells(line) for line in capsys.readouterr().out.strip().splitlines()}
    assert lines["sft"][2:5] == ["perplexity", "9.000", "2.000"]
    assert lines["reward_modeling"][2:5] == ["preference accuracy", "0.250", "0.750"]


def test_a_failed_run_is_named_and_not_counted(tmp_path, capsys):
    leave(tmp_path / "one", "algo=grpo", "seed=1", held_out=(0.5, 0.8))
    (leave(tmp_path / "two", "algo=grpo", "seed=2", held_out=(0.5, 0.1)) / FAILED).write_text("it is NaN\n")
    (tmp_path / "three").mkdir()
    (tmp_path / "three" / FAILED).write_text("there is no model\n")
    assert compare([tmp_path], tmp_path).failed == ["two", "three"]
    out = capsys.readouterr().out
    assert re.search(r"grpo +1 of 2 +sampled accuracy +0.500 +0.800", out)
    assert "failed: two: it is NaN" in out
    assert "failed: three: there is no model" in out


def test_a_run_that_did_not_come_to_its_end_is_named_and_not_counted(tmp_path, capsys):
    leave(tmp_path / "one", "algo=grpo", "seed=1", held_out=(0.5, 0.8))
    leave(tmp_path / "two", "algo=grpo", "seed=2", held_out=(0.5, 0.1), rewards=[0.0] * 13, ended=False)
    assert compare([tmp_path], tmp_path).failed == []
    out = capsys.readouterr().out
    assert re.search(r"grpo +1 of 2 +sampled accuracy +0.500 +0.800 +0.500", out)
    assert "unfinished: two: at rollout 13 of 200" in out
    assert "unfinished: two: at rollout 13 of 200" in (tmp_path / "comparison.md").read_text()
    with (tmp_path / "comparison.csv").open() as file:
        assert [row["unfinished"] for row in csv.DictReader(file)] == ["", "at rollout 13 of 200"]


def test_what_compare_cannot_use_is_one_sentence(tmp_path, capsys, monkeypatch):
    run = str(leave_run(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    for arguments, said in (
        ([run, "--out", f"{tmp_path}/file"], f"{tmp_path}/file cannot be used (File exists); --out says where"),
        ([run, "--out", f"{tmp_path}/file/below"], f"{tmp_path}/file/below cannot be used (Not a directory)"),
        ([f"{tmp_path}/file"], f"{tmp_path}/file is a file; give the folder of the run that it lies in"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err.startswith(f"error: {said}")


def test_without_matplotlib_it_says_what_brings_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    compare([leave(tmp_path / "run", "algo=grpo")], tmp_path)
    assert "no figure: it needs the package matplotlib: pip install 'lit_rlhf[plots]'" in capsys.readouterr().out
    assert "png" not in (tmp_path / "comparison.md").read_text()


def test_earlier_runs_are_compared_by_a_command_of_its_own(tmp_path, capsys, monkeypatch):
    for name in ("a", "b"):
        leave_run(tmp_path / name)
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", f"{tmp_path}/new"])
    main()
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/new"
    assert (tmp_path / "new" / "comparison.csv").exists()
    for folder, said in ((tmp_path / "nowhere", "there is no folder"), (tmp_path / "a" / "config", "holds no run")):
        with pytest.raises(InputError, match=said):
            runs_in([folder])


# the sweep


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["-m", "algo=grpo,dapo", "seed=1,2", "debug=tiny"], "'algo','seed'"),
        (["-m", "++algo.lr=1e-4,1e-3"], "'algo.lr'"),
        (["--multirun", "++algo.betas=[0.9,0.99],[0.9,0.95]"], "'algo.betas'"),
        (["seed=1"], None),
        (["-m", "algo=grpo", "++algo.lr=1e-4", "ckpt_path=last", "hydra.sweep.dir=s"], "'algo','algo.lr'"),
        (["-m", "hydra.sweep.dir=s"], None),
        (["-m", "seed=1,2", "hydra.sweep.subdir=mine"], None),
    ],
)
def test_folders_are_named_after_what_is_swept(arguments, keys):
    assert sweep_jobs.named(arguments) == ([f"hydra.sweep.subdir=${{job_name:{keys}}}"] if keys else [])


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """In place of processes: each leaves a run's folder and its command, and ends with the code in `codes`."""
    codes = {}

    def run(arguments, environment):
        folder = Path(next(a for a in arguments if a.startswith("hydra.run.dir=")).partition("=")[2].strip("'"))
        with Path(tmp_path, "commands").open("a") as file:
            file.write(json.dumps([arguments, environment]) + "\n")
        if codes.get(folder.name) != AT_ONCE:
            leave(folder, *(a for a in arguments if "=" in a and "hydra" not in a))
        return codes.get(folder.name, 0)

    monkeypatch.setattr(sweep_jobs, "run_module", run)
    return codes


AT_ONCE = 2


def commands(folder):
    return [json.loads(line) for line in Path(folder, "commands").read_text().splitlines()]


def test_every_run_is_a_command_of_its_own_in_a_folder_of_its_own(tmp_path, runs):
    ended = fork("-m", "algo=grpo,rloo", "algo.lr=0.0001,0.001", "seed=1", "hydra.sweep.dir=s", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1] == f"{tmp_path}/s"
    names = [f"algo={algo},algo.lr={lr}" for algo in ("grpo", "rloo") for lr in ("0.0001", "0.001")]
    assert re.findall(r"run (\d) of 4: (.*)", ended.out) == [(str(n), name) for n, name in enumerate(names, 1)]
    (first, environment), *_ = commands(tmp_path)
    assert first[:4] == ["lit_rlhf.train", "algo=grpo", "++algo.lr=0.0001", "seed=1"]
    assert first[4:] == [f"hydra.run.dir='{tmp_path}/s/{names[0]}'"]
    environment.pop("LIT_RLHF_SWEEP_JOB")
    assert environment == {"WANDB_RUN_GROUP": "s", "WANDB_NAME": names[0]}
    assert re.search(r"rloo algo.lr=0.001 +1 +sampled accuracy +0.250 +0.750", ended.out)


def test_one_run_with_m_is_named_after_what_is_given(tmp_path, runs):
    assert fork("-m", "algo=grpo", "seed=1", "hydra.sweep.dir=s", cwd=tmp_path).code == 0
    ((_, environment),) = commands(tmp_path)
    environment.pop("LIT_RLHF_SWEEP_JOB")
    assert environment == {"WANDB_RUN_GROUP": "s", "WANDB_NAME": "algo=grpo,seed=1"}
    assert (tmp_path / "s" / "algo=grpo,seed=1" / "metrics.csv").exists()


@pytest.mark.parametrize("swept", ["choice(grpo,rloo)", "choice( grpo, rloo )", "sort(rloo,grpo)"])
def test_hydras_own_way_to_write_several(tmp_path, runs, swept):
    ended = fork("-m", f"algo={swept}", "hydra.sweep.dir=s", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert [given[1] for given, _ in commands(tmp_path)] == ["algo=grpo", "algo=rloo"]


def test_names_that_no_file_may_have(tmp_path, runs):
    paths = "model.path=/some/where/a,/some/where/b"
    assert fork("-m", paths, "hydra.sweep.dir=s", cwd=tmp_path).code == 0
    assert sorted(path.name for path in (tmp_path / "s").glob("model*")) == [
        "model.path=_some_where_a,0",
        "model.path=_some_where_b,1",
    ]


def test_a_mistake_in_any_of_the_runs_is_told_before_the_first(tmp_path, runs):
    sentence = fork("-m", "algo=grpo,sft", "algo.group_size=2", "hydra.sweep.dir=s", cwd=tmp_path).sentence()
    assert sentence.startswith("in the run algo=sft algo.group_size=2: unknown key 'algo.group_size'")
    assert not (tmp_path / "commands").exists()


def test_a_choice_that_only_hydra_reads_is_told_before_the_first_too(tmp_path, runs):
    sentence = fork("-m", "algo=sort(sft,zzz)", "hydra.sweep.dir=s", cwd=tmp_path).sentence()
    assert sentence == "in the run algo=zzz: In 'train': Could not find 'algo/zzz'"
    assert not (tmp_path / "commands").exists()


def test_a_run_that_fails_does_not_stop_the_others(tmp_path, runs):
    runs.update({"seed=1": 1, "seed=2": AT_ONCE, "seed=3": -signal.SIGKILL})
    ended = fork("-m", "algo=grpo", "debug=tiny", "seed=1,2,3,4", "hydra.sweep.dir=s", cwd=tmp_path)
    assert ended.code == 1
    assert len(commands(tmp_path)) == 4
    assert "failed: seed=1: ended with exit code 1" in ended.out
    assert "failed: seed=2: ended with exit code 2" in ended.out
    assert "failed: seed=3: ended by SIGKILL" in ended.out
    assert re.search(r"^grpo +1 of 4 +sampled accuracy", ended.out, re.M), "seed=2 has written no config/"


def test_a_first_run_that_cannot_begin_ends_the_sweep(tmp_path, runs):
    runs["seed=1"] = AT_ONCE
    ended = fork("-m", "seed=1,2", "hydra.sweep.dir=s", cwd=tmp_path)
    assert (ended.code, len(commands(tmp_path))) == (AT_ONCE, 1)


@pytest.mark.parametrize("code", [128 + signal.SIGINT, -signal.SIGTERM])
def test_an_interrupted_sweep_ends_and_says_how_to_go_on(tmp_path, runs, code):
    runs["seed=2"] = code
    ended = fork("-m", "seed=1,2,3", "hydra.sweep.dir=s", cwd=tmp_path)
    assert ended.code == 128 + abs(code) % 128
    assert len(commands(tmp_path)) == 2
    assert "hydra.sweep.dir=s ckpt_path=last goes on; python -m lit_rlhf.compare s compares" in ended.err


def test_a_dry_run_compares_nothing(tmp_path, runs):
    ended = fork("-m", "seed=1,2", "dry_run=true", "hydra.sweep.dir=s", cwd=tmp_path)
    assert ended.code == 0
    assert not (tmp_path / "s" / "comparison.csv").exists()


REWARD = """
import sys

def length(completions, **kwargs):
    if "seed=2" in sys.argv:
        raise KeyError("answer")
    return [float(len(text)) for text in completions]
"""


@pytest.mark.slow
def test_a_sweep_from_the_command_line(tmp_path):
    """Two runs of which the second fails; what it says itself stands in the comparison."""
    (tmp_path / "my_file.py").write_text(REWARD)
    arguments = ("debug=tiny", *QUIET, "reward.funcs=[my_file.length]")
    ended = new_process("-m", "seed=1,2", *arguments, "hydra.sweep.dir=s", cwd=tmp_path)
    assert ended.code == 1, ended.err
    assert "failed: seed=2: reward function length raised KeyError: 'answer'" in ended.out
    assert ended.out.splitlines()[-1] == f"{tmp_path}/s"
    assert (tmp_path / "s" / "comparison.png").exists()
    assert "val/reward_sampled" in metrics_of(tmp_path / "s" / "seed=1")[0]
