"""The whole path on real data: GSM8K's own files and a pretrained model, where they lie beside the checkout."""

import math

import pytest

from tests.helpers import SHARED
from tests.runs import QUIET, fork, metrics_of

MODEL, DATA = SHARED / "models" / "stories260k", SHARED / "data" / "gsm8k"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL.is_dir() and DATA.is_dir()), reason="needs stories260k and GSM8K's files"),
]
PART = ("data.long_rows=drop", "data.validation_batch_size=32", "trainer.limit_val_batches=1", "threads=1")


def test_imitation_lowers_the_perplexity_of_solutions_not_seen_and_rewards_go_on_from_there(tmp_path):
    data = (f"data.path={DATA / 'train.jsonl'}", f"data.validation_path={DATA / 'test.jsonl'}", *PART, *QUIET)
    sft = ("algo=sft", f"model.path={MODEL}", "algo.lr=1e-3", "trainer.max_steps=12", "rollout.max_new_tokens=4")
    ended = fork(*sft, *data, f"hydra.run.dir={tmp_path}/sft", cwd=tmp_path)
    assert ended.code == 0, ended.err
    measured = [row for row in metrics_of(tmp_path / "sft") if "val/perplexity" in row]
    before, after = (row["val/perplexity"] for row in (measured[0], measured[-1]))
    assert measured[0]["val/sft_loss"] == pytest.approx(math.log(before), rel=1e-6)
    assert after < 0.9 * before
    grpo = ("algo=grpo", f"model.path={tmp_path}/sft/model", "trainer.max_epochs=1", "rollout.max_new_tokens=16")
    small = ("algo.prompts_per_rollout=4", "algo.group_size=2")
    ended = fork(*grpo, *small, *data, f"hydra.run.dir={tmp_path}/grpo", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert any("rewards/numeric_answer" in row for row in metrics_of(tmp_path / "grpo"))
