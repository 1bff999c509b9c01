"""What `--help` shows: every choice of every group with a line of its own, and every key."""

import re

import pytest
from omegaconf import OmegaConf

from lit_rlhf import cli
from lit_rlhf.config import conf_dir
from lit_rlhf.evaluate import main as evaluate
from lit_rlhf.export import main as export
from lit_rlhf.pipeline import main as pipeline
from lit_rlhf.train import ELSEWHERE
from lit_rlhf.train import main as train

MODEL = ["algo", "model", "data", "reward", "rollout", "engine"]
RUN = ["trainer", "logger", "callbacks", "experiment", "debug"]


def page(monkeypatch, capsys, main, *arguments):
    monkeypatch.setattr("sys.argv", ["lit-rlhf", *arguments])
    main()
    return capsys.readouterr().out


def choices(text, group):
    """Name and line of each choice below `group=`."""
    block = re.search(rf"^{group}=.*\n((?:  .*\n)+)", text, flags=re.MULTILINE)
    return dict(re.findall(r"^  (\S+)(?: +(\S.*))?$", block[1], flags=re.MULTILINE))


@pytest.mark.parametrize("group", MODEL + RUN)
def test_every_choice_of_every_group_has_a_line(group, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    found = choices(page(monkeypatch, capsys, train, "--help"), group)
    files = [file.relative_to(conf_dir() / group) for file in (conf_dir() / group).rglob("*.yaml")]
    assert set(found) == {f.with_suffix("").as_posix() for f in files if f.parts[0] != "steps"}
    assert all(len(line) > 10 for line in found.values()), found


def test_the_line_is_no_word_of_hydra(monkeypatch, capsys):
    assert "@package" not in page(monkeypatch, capsys, train, "--help")


def test_defaults_and_top_level_keys_are_those_of_the_yaml_file(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    text = page(monkeypatch, capsys, train, "-h")
    assert "\nalgo=grpo, or another of\n" in text
    assert "\n  plugins=[]  " in text
    keys = {line.split("=")[0].strip() for line in text.split("keys beside")[1].split("\n\n")[0].splitlines()[1:]}
    assert keys == set(cli.primary("train")) - {"defaults", "hydra"}


def test_the_keys_of_a_choice_are_its_arguments_but_for_what_other_keys_decide(monkeypatch, capsys):
    text = page(monkeypatch, capsys, train, "algo=dapo", "rollout=default", "--help")
    assert re.search(r"^  algo\.clip_ratio_high +float$", text, flags=re.MULTILINE)
    assert re.search(r"^  algo\.group_size +int$", text, flags=re.MULTILINE), "of the family's arguments, too"
    assert re.search(r"^  rollout\.temperature +float$", text, flags=re.MULTILINE)
    assert not [key for key in ELSEWHERE if f"  {key} " in text]


def test_every_entry_point_says_what_it_does(monkeypatch, capsys):
    assert page(monkeypatch, capsys, train, "--help").startswith("Train one algorithm")
    assert page(monkeypatch, capsys, export, "--help").startswith("A Hugging Face folder from a checkpoint")
    assert "\n  reference.path=null " in page(monkeypatch, capsys, evaluate, "--help")
    assert "pipeline.reward_model=reward_modeling" in page(monkeypatch, capsys, pipeline, "--help")


def test_a_page_fits_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    text = page(monkeypatch, capsys, train, "--help")
    lines = text[text.index("algo=grpo") : text.index("keys beside")].splitlines()
    assert max(map(len, lines)) <= 70


def test_choices_of_a_folder_of_the_users_are_listed(tmp_path, monkeypatch, capsys):
    (tmp_path / "algo").mkdir()
    OmegaConf.save({"_target_": "lit_rlhf.GRPO"}, tmp_path / "algo" / "mine.yaml")
    assert "mine" in choices(page(monkeypatch, capsys, train, "--config-dir", str(tmp_path), "--help"), "algo")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trainer=fsdp2"], "  trainer.strategy.timeout  "),
        (["trainer=ddp"], "  trainer.max_epochs  "),  # of the choice that it begins with
        (["callbacks=best"], "  callbacks.monitor.bounds  "),
        (["logger=default"], "  logger.wandb.log_model  "),
        (["experiment=flux/dapo"], "  algo.clip_ratio_high=0.28\n"),
        (["experiment=flux/dapo"], "  algo=dapo\n"),
    ],
)
def test_a_choice_that_builds_several_things_or_sets_values_lists_them(arguments, line, monkeypatch, capsys):
    assert line in page(monkeypatch, capsys, train, *arguments, "--help")


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [("algo=dapoo", "did you mean 'dapo'"), ("algoo=dapo", "did you mean 'algo'"), ("algo=dapo,grpo", "add -m")],
)
def test_a_mistake_beside_it_is_told(argument, sentence, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        page(monkeypatch, capsys, train, argument, "--help")
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
