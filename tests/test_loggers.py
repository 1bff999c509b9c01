"""Whether a run goes online is decided by what lies on the machine; nobody is asked and nothing is sent."""

import os
from pathlib import Path

import pytest

from lit_rlhf.errors import InputError
from lit_rlhf.loggers import csv_logger, wandb_logger

ENTRY = "machine {host} login user password 0123456789012345678901234567890123456789\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without an account. `WANDB_MODE` is put back afterwards, whatever the logger makes of it."""
    monkeypatch.setenv("WANDB_MODE", "")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))

    def log_in(**entries):
        (tmp_path / "netrc").write_text("".join(ENTRY.format(host=host) for host in entries.values()))

    return log_in


def mode_of(folder):
    """`None`: wandb's own choice, which is online."""
    wandb_logger(folder)
    return os.environ.get("WANDB_MODE")


def test_without_an_account_a_run_is_offline(machine, tmp_path):
    assert mode_of(tmp_path) == "offline"


def test_an_unreadable_netrc_is_no_account(machine, tmp_path):
    (tmp_path / "netrc").write_text("machine machine machine")
    assert mode_of(tmp_path) == "offline"


def test_a_key_in_the_environment_goes_online(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789012345678901234567890123456789")
    assert mode_of(tmp_path) is None


def test_an_empty_key_is_no_key(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert mode_of(tmp_path) == "offline"


def test_what_wandb_login_left_behind_goes_online(machine, tmp_path):
    machine(host="api.wandb.ai")
    assert mode_of(tmp_path) is None


def test_an_entry_of_another_host_is_no_account(machine, tmp_path):
    machine(host="example.org")
    assert mode_of(tmp_path) == "offline"


def test_an_own_server_has_its_own_entry(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080")
    machine(host="api.wandb.ai")
    assert mode_of(tmp_path) == "offline"
    monkeypatch.delenv("WANDB_MODE")
    machine(host="wandb.example.org")
    assert mode_of(tmp_path) is None


@pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
@pytest.mark.parametrize("account", [True, False])
def test_the_users_choice_stands(machine, tmp_path, monkeypatch, mode, account):
    monkeypatch.setenv("WANDB_MODE", mode)
    if account:
        machine(host="api.wandb.ai")
    assert mode_of(tmp_path) == mode


def test_the_logger_is_lightnings_and_makes_its_folder(machine, tmp_path):
    logger = wandb_logger(tmp_path / "new" / "run", project="mine", name="first")
    assert (tmp_path / "new" / "run").is_dir()
    assert (logger._wandb_init["project"], logger._wandb_init["name"]) == ("mine", "first")
    assert str(logger._wandb_init["dir"]) == str(tmp_path / "new" / "run")


def test_the_metrics_of_a_run_continued_in_its_own_folder_are_kept(tmp_path):
    for step, value in enumerate((0.25, 0.5, 0.75)):
        logger = csv_logger(tmp_path)
        logger.log_metrics({"reward": value}, step=step)
        logger.save()
    found = {path.name: path.read_text().split() for path in tmp_path.glob("metrics*.csv")}
    assert {name: lines[1].split(",")[0] for name, lines in found.items()} == {
        "metrics.1.csv": "0.25",
        "metrics.2.csv": "0.5",
        "metrics.csv": "0.75",
    }


@pytest.mark.parametrize("choice", ["end", 1.5, None, "ALL"])
def test_what_log_model_is_not(machine, tmp_path, choice):
    with pytest.raises(InputError, match=f"logger.wandb.log_model must be true, false or all, got {choice!r}"):
        wandb_logger(tmp_path, log_model=choice)


@pytest.mark.parametrize("name", ["run-20260102_030405-abc12xyz", "offline-run-20260102_030405-abc12xyz"])
def test_a_run_that_is_continued_keeps_its_wandb_run(machine, tmp_path, name):
    (tmp_path / "first" / "wandb" / "offline-run-20260101_030405-older").mkdir(parents=True)
    (tmp_path / "first" / "wandb" / name).mkdir()
    logger = wandb_logger(tmp_path / "second", continues=tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert (logger._wandb_init["id"], logger._wandb_init["resume"]) == ("abc12xyz", "allow")
    chosen = wandb_logger(tmp_path / "third", continues=tmp_path / "first" / "checkpoints" / "last.ckpt", id="mine")
    assert chosen._wandb_init["id"] == "mine"


def test_a_checkpoint_that_lies_elsewhere_is_of_no_known_wandb_run(machine, tmp_path):
    (tmp_path / "wandb" / "run-20260102_030405-stranger").mkdir(parents=True)
    for path in (tmp_path / "ckpts" / "a.ckpt", Path("/x.ckpt")):
        assert wandb_logger(tmp_path / "second", continues=path)._wandb_init["id"] != "stranger"


def test_a_run_that_continues_one_without_wandb_begins_its_own(machine, tmp_path):
    logger = wandb_logger(tmp_path / "second", continues=tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert logger._wandb_init["id"] == wandb_logger(tmp_path / "third")._wandb_init["id"]
