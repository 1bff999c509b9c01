"""A run that is asked to stop stops after the micro-batch at hand, with a checkpoint from which it goes on exactly."""

import os
import signal
import sys

import pytest
from lightning.pytorch import Callback

from lit_rlhf.algorithms.dapo import DAPO
from lit_rlhf.callbacks.checkpoint import RolloutCheckpoint
from lit_rlhf.callbacks.hooks import RLHFCallback
from lit_rlhf.callbacks.stop_signals import StopSignals
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import assert_same, everything, fit_of, loop_in

SIZES = {"group_size": 2, "prompts_per_rollout": 8, "minibatches": 2, "update_epochs": 2, "max_rounds": 3}
ROLLOUTS = 3


class Logged(RLHFCallback):
    """What was logged, but for the times."""

    def __init__(self):
        self.lines = []

    def on_metrics(self, trainer, module, values):
        self.lines.append({name: x for name, x in values.items() if not name.startswith("perf/")})


class Asked(Callback):
    """Sends itself signals in the middle of a step, on one rank."""

    def __init__(self, batch, *numbers, rank=0):
        self.batch, self.numbers, self.rank, self.seen = batch, numbers, rank, 0

    def on_before_backward(self, trainer, module, loss):
        self.seen += 1
        if self.seen == self.batch and trainer.global_rank == self.rank:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def fit(folder, *more, **arguments):
    keeper = RolloutCheckpoint(every_n_epochs=100, dirpath=folder)
    settings = {**SIZES, "sampling": SamplingConfig(max_new_tokens=4)}
    return fit_of(DAPO, settings, ROLLOUTS, callbacks=[keeper, StopSignals(), *more], **arguments)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    logged = Logged()
    return everything(*fit(tmp_path_factory.mktemp("whole"), logged)), logged.lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("batch", "place"), [(1, (0, 1)), (6, (1, 2)), (8, (2, 0)), (12, (3, 0))])
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, capsys, number, batch, place):
    """What it logs too: the rollout that a stop completes is logged before it, any other after the resume."""
    before, logged = signal.getsignal(number), Logged()
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, Asked(batch, number), logged)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    loop = loop_in(tmp_path / "last.ckpt")
    assert (loop["iteration"], loop["position"]) == place
    said = capsys.readouterr().err
    assert f"stopped by {number.name} after optimiser step {batch}: resume with ckpt_path={tmp_path}/last.ckpt" in said
    expected, lines = whole
    assert_same(everything(*fit(tmp_path, logged, seed=1, ckpt_path=tmp_path / "last.ckpt")), expected)
    assert logged.lines == lines


def test_within_a_step_of_several_micro_batches_too(tmp_path):
    expected = everything(*fit(tmp_path / "whole", accumulate=2))
    with pytest.raises(SystemExit):
        fit(tmp_path, Asked(7, signal.SIGTERM), accumulate=2)
    assert loop_in(tmp_path / "last.ckpt")["position"] == 7
    assert_same(everything(*fit(tmp_path, accumulate=2, seed=1, ckpt_path=tmp_path / "last.ckpt")), expected)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """Lightning then exits with 1, and ignores a third."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path, Asked(2, signal.SIGINT, signal.SIGINT))
    signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 1
    assert not (tmp_path / "last.ckpt").exists()


def test_the_signals_are_given_back_at_the_end(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fit(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_signal_to_one_rank_stops_all_of_them_at_the_same_place(tmp_path):
    expected, _ = fit(tmp_path / "whole", devices=2)
    with pytest.raises(BaseException, match=r"exit code 143|143"):
        fit(tmp_path, Asked(6, signal.SIGTERM, rank=1), devices=2)
    for rank in range(2):
        assert (
            loop_in(tmp_path / "last.ckpt", rank)["iteration"],
            loop_in(tmp_path / "last.ckpt", rank)["position"],
        ) == (1, 2)
    resumed, _ = fit(tmp_path, devices=2, seed=1, ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed.state_dict(), expected.state_dict())


def test_slurm_has_the_job_requeued(tmp_path, monkeypatch):
    """`scontrol` stands in the path and writes down what it is asked for."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        f"#!{sys.executable}\nimport sys; open({str(tmp_path / 'asked')!r}, 'w').write(' '.join(sys.argv[1:]))"
    )
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    slurm = {
        "JOB_ID": "17",
        "JOB_NAME": "train",
        "NTASKS": "1",
        "NTASKS_PER_NODE": "1",
        "PROCID": "0",
        "LOCALID": "0",
        "NODEID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(SystemExit):
        fit(tmp_path, Asked(6, signal.SIGUSR1))
    assert (tmp_path / "asked").read_text() == "requeue 17"
    assert loop_in(tmp_path / "last.ckpt")["position"] == 2
