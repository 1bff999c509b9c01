"""The engine that samples from vLLM servers, against servers that only speak as vLLM's do (`fake_vllm.py`)."""

import gc
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.util import _exit_function
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.rollouts.engines import EngineError, EngineTimeoutError, RolloutEngine, VLLMServerEngine, vllm_server
from lit_rlhf.rollouts.engines.http import Server
from lit_rlhf.rollouts.engines.server_process import serve_command
from lit_rlhf.train import train
from lit_rlhf.types import SamplingConfig
from tests.helpers import EOS, PAD, build, prompt_rows, tiny_model, trainer
from tests.rollouts.fake_vllm import Fake, completion, digest
from tests.runs import QUIET, config_of, fork, metrics_of

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16], [17, 18, 19, 20]]
SEEDS = [11, 2**63 - 1, 13, 14, 15]
SAMPLING = SamplingConfig(max_new_tokens=12, temperature=0.7, top_p=0.9, top_k=20, group_size=3)
ENDS = {"stop_token_ids": [EOS, 3]}


def expected(weights, sampling=SAMPLING, prompts=PROMPTS, seeds=SEEDS):
    """Token ids and log-probs of every row, as the fake makes them, one prompt after the other."""
    asked = {"temperature": sampling.temperature, "max_tokens": sampling.max_new_tokens, **ENDS}
    pairs, samples = zip(prompts, seeds, strict=True), range(sampling.group_size)
    return [completion(weights, p, {**asked, "seed": seed % 2**62}, g) for p, seed in pairs for g in samples]


def rows_of(rollout):
    masks = rollout.response_mask
    ids = [x[m].tolist() for x, m in zip(rollout.response_ids, masks, strict=True)]
    logprobs = [x[m].tolist() for x, m in zip(rollout.behavior_logprobs, masks, strict=True)]
    return list(zip(ids, [pytest.approx(x, abs=1e-6) for x in logprobs], strict=True))


def found(*servers, **settings):
    return VLLMServerEngine([EOS], PAD, [3], urls=[server.url for server in servers], **settings)


@pytest.fixture
def faults(tmp_path):
    folder = tmp_path / "faults"
    folder.mkdir()
    return folder


@pytest.fixture
def start(monkeypatch, faults):
    """Makes engines whose own servers are fakes; all are closed in the end."""
    fake, made = Path(__file__).with_name("fake_vllm.py"), []
    monkeypatch.setattr(vllm_server, "check_installed", lambda what: None)
    monkeypatch.setattr(
        vllm_server,
        "serve_command",
        lambda folder, host, port, *_: [sys.executable, "-S", str(fake), str(folder), str(port), str(faults)],
    )

    def make(**settings):
        made.append(VLLMServerEngine([EOS], PAD, [3], **{"startup_timeout": 20.0, **settings}))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def alive(pid):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon(condition, seconds=10.0):
    """Wait for what another process does; a test that waits in vain fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- what is asked, and what comes back ------------------------------------------------------------------------------


def test_prompts_are_spread_over_the_servers_and_come_back_in_their_order():
    model = tiny_model()
    with Fake(None) as a, Fake(None) as b:
        engine = found(a, b)
        assert isinstance(engine, RolloutEngine)
        engine.update_weights(model, version=7)
        assert a.weights == b.weights != "none"
        rollout = engine.generate(PROMPTS, SAMPLING, SEEDS)
        shares = [[body["token_ids"] for path, body in s.asked if path.endswith("generate")] for s in (a, b)]
        engine.close()
    assert sorted(shares[0] + shares[1]) == sorted(PROMPTS)
    assert [len(share) for share in shares] == [3, 2]
    assert rows_of(rollout) == expected(a.weights)
    for row, prompt in enumerate(p for p in PROMPTS for _ in range(3)):
        assert rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist() == prompt
    assert rollout.group_ids.tolist() == [i for i in range(5) for _ in range(3)]
    assert rollout.version.tolist() == [7] * 15
    assert rollout.truncated.tolist() == [ids[-1] not in (EOS, 3) for ids, _ in expected(a.weights)]
    assert rollout.truncated.any()
    assert not rollout.truncated.all()
    assert (rollout.response_ids[~rollout.response_mask] == PAD).all()
    assert (rollout.behavior_logprobs[~rollout.response_mask] == 0).all()


def test_every_argument_of_the_sampling_is_passed():
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
        engine.generate(PROMPTS[:2], SAMPLING, SEEDS[:2])
        (_, first), (_, second) = sorted(server.asked[3:], key=lambda asked: asked[1]["token_ids"])
        engine.generate(PROMPTS[:1], replace(SAMPLING, temperature=0.0), SEEDS[:1])
        greedy = server.asked[-1][1]["sampling_params"]
        engine.close()
    params = first["sampling_params"]
    assert params == {
        "n": 3,
        "seed": 11,
        "max_tokens": 12,
        "min_tokens": 0,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [EOS, 3],
        "logprobs": 0,
        "detokenize": False,
    }
    assert second["sampling_params"] == {**params, "seed": (2**63 - 1) % 2**62}  # vLLM adds the sample's number to it
    assert greedy == {**params, "n": 1, "temperature": 0.0}  # which vLLM insists on


def test_greedy_completions_of_a_group_are_the_same():
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
        greedy = engine.generate(PROMPTS, replace(SAMPLING, temperature=0.0), SEEDS)
        engine.close()
    for x in (greedy.response_ids, greedy.behavior_logprobs):
        assert torch.equal(x[::3], x[1::3])
        assert torch.equal(x[::3], x[2::3])


def test_a_large_group_is_asked_for_in_parts():
    large = replace(SAMPLING, group_size=150)
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
        rollout = engine.generate(PROMPTS[:2], large, SEEDS[:2])
        engine.close()
    assert rows_of(rollout) == expected(server.weights, large, PROMPTS[:2], SEEDS[:2])
    assert sorted(body["sampling_params"]["n"] for path, body in server.asked[3:]) == [22, 22, 64, 64, 64, 64]


def test_at_most_max_rows_completions_are_under_way():
    prompts = [[2 + i] for i in range(12)]
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
        rollout = engine.generate(prompts, replace(SAMPLING, max_rows=7), list(range(12)))
        engine.close()
    assert server.most <= 2  # of 3 completions each
    assert rows_of(rollout) == expected(server.weights, prompts=prompts, seeds=range(12))


def test_bad_prompts_are_refused_here():
    with Fake(None) as server:
        engine = found(server)
        with pytest.raises(InputError, match="no weights to sample from"):
            engine.generate(PROMPTS, SAMPLING, 0)
        engine.update_weights(tiny_model(), 0)
        for prompts, sentence in (([[5], []], "prompt 1 is empty"), ([[64]], "outside the model's vocabulary")):
            with pytest.raises(InputError, match=sentence):
                engine.generate(prompts, SAMPLING, 0)
        engine.close()


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_pushed_whole_and_the_cache_is_reset(tied):
    model = tiny_model(tie_word_embeddings=tied)
    with Fake(None) as server:
        engine = found(server, dtype="bfloat16")
        engine.update_weights(model, 0)
        folder = Path(server.asked[0][1]["kwargs"]["weights_path"])
        tensors = load_file(folder / "model.safetensors")
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
        engine.close()
    assert [path for path, _ in server.asked] == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    assert tensors.keys() == model.state_dict().keys()
    assert "lm_head.weight" in tensors
    for name, x in model.state_dict().items():
        assert torch.equal(tensors[name], x.bfloat16()), name
    assert not folder.exists()


def test_weights_are_pushed_when_they_have_changed_and_not_otherwise():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with Fake(None) as server:
        engine = found(server)
        pushes = lambda: [path for path, _ in server.asked].count("/collective_rpc")  # noqa: E731
        engine.update_weights(model, 0)
        engine.update_weights(model, 0)
        assert pushes() == 1
        before = server.weights
        model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()
        optimizer.step()
        engine.update_weights(model, 0)
        assert (pushes(), server.weights != before) == (2, True)
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 0))
        engine.update_weights(model, 0)
        assert pushes() == 3
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(1, 1))
        engine.update_weights(model, 0)
        assert pushes() == 4
        engine.update_weights(model, 1)
        assert pushes() == 5
        engine.close()


def test_a_cache_that_cannot_be_reset_is_an_error(faults):
    (faults / "busy").touch()
    with Fake(None, faults=faults) as server:
        engine = found(server)
        with pytest.raises(EngineError, match=f"{server.url} is sampling for others"):
            engine.update_weights(tiny_model(), 0)
        engine.update_weights(tiny_model(), 0)
        engine.close()


# -- servers of our own ------------------------------------------------------------------------------------------------


def test_a_server_of_our_own_begins_with_the_weights_of_now(start):
    engine, model = start(servers=2), tiny_model()
    engine.update_weights(model, 0)
    rollout = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert rows_of(rollout) == expected(digest(engine._held.folder))
    first = digest(engine._held.folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    engine.update_weights(model, 1)
    assert (
        rows_of(engine.generate(PROMPTS, SAMPLING, SEEDS)) == expected(digest(engine._held.folder)) != expected(first)
    )


@pytest.mark.parametrize("how", ["all of it", "the guard", "between two calls"])
def test_one_that_is_killed_is_started_again_and_nothing_is_lost(start, faults, how):
    engine, model = start(servers=2), tiny_model()
    engine.update_weights(model, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    engine.update_weights(model, 1)  # it has to come back with these
    before = engine.generate(PROMPTS, SAMPLING, SEEDS)
    first = engine._held.processes[0]
    if how == "all of it":
        (faults / "die").touch()  # in the middle of an answer
    else:
        (os.kill if how == "the guard" else os.killpg)(first.pid, signal.SIGKILL)
        soon(lambda: not first.server.is_up())
    after = engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert sum(process.starts for process in engine._held.processes) == 3
    for name, x in vars(before).items():
        assert torch.equal(getattr(after, name), x), name


def test_one_that_is_killed_takes_the_next_weights(start):
    engine, model = start(), tiny_model()
    engine.update_weights(model, 0)
    os.killpg(engine._held.processes[0].pid, signal.SIGKILL)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    engine.update_weights(model, 1)
    assert rows_of(engine.generate(PROMPTS, SAMPLING, SEEDS)) == expected(digest(engine._held.folder))


def test_one_that_always_dies_at_the_same_work_is_an_error(start, faults):
    engine = start()
    engine.update_weights(tiny_model(), 0)
    (faults / "die").write_text("9")
    with pytest.raises(EngineError, match=r"http://127.0.0.1:\d+ has failed 3 times at the same work"):
        engine.generate(PROMPTS[:1], SAMPLING, SEEDS[:1])


def test_one_that_fails_now_and_then_is_asked_again(start, faults):
    engine = start()
    engine.update_weights(tiny_model(), 0)
    (faults / "broken").write_text("2")
    rollout = engine.generate(PROMPTS[:1], SAMPLING, SEEDS[:1])
    assert rows_of(rollout) == expected(digest(engine._held.folder), prompts=PROMPTS[:1], seeds=SEEDS[:1])
    (faults / "broken").write_text("3")
    with pytest.raises(EngineError, match="500 /inference/v1/generate: EngineCore encountered an issue"):
        engine.generate(PROMPTS[:1], SAMPLING, SEEDS[:1])


def test_one_that_cannot_start_says_why(start, faults):
    (faults / "refuses").touch()
    engine = start()
    with pytest.raises(EngineError, match="ended before it answered: ValueError: Head size 8 is not supported"):
        engine.update_weights(tiny_model(), 0)


def test_an_address_of_another_machine_is_refused(start):
    engine = start(host="192.0.2.1")
    with pytest.raises(InputError, match=r"engine.host=192.0.2.1 is no address of this machine"):
        engine.update_weights(tiny_model(), 0)


def test_one_that_never_answers_is_given_up(start, faults):
    (faults / "silent").touch()
    engine = start(startup_timeout=0.5)
    with pytest.raises(EngineTimeoutError, match=r"within engine.startup_timeout=0.5 seconds"):
        engine.update_weights(tiny_model(), 0)


def test_one_that_hangs_is_a_timeout(start, faults):
    engine = start(timeout=0.5)
    engine.update_weights(tiny_model(), 0)
    (faults / "hang").touch()
    with pytest.raises(EngineTimeoutError, match=r"http://127.0.0.1:\d+ has not answered /inference/v1/gen"):
        engine.generate(PROMPTS[:1], SAMPLING, SEEDS[:1])


@pytest.mark.parametrize("dribbles", ["head", "body", None])
def test_one_that_dribbles_is_a_timeout(dribbles):
    """Every part comes in time, the whole does not: without a deadline, this answer is there after two seconds."""
    head, body = b"HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n", b"{" + b" " * 58 + b"}"
    answer, told = head + body, threading.Event()
    at_once = {"head": 0, "body": len(head), None: len(answer)}[dribbles]

    def serve():
        connection = listening.accept()[0]
        with connection, suppress(OSError):
            connection.recv(1000)
            connection.sendall(answer[:at_once])
            for i in range(at_once, len(answer)):
                if told.wait(2 / 60):
                    return
                connection.sendall(answer[i : i + 1])

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = Server(f"http://127.0.0.1:{listening.getsockname()[1]}")
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            if dribbles is None:
                assert server.call("GET", "/health", timeout=5.0) == {}
            else:
                with pytest.raises(EngineTimeoutError, match=r"has not answered /health within 0 seconds"):
                    server.call("GET", "/health", timeout=0.25)
        finally:
            told.set()
            thread.join()


@pytest.mark.parametrize("end", ["close", "forgotten"])
def test_no_process_and_no_file_outlives_the_engine(monkeypatch, faults, start, end):
    engine = start() if end == "close" else vllm_server.VLLMServerEngine([EOS], PAD)
    engine.update_weights(tiny_model(), 0)
    folder, guard = engine._held.folder, engine._held.processes[0].pid
    server = int(Path(f"/proc/{guard}/task/{guard}/children").read_text())
    assert alive(server)
    if end == "close":
        engine.close()
        engine.update_weights(tiny_model(), 0)  # and it can be used again
        assert engine._held.processes[0].pid != guard
    else:
        del engine
        gc.collect()
    soon(lambda: not alive(guard) and not alive(server) and not folder.exists())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_trainer_leaves_no_server(start, how):
    """SIGKILL runs no line of Python: the server's guard notices that the other end of its pipe is gone."""
    mine, theirs = multiprocessing.Pipe()

    def train():
        engine = start()
        engine.update_weights(tiny_model(), 0)
        guard = engine._held.processes[0].pid
        theirs.send((guard, int(Path(f"/proc/{guard}/task/{guard}/children").read_text()), engine._held.folder))
        signal.pause()

    trainer = multiprocessing.get_context("fork").Process(target=train)
    trainer.start()
    assert mine.poll(30)
    guard, server, folder = mine.recv()
    assert alive(server)
    os.kill(trainer.pid, how)
    trainer.join()
    soon(lambda: not alive(guard) and not alive(server) and not folder.exists())


def test_a_fork_of_the_trainer_ends_nothing(start):
    engine = start()
    engine.update_weights(tiny_model(), 0)
    if (fork := os.fork()) == 0:
        try:
            _exit_function()  # what Python does at the end of a process
            del engine
            gc.collect()
        finally:
            os._exit(0)
    os.waitpid(fork, 0)
    engine.generate(PROMPTS, SAMPLING, SEEDS)
    assert engine._held.processes[0].starts == 1


def test_the_command_that_starts_vllm(tmp_path):
    options = {"max_model_len": 64, "enforce_eager": True, "hf_overrides": {"rope": 1}}
    command = serve_command(tmp_path, "127.0.0.1", 8123, torch.bfloat16, options)
    line = " ".join(command)
    assert f" {tmp_path} --host 127.0.0.1 --port 8123 --dtype bfloat16 --skip-tokenizer-init --enable-scale-out" in line
    assert "--generation-config vllm --logprobs-mode processed_logprobs" in line
    assert line.endswith('--max-model-len 64 --enforce-eager --hf-overrides {"rope": 1}')


def test_servers_share_the_gpus_and_the_environment_tells_nobody(start, faults, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    engine = start(gpus=[4, 5])
    engine.update_weights(tiny_model(), 0)
    environment = json.loads((faults / "environment.json").read_text())
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["VLLM_API_KEY"] == "sk-secret"  # vLLM reads it there; nothing of it in the command or the log
    assert "sk-secret" not in " ".join(engine._held.processes[0].command) + engine._held.processes[0].log.read_text()
    assert engine._held.processes[0].server.host == "127.0.0.1"


# -- servers that are found --------------------------------------------------------------------------------------------


def test_one_that_is_not_there_is_named():
    with Fake(None) as server:
        url = server.url
    engine = VLLMServerEngine([EOS], PAD, urls=[url])
    with pytest.raises(EngineError, match=f"the vLLM server {url} has failed or does not answer .*Connection refused"):
        engine.update_weights(tiny_model(), 0)
    engine.close()


def test_one_that_ends_in_between_is_named_and_not_waited_for():
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
    with pytest.raises(EngineError, match="see whether it runs"):
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    engine.close()


def test_one_that_has_other_weights_by_now_is_found_out():
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
        server.version = "default"  # as after a start
        with pytest.raises(EngineError, match="has other weights than it was given"):
            engine.generate(PROMPTS, SAMPLING, SEEDS)
        engine.close()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"dev_mode": False}, "VLLM_SERVER_DEV_MODE=1"), ({"scale_out": False}, "--enable-scale-out")],
)
def test_one_that_was_started_otherwise_says_how_to_start_it(settings, sentence):
    with Fake(None, **settings) as server:
        engine = found(server)

        def use():
            engine.update_weights(tiny_model(), 0)
            engine.generate(PROMPTS, SAMPLING, SEEDS)

        with pytest.raises(EngineError, match=sentence):
            use()
        engine.close()


def test_one_that_has_another_model_is_found_out():
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(vocab_size=8), 0)
        with pytest.raises(EngineError, match=r"sampled token \d+, and the policy's vocabulary has 8"):
            engine.generate([[5]], SAMPLING, 0)
        engine.close()


def test_what_a_server_refuses_is_said_in_its_words():
    with Fake(None) as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
        with pytest.raises(EngineError, match="refuses /inference/v1/generate: 400 the prompt is longer than"):
            engine.generate([[5] * 110], SAMPLING, 0)
        engine.close()


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-secret")
    with Fake(None, key="sk-secret") as server:
        engine = found(server)
        engine.update_weights(tiny_model(), 0)
        assert rows_of(engine.generate(PROMPTS, SAMPLING, SEEDS)) == expected(server.weights)
        server.key = "another"
        with pytest.raises(EngineError, match="401 Unauthorized") as caught:
            engine.generate(PROMPTS, SAMPLING, SEEDS)
        assert "sk-secret" not in str(caught.value)
        engine.close()


def test_a_folder_for_both_sides(tmp_path):
    with Fake(None) as server:
        engine = found(server, folder=str(tmp_path / "shared" / "weights"))
        engine.update_weights(tiny_model(), 0)
        path = Path(server.asked[0][1]["kwargs"]["weights_path"])
        assert path.parent == tmp_path / "shared" / "weights"
        engine.close()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"urls": ["node1:8000"]}, "engine.urls: 'node1:8000' is no server; write such as http://127.0.0.1:8000"),
        ({"urls": ["ftp://me:secret@node1"]}, "engine.urls: 'ftp://node1' is no server"),
        ({"urls": ["http://node1:8000"]}, "engine.folder is missing: http://node1:8000 reads the weights"),
        ({"urls": ["http://localhost:1"], "servers": 2}, "those at engine.urls run already"),
        ({"urls": ["http://localhost:1"], "options": {"a": 1}}, "those at engine.urls run already"),
        ({"host": "0.0.0.0"}, "engine.host=0.0.0.0 listens to everybody"),
        ({"servers": 0}, "engine.servers must be at least 1, got 0"),
        ({"servers": 2, "gpus": [1, 2, 3]}, "3 GPUs do not divide over engine.servers=2"),
        ({"options": {"api_key": "sk-secret"}}, "set the variable VLLM_API_KEY instead"),
        ({"timeout": 0}, "engine.timeout must be above 0"),
        ({"dtype": "int8"}, "engine.dtype: 'int8' is no floating-point dtype"),
    ],
)
def test_settings_that_cannot_be_used(monkeypatch, settings, sentence):
    monkeypatch.setattr(vllm_server, "check_installed", lambda what: None)
    with pytest.raises(InputError) as caught:
        VLLMServerEngine([EOS], PAD, **settings)
    assert sentence in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_the_package_only_servers_that_run_can_be_used():
    with pytest.raises(InputError, match=r"engine=vllm_server without engine.urls needs the package vllm: pip install"):
        VLLMServerEngine([EOS], PAD)
    VLLMServerEngine([EOS], PAD, urls=["http://127.0.0.1:1"])


def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Fake(None) as server:
        assert Server(server.url).is_up()


# -- the command line --------------------------------------------------------------------------------------------------

SMALL = ("algo=grpo", "debug=tiny", "algo.prompts_per_rollout=4", "algo.group_size=2", "algo.minibatches=2", *QUIET)


def test_a_run_of_the_command_line_samples_from_the_servers(tmp_path):
    with Fake(None) as a, Fake(None) as b:
        config = config_of(*SMALL, "engine=vllm_server", f"engine.urls=[{a.url},{b.url}]", folder=tmp_path)
        _, built = train(config)
    assert isinstance(built["module"].engine, VLLMServerEngine)
    for server in (a, b):
        assert [path for path, _ in server.asked].count("/collective_rpc") == 2  # before and after the update
    folder = Path(a.asked[0][1]["kwargs"]["weights_path"])
    assert not folder.exists()  # though somebody holds the engine
    assert any(row.get("stability/logprob_mismatch_max", 0) > 0 for row in metrics_of(tmp_path))


def test_a_run_without_its_server_ends_with_a_sentence(tmp_path):
    with Fake(None) as server:
        url = server.url
    ended = fork(*SMALL, "engine=vllm_server", f"engine.urls=[{url}]", cwd=tmp_path)
    assert f"the vLLM server {url} has failed or does not answer" in ended.sentence()


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_share_the_servers_and_one_of_them_pushes(strategy):
    """A sharded policy is whole for the while that it is pushed."""
    with Fake(None) as server:
        module = build(
            GRPO,
            tiny_model(),
            engine=partial(VLLMServerEngine, urls=[server.url]),
            sampling={"max_new_tokens": 6},
            group_size=2,
            prompts_per_rollout=4,
        )
        trainer(devices=2, epochs=3, strategy=strategy).fit(module, datamodule=RowsDataModule(prompt_rows(12)))
    prompts = [tuple(body["token_ids"]) for path, body in server.asked if path.endswith("generate")]
    assert [path for path, _ in server.asked].count("/collective_rpc") == 3  # once a rollout
    assert server.shapes == {name: list(x.shape) for name, x in tiny_model().state_dict().items()}
    assert sorted(prompts) == sorted(tuple(map(int, row["prompt"].split())) for row in prompt_rows(12))


def test_an_error_of_the_rank_that_pushes_is_every_ranks():
    with Fake(None) as server:
        url = server.url
    module = build(GRPO, tiny_model(), engine=partial(VLLMServerEngine, urls=[url]), group_size=2)
    with pytest.raises(Exception, match=f"the vLLM server {url} has failed or does not answer"):
        trainer(devices=2).fit(module, datamodule=RowsDataModule(prompt_rows(64)))


def test_ranks_of_other_machines_do_not_reach_the_loopback(start, monkeypatch):
    engine = start()
    monkeypatch.setattr(vllm_server, "gather_objects", lambda own: [own, (*own[:-1], "node2")])
    with pytest.raises(InputError, match=r"engine.host=127.0.0.1: node2 cannot reach the servers of"):
        engine.update_weights(tiny_model(), 0)
