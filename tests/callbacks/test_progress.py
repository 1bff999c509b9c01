"""The bar's numbers are those of the rollout it has just counted."""

import io
import re

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.sft import SFT
from lit_rlhf.callbacks.progress import RolloutProgressBar
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import verifier
from lit_rlhf.types import SamplingConfig
from tests.helpers import build, prompt_rows, tiny_model, trainer
from tests.runs import metrics_of

LINE = re.compile(r"(?P<name>\w+) \|.*\| (?P<done>\d+)/(?P<total>\d+) (rollouts|passes), [\d:]+ left, (?P<shown>.*)")


@verifier
def first_is_even(completion_ids, **kwargs):
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def fit(folder, algorithm=GRPO, epochs=3, bar=None, **arguments):
    sizes = {"group_size": 2, "prompts_per_rollout": 8} if algorithm is GRPO else {"batch_size": 8}
    defaults = {"sampling": SamplingConfig(max_new_tokens=3), "reward_funcs": [first_is_even], "lr": 1e-2, "seed": 3}
    module = build(algorithm, tiny_model(), **{**defaults, **sizes, **arguments})
    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    shown = {"logger": logger, "enable_progress_bar": True, "log_every_n_steps": 1}
    fitter = trainer(epochs=epochs, callbacks=[bar or RolloutProgressBar()], **shown)
    fitter.fit(module, datamodule=RowsDataModule([{**row, "completion": "5 6"} for row in prompt_rows(32)]))
    return module


def lines(stderr):
    """The lines that a file or a pipe gets: what follows a carriage return replaces what was before."""
    matches = [LINE.search(part) for line in stderr.split("\n") for part in line.split("\r")[-1:]]
    return [match for match in matches if match]


def numbers(match):
    return dict(pair.split(" ") for pair in match["shown"].split(", "))


def test_each_line_shows_the_reward_and_the_accuracy_of_the_rollout_just_done(tmp_path, capsys):
    fit(tmp_path)
    found = lines(capsys.readouterr().err)
    logged = [row for row in metrics_of(tmp_path) if "reward/accuracy" in row]
    assert [(m["name"], m["done"], m["total"]) for m in found[:3]] == [("GRPO", str(i), "3") for i in (1, 2, 3)]
    assert [row["rollout/iteration"] for row in logged] == [1, 2, 3]
    for match, row in zip(found, logged, strict=False):
        expected = {"reward": "reward/reward_mean", "accuracy": "reward/accuracy", "entropy": "stability/entropy"}
        shown = {name: f"{row[key]:.3f}" for name, key in {**expected, "kl": "stability/approx_kl"}.items()}
        rate = row["perf/tokens_per_second"]
        assert numbers(match) == {**shown, "tokens/s": f"{rate:,.0f}" if rate >= 100 else f"{rate:.3f}"}
    assert len({row["reward/reward_mean"] for row in logged}) == 3, "equal rollouts would prove nothing"


def test_a_file_gets_ten_lines_of_a_long_run(tmp_path, capsys):
    fit(tmp_path, epochs=20)
    assert [m["done"] for m in lines(capsys.readouterr().err)][:10] == [str(n) for n in range(2, 21, 2)]


def test_passes_over_demonstrations_are_counted_with_their_loss(tmp_path, capsys):
    fit(tmp_path, SFT, epochs=2)
    found = lines(capsys.readouterr().err)
    losses = [row["loss/loss"] for row in metrics_of(tmp_path) if "loss/loss" in row]
    assert found[0]["name"] == "SFT"
    assert [numbers(m) for m in found[:2]] == [{"loss": f"{loss:.3f}"} for loss in losses]


@pytest.mark.parametrize(("columns", "last"), [(50, "left"), (80, "accuracy 0."), (92, "kl 0."), (160, "entropy ")])
def test_no_number_is_cut_off_where_the_terminal_is_narrow(columns, last, tmp_path, capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 40))
    fit(tmp_path)
    shown = [part.rstrip() for part in terminal.getvalue().split("\r") if "/3 rollouts, " in part and "?" not in part]
    assert shown
    for line in shown:
        assert len(line) < columns
        assert re.search(r"\d left(, [a-z/]+ -?(\d,)?\d+(\.\d{3})?)*$", line), line
        assert last in line.rpartition(", ")[2]


def test_other_ranks_are_quiet(tmp_path, capsys):
    bar = RolloutProgressBar()
    bar.disable()
    fit(tmp_path, bar=bar)
    assert not lines(capsys.readouterr().err)
    bar.enable()
    fit(tmp_path, bar=bar)
    assert lines(capsys.readouterr().err)


def test_after_an_error_what_follows_stands_on_a_line_of_its_own(tmp_path, capsys):
    calls = []

    def fails_later(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return [1.0] * len(completion_ids) if len(calls) < 3 else [1.0]

    with pytest.raises(InputError, match="returned 1 rewards"):
        fit(tmp_path, reward_funcs=[fails_later])
    assert capsys.readouterr().err.endswith("\n")


def test_the_bar_changes_no_number(tmp_path, capsys):
    with_bar = fit(tmp_path / "with").models.state_dict()
    quiet = RolloutProgressBar()
    quiet.disable()
    without = fit(tmp_path / "without", bar=quiet).models.state_dict()
    assert all(torch.equal(with_bar[name], value) for name, value in without.items())
