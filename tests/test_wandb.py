"""An offline run read back from W&B's own file: names, values, axes, samples, histograms, configuration, artifacts."""

import json
from pathlib import Path

import pytest
import torch
import wandb

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.callbacks.samples import Samples
from lit_rlhf.loggers import wandb_logger
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import checkpointed, fit_of
from tests.runs import fork, metrics_of
from tests.wandb_runs import history_of, records_of, table_of

SMALL = [
    *("algo=grpo", "preset=null", "algo.prompts_per_rollout=4", "algo.group_size=2", "data.held_out=4"),
    *("algo.minibatches=2", "algo.update_epochs=2", "threads=1", "callbacks.progress=null"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of four rollouts, with a bound that every rollout breaks."""
    folder = tmp_path_factory.mktemp("wandb")
    more = ["trainer.max_epochs=4", "callbacks.samples.every_n_rollouts=2", "logger.wandb.log_model=all"]
    more += ["+callbacks.monitor.bounds.approx_kl=1e-9", "callbacks.checkpoint.every_n_epochs=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DATA_DIR", str(folder / "data"))
        patch.setenv("WANDB_CACHE_DIR", str(folder / "cache"))
        ended = fork(*SMALL, *more, f"hydra.run.dir={folder}/run", cwd=folder)
    assert ended.code == 0, ended.err
    return folder / "run"


@pytest.mark.slow
def test_names_and_values_are_those_of_metrics_csv(run):
    history, rows = history_of(run), metrics_of(run)
    for name, count in (("loss/loss", 4), ("val/accuracy_sampled", 2)):
        logged, expected = ([line for line in lines if name in line] for lines in (history, rows))
        assert len(logged) == len(expected) == count
        for line, row in zip(logged, expected, strict=True):
            assert row.keys() - {"step", "epoch"} <= line.keys()
            for key in row.keys() - {"step", "epoch"}:
                assert line[key] == pytest.approx(row[key], rel=1e-5), key
    assert {"stability/grad_norm", "rewards/exact_match", "perf/tokens_per_second"} <= rows[1].keys()


@pytest.mark.slow
def test_rollouts_are_the_axis_and_the_summary_keeps_the_best(run):
    metrics = records_of(run)["metric"]
    axes = {m.get("glob_name") or m["name"]: m.get("step_metric") for m in metrics}
    sections = {name.split("/")[0] for line in history_of(run) for name in line if "/" in name and "._" not in name}
    assert {axes.get(f"{section}/*") for section in sections - {"val", "trainer"}} == {"rollout/iteration"}
    assert axes["reward/reward_mean"] == "rollout/iteration"
    assert axes["val/accuracy_sampled"] == "trainer/global_step"
    kept = {m["name"]: m["summary"] for m in metrics if "summary" in m}
    assert kept["val/accuracy_sampled"].keys() == {"max", "last"}
    assert kept["val/sft_loss"].keys() == {"min", "last"}
    assert "val/accuracy_sampled_ci" not in kept


@pytest.mark.slow
def test_one_table_has_the_samples_of_every_rollout_that_was_written_down(run):
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [line["rollout"] for line in lines] == [0] * 4 + [2] * 4 + [3] * 4
    columns, rows = table_of(run)
    scores = ["reward", "rewards/exact_match", "advantage", "length", "finish_reason"]
    assert columns == ["rollout", "prompt", "completion", *scores]
    own = ("rollout", "prompt", "completion", "reward", "advantage", "tokens", "finish")
    expected = [{**line, "exact": line["rewards"]["exact_match"]} for line in lines]
    assert rows == [[line[name] for name in (*own[:4], "exact", *own[4:])] for line in expected]


@pytest.mark.slow
def test_histograms_count_every_completion_and_every_token_trained_on(run):
    history = history_of(run)
    names = ("reward/histogram", "rollout/length_histogram", "stability/advantage_histogram")
    for name in names:
        assert [line["rollout/iteration"] for line in history if f"{name}._type" in line] == [0, 2, 3], name
    lengths = [line for line in history if "rollout/length_histogram._type" in line]
    assert [sum(line["rollout/length_histogram.values"]) for line in lengths] == [8, 8, 8]
    ratios = [line for line in history if "stability/ratio_histogram._type" in line]
    assert [line["rollout/iteration"] for line in ratios] == [1, 3, 4], "when the rollout is over"
    rows = {row["rollout/iteration"]: row for row in metrics_of(run) if "rollout/iteration" in row}
    for line in ratios:
        tokens = 8 * rows[line["rollout/iteration"]]["rollout/response_length"]
        counts, edges = (line[f"stability/ratio_histogram.{part}"] for part in ("values", "bins"))
        assert sum(counts) == pytest.approx(2 * tokens), "each token in both passes"
        assert (edges[0], edges[-1], len(edges)) == (0, 2, 42)
        assert counts[20] >= tokens / 2, "the first step is at the old policy"


@pytest.mark.slow
def test_the_configuration_has_settings_and_the_versions_of_the_code(run):
    config = {name: value for record in records_of(run)["config"] for name, value in record["update"].items()}
    assert config["algo"]["prompts_per_rollout"] == 4
    assert config["algo"]["_target_"] == "lit_rlhf.algorithms.grpo.GRPO"
    environment = json.loads((run / "environment.json").read_text())
    assert {name: environment[name] for name in config["environment"]} == config["environment"]
    assert config["environment"]["torch"] == torch.__version__
    assert {"lit_rlhf", "lightning", "transformers", "wandb"} <= config["environment"].keys()


@pytest.mark.slow
def test_what_was_exported_and_the_checkpoints_are_artifacts(run):
    artifacts = [artifact for artifact in records_of(run)["artifact"] if artifact["type"] == "model"]
    assert [artifact["name"].rsplit("-", 1)[0] for artifact in artifacts] == ["checkpoint", "checkpoint", "model"]
    *checkpoints, model = ({entry["path"]: entry for entry in one["manifest"]["contents"]} for one in artifacts)
    steps = [torch.load(files["checkpoint.ckpt"]["local_path"], weights_only=True) for files in checkpoints]
    assert [checkpoint["global_step"] for checkpoint in steps] == [8, 16], "the file of the first was overwritten"
    here = {file.name: file for file in (run / "model").iterdir()}
    assert {path: Path(entry["local_path"]) for path, entry in model.items()} == here, "W&B holds a second copy"
    assert "model.safetensors" in here


@pytest.mark.slow
def test_a_finding_is_an_alert(run):
    (finding,) = json.loads((run / "findings.json").read_text())
    (alert,) = records_of(run)["alert"]
    assert alert["title"] == "lit_rlhf: kl"
    assert alert["text"] == f"since rollout {finding['since']}: {finding['says']}. Try: {finding['advice']}"


def small_run(folder, rollouts, name="run", ckpt_path=None, **of_logger):
    """An offline run in this process, with samples of two rows every rollout; its folder."""
    logger = wandb_logger(folder / name, continues=ckpt_path, **of_logger)
    callbacks = [Samples(folder / name / "samples.jsonl", 1, 1), checkpointed(folder / name / "checkpoints")]
    sizes = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=4)}
    fit_of(GRPO, sizes, rollouts, callbacks=callbacks, ckpt_path=ckpt_path, logger=logger)
    wandb.finish()
    return folder / name


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    return tmp_path


def test_the_table_of_a_run_that_goes_on_has_what_came_before(offline):
    first = small_run(offline, 2)
    (checkpoint,) = (first / "checkpoints").glob("epoch=1*.ckpt")
    second = small_run(offline, 3, "second", ckpt_path=checkpoint)
    (_, before), (_, rows) = table_of(first), table_of(second)
    assert [row[0] for row in rows] == [0, 0, 1, 1, 2, 2]
    assert rows[:4] == before
    assert records_of(second)["run"][0]["run_id"] == records_of(first)["run"][0]["run_id"]
    assert not [a for a in records_of(first)["artifact"] if a["type"] == "model"], "log_model is off"


def test_the_table_forgets_the_oldest_rollouts_where_texts_are_long(monkeypatch, tmp_path):
    monkeypatch.setattr("lit_rlhf.callbacks.samples._TABLE_CHARACTERS", 100)
    samples, kept = Samples(tmp_path / "x"), []
    for rollout, length in enumerate((25, 25, 25, 1000)):
        samples._add([{"rollout": rollout, "prompt": "p" * 10, "completion": "c" * (length - 10)}] * 2)
        kept.append([line["rollout"] for line in samples.state_dict()["table"]])
    assert kept == [[0, 0], [0, 0, 1, 1], [1, 1, 2, 2], [3, 3]], "the newest rollout stays, however long it is"
