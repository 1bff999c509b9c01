"""The commit that a run records is git's, of the folder it was started in, and no other checkout's."""

import subprocess

import lightning
import pytest
import torch

import lit_rlhf
from lit_rlhf.versions import commit_of, versions


def git(folder, *arguments):
    name = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    return subprocess.run(["git", *name, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "mine.py").write_text("x = 1\n")
    git(tmp_path, "add", "mine.py")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "v1")
    return tmp_path


def test_the_commit_and_whether_files_differ_from_it(checkout, monkeypatch):
    head = git(checkout, "rev-parse", "HEAD").strip()
    (checkout / "outputs").mkdir()
    (checkout / "outputs" / "new.txt").write_text("what a run leaves is no change to the code")
    monkeypatch.chdir(checkout / "outputs")
    assert versions()["commit"] == head
    (checkout / "mine.py").write_text("x = 2\n")
    assert versions()["commit"] == f"{head}-dirty"


def test_without_a_checkout_or_without_git_there_is_none(tmp_path, monkeypatch, checkout):
    assert commit_of(tmp_path / "missing") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(checkout) is None


def test_a_package_installed_within_a_checkout_is_no_part_of_it(checkout, monkeypatch):
    installed = checkout / "site-packages" / "lit_rlhf"
    installed.mkdir(parents=True)
    (installed / "versions.py").write_text("")
    monkeypatch.setattr("lit_rlhf.versions.__file__", str(installed / "versions.py"))
    assert "lit_rlhf commit" not in versions()
    git(checkout, "add", "site-packages")
    assert versions()["lit_rlhf commit"] == git(checkout, "rev-parse", "HEAD").strip() + "-dirty"


def test_git_runs_no_program_of_the_checkout(checkout):
    program = checkout / "monitor.sh"
    program.write_text(f"#!/bin/sh\ntouch {checkout}/ran\n")
    program.chmod(0o755)
    git(checkout, "config", "core.fsmonitor", str(program))
    git(checkout, "status")
    assert (checkout / "ran").exists(), "git would run it"
    (checkout / "ran").unlink()
    assert commit_of(checkout)
    assert not (checkout / "ran").exists()


def test_versions_are_those_that_are_imported():
    found = versions()
    assert (found["lit_rlhf"], found["torch"], found["lightning"]) == (
        lit_rlhf.__version__,
        torch.__version__,
        lightning.__version__,
    )
