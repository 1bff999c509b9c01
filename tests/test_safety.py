"""What a run may not do: call anyone, or leave a secret behind; and an error of several processes is told once."""

import socket
import sys
from pathlib import Path

import pytest
import yaml

from lit_rlhf import evaluate, export, train
from lit_rlhf.confidential import check_no_secrets, masked
from lit_rlhf.config import conf_dir
from lit_rlhf.errors import InputError
from tests.runs import fork, new_process

SMALL = ("debug=tiny", "algo.prompts_per_rollout=8", "algo.minibatches=1", "threads=1")
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_plantedInTheEnvironment",
    "OPENAI_API_KEY": "sk-planted-in-the-environment",
    "MINE": "planted-under-a-harmless-name",
}
JUDGE = """
class Judge:
    def __init__(self, api_key, header):
        self.api_key, self.header = api_key, header
    def __call__(self, completions, **columns):
        assert self.api_key.startswith("sk-planted") and self.header == "planted-under-a-harmless-name"
        return [float(len(c)) for c in completions]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# the network


def without_network(main):
    """The entry point, where looking up a name and connecting to another machine are written down and refused."""

    def run():
        connect = socket.socket.connect

        def refuse(what):
            with Path("calls").open("a") as file:
                file.write(f"{what}\n")
            raise OSError(f"no network here: {what}")

        def only_here(self, address):
            local = self.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1", "localhost")
            return connect(self, address) if local else refuse(address)

        socket.socket.connect = socket.socket.connect_ex = only_here
        socket.getaddrinfo = lambda host, *_, **__: refuse(host)
        main()

    return run


@pytest.mark.slow
def test_a_run_offline_calls_nobody(here, monkeypatch):
    """Training with W&B, evaluation and export, with nothing that says that there is no network: not even a try."""
    for name in ("HF_HUB_OFFLINE", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NETRC", "/dev/null")
    Path("rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n' * 20)
    run = fork(*SMALL, "data.path=rows.jsonl", "hydra.run.dir=run", cwd=here, main=without_network(train.main))
    assert run.code == 0, run.err
    assert list(Path("run").glob("wandb/offline-run-*/*.wandb"))
    given = ["model.path=run/model", "limit=2", "samples=2", "hydra.run.dir=evaluation"]
    assert fork(*given, cwd=here, main=without_network(evaluate.main)).code == 0
    given = ["algo=grpo", "ckpt_path=run/checkpoints/last.ckpt", "hydra.run.dir=exported"]
    assert fork(*given, cwd=here, main=without_network(export.main)).code == 0
    assert not Path("calls").exists(), Path("calls").read_text()


def test_a_call_would_be_noticed(here):
    def call():
        with pytest.raises(OSError, match="no network here"):
            socket.create_connection(("192.0.2.1", 80))

    fork(cwd=here, main=without_network(call))
    assert "192.0.2.1" in Path("calls").read_text()


# secrets


@pytest.mark.slow
def test_secrets_of_the_environment_are_nowhere_in_what_a_run_leaves(here, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    Path("mine.py").write_text(JUDGE)
    judge = "{_target_: mine.Judge, api_key: '${oc.env:OPENAI_API_KEY}', header: '${oc.env:MINE}'}"
    run = fork(*SMALL, f"reward.funcs=[{judge}]", "hydra.run.dir=run", cwd=here)
    assert run.code == 0, run.err
    rewards = [f"reward.funcs=[{judge}]", "limit=2", "samples=2", "hydra.run.dir=evaluation"]
    assert fork(*rewards, cwd=here, main=evaluate.main).code == 0
    texts = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    assert any(file.suffix == ".wandb" for file in texts)
    assert b"${oc.env:OPENAI_API_KEY}" in texts[Path("run/config/config.yaml")]
    for name, value in SECRETS.items():
        found = [str(file) for file, text in texts.items() if value.encode() in text and file.name != "mine.py"]
        assert not [file for file in found if name != "MINE" or file != "mine.py"], (name, found)


@pytest.mark.parametrize(
    "key",
    [
        *("api_key", "apikey", "API-KEY", "apiKey", "openai_api_key", "token", "hf_token", "auth_token", "accessToken"),
        *("password", "passwd", "pwd", "db_pwd", "bearer", "client_secret"),
    ],
)
def test_a_secret_that_is_written_out_is_refused(key):
    for value in ("sk-1234", 1234, ["sk-1234"], {"of": "sk-1234"}):
        with pytest.raises(InputError, match=r"is a secret, and a run writes its configuration down"):
            check_no_secrets({"reward": {"funcs": [{"_target_": "mine.Judge", key: value}]}})
    for value in ("${oc.env:KEY}", "Bearer ${oc.env:KEY}", "EMPTY", "", None, True):
        check_no_secrets({"reward": {"funcs": [{"_target_": "mine.Judge", key: value}]}})


HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "config",
    [
        # by what a key's value looks like
        *({"openai_key": "sk-planted"}, {"key": "sk-1234"}, {"judge-key": "sk-1234"}, {"keys": ["sk-1234"]}),
        *({"wandb_key": HEX}, {"key": HEX.upper()}, {"wandbKey": HEX}, {"x_key": "aB3dE5gH7jK9mN1pQ3sT5vW7"}),
        *({"headers": {"X-Key": "abc"}}, {"extra_headers": {"X-Auth": "abc"}}, {"headers": {"Cookie": "id=1"}}),
        # by the value alone
        {"header": "Bearer sk-proj-abcdefghij0123456789"},
        {"options": ["--with=sk-0123456789abcdef0123456789abcdef"]},
        {"x": "hf_abcdefghijklmnopqrstuvwxyzABCDEFGH"},
        {"x": "https://ghp_abcdefghijklmnopqrstuvwxyz0123456789@github.com/me/data"},
        {"x": "github_pat_11ABCDEFG0abcdefghijkl_mnopqrstuv"},
        {"x": "AKIAIOSFODNN7EXAMPLE"},
        {"x": "${oc.env:NAME,hf_abcdefghijklmnopqrstuvwxyzABCDEFGH}"},
        {"x": "postgresql://me:swordfish@db:5432/rows"},
        {"x": "http://:swordfish@proxy"},
    ],
)
def test_a_secret_that_its_key_does_not_name_is_refused(config):
    with pytest.raises(InputError, match=r"^'reward.funcs.0.*' is a secret, and a run writes"):
        check_no_secrets({"reward": {"funcs": [{"_target_": "mine.Judge", **config}]}})


@pytest.mark.parametrize(
    "config",
    [
        *({"answer_key": "answer"}, {"answer_key": "answer_of_the_question_2"}, {"prompt_key": "hf_prompt"}),
        *({"key": "prompt"}, {"keys": ["prompt", "answer"]}, {"monitor": "validation/reward_mean"}, {"kl_coef": 0.05}),
        *({"monkey": HEX}, {"digest": HEX}, {"revision": HEX}, {"headers": {"X-Model": "abc"}}, {"cookie": "oat"}),
        *(
            {"tokenizer": "org/sk-model-7B-Instruct-2024"},
            {"path": "sk-slovak-model-v2"},
            {"name": "task-0123456789abcdef0"},
        ),
        *(
            {"path": "hf_data/rows.jsonl"},
            {"path": "hf://datasets/org/data@main/rows.parquet"},
            {"x": "ssh://git@host/a"},
        ),
        *({"x": "http://127.0.0.1:8000/v1"}, {"x": "https://me:${oc.env:PASSWORD}@host"}, {"x": "a: b://c d:e@f"}),
        *({"openai_key": "${oc.env:OPENAI_API_KEY}"}, {"headers": {"X-Key": "${oc.env:MINE}"}}, {"bearer": None}),
    ],
)
def test_what_only_resembles_a_secret_is_none(config):
    check_no_secrets({"data": config})


def test_no_choice_of_our_own_is_a_secret():
    for file in conf_dir().rglob("*.yaml"):
        check_no_secrets(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize("key", ["pad_token", "max_new_tokens", "token_cache", "micro_batch_tokens", "key"])
def test_what_counts_or_names_tokens_is_no_secret(key):
    check_no_secrets({"tokenizer": {key: "abcdefgh"}})


def test_a_secret_on_the_command_line_is_refused_before_anything_is_written(here):
    given = ["reward.funcs=[{_target_: mine.Judge, api_key: sk-1234}]", "hydra.run.dir=run"]
    assert fork(*given, cwd=here).sentence().startswith("'reward.funcs.0.api_key' is a secret")
    assert list(Path("run").iterdir()) == []
    given = ["+hydra.job.env_set.OPENAI_API_KEY=sk-1234", "hydra.run.dir=run"]
    assert fork(*given, cwd=here).sentence().startswith("'hydra.job.env_set.OPENAI_API_KEY' is a secret")


def test_values_of_secret_variables_are_masked(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-1234567890")
    monkeypatch.setenv("SHORT_KEY", "the")
    monkeypatch.setenv("HARMLESS", "harmless-value")
    assert masked("the key sk-1234567890, harmless-value") == "the key ***, harmless-value"


def test_a_traceback_is_masked(here, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "planted-in-the-environment")
    Path("mine.py").write_text("""
import os
import sys
def hook(*error):
    sys.stderr.write("told by another's hook: ")
    sys.__excepthook__(*error)
sys.excepthook = hook  # as W&B and torch do, when the run has begun
raise RuntimeError("no answer to " + os.environ["MY_API_KEY"])
""")

    def as_interpreters_do():
        try:
            train.main()
        except RuntimeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
            sys.exit(1)

    finished = fork("plugins=[mine]", "hydra.run.dir=run", cwd=here, main=as_interpreters_do)
    assert finished.code == 1
    assert "told by another's hook: Traceback (most" in finished.err
    assert "in as_interpreters_do" in finished.err
    assert finished.err.endswith("RuntimeError: no answer to ***\n"), finished.err
    assert "planted" not in finished.err


# several processes

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger.wandb=null", "callbacks.progress=null")


def errors(finished):
    return [line for line in finished.err.splitlines() if "error: " in line]


@pytest.mark.slow
def test_an_error_that_all_ranks_meet_is_told_once(here):
    finished = new_process(*SMALL, *TWO, "algo.prompts_per_rollout=9", "algo.group_size=2", cwd=here)
    assert finished.code == 2, finished.err
    (line,) = errors(finished)
    assert line.startswith("error: algo.prompts_per_rollout=9 does not divide over 2 devices")


@pytest.mark.slow
def test_an_error_of_another_rank_is_told_with_its_rank(here):
    Path("mine.py").write_text("""
import os
def fails(completions, **columns):
    if os.environ.get("LOCAL_RANK") == "1":
        raise KeyError("level")
    return [1.0] * len(completions)
""")
    finished = new_process(*SMALL, *TWO, "reward.funcs=[mine.fails]", "validate_first=false", cwd=here)
    assert finished.code not in (0, None), finished.err
    assert [
        line for line in errors(finished) if line.startswith("error: rank 1: reward function fails raised KeyError")
    ]
    assert not [line for line in errors(finished) if line.startswith("error: reward function")]
