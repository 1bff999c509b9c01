"""Samples in `samples.jsonl` and W&B, and how a run looks to W&B."""

import json

import pytest

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.callbacks.samples import Samples
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import fit_of

SIZES = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=4)}


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_first_token(completion_ids, **kwargs):
    return [float(ids[0]) if ids[0] % 3 else None for ids in completion_ids]


def test_the_first_the_last_and_every_so_many_rollouts_are_written_down(tmp_path):
    seen = []

    class Watched(GRPO):
        def experience(self, rollout):
            seen.append(super().experience(rollout))
            return seen[-1]

    samples = Samples(tmp_path / "samples.jsonl", every_n_rollouts=3, groups=1)
    fit_of(Watched, {**SIZES, "reward_funcs": [by_first_token]}, 5, callbacks=[samples])
    lines = lines_of(tmp_path / "samples.jsonl")
    assert [line["rollout"] for line in lines] == [0, 0, 3, 3, 4, 4]
    for line, i in zip(lines, [0, 1] * 3, strict=True):
        rows = seen[line["rollout"]]
        ids = rows.response_ids[i][rows.response_mask[i]].tolist()
        assert line["completion"] == " ".join(str(token) for token in ids if token > 1)
        assert line["prompt"] == " ".join(map(str, rows.prompt_ids[i][rows.prompt_mask[i]].tolist()))
        assert line["tokens"] == len(ids)
        assert line["finish"] == ("length" if len(ids) == 4 and ids[-1] != 1 else "stop")
        assert line["reward"] == (float(ids[0]) if ids[0] % 3 else None)
        assert line["rewards"] == {"by_first_token": line["reward"]}
        assert line["advantage"] == pytest.approx(float(rows.advantages[i, 0]), abs=1e-6)


def test_rows_of_another_version_are_left_out_of_the_table():
    row = {"rollout": 0, "prompt": "a", "completion": "b", "reward": 1.0, "rewards": {"even": 1.0}}
    row |= {"advantage": 0.5, "tokens": 1, "finish": "stop"}
    samples = Samples("samples.jsonl")
    samples.load_state_dict({"table": [row, {"rollout": 0, "prompt": "a", "completion": "b"}]})
    assert samples.state_dict() == {"table": [row]}
    samples.load_state_dict({})
    assert samples.state_dict() == {"table": []}


def test_a_resumed_run_goes_on_with_the_file(tmp_path):
    for _ in range(2):
        fit_of(GRPO, SIZES, 1, callbacks=[Samples(tmp_path / "samples.jsonl")])
    assert len(lines_of(tmp_path / "samples.jsonl")) == 8
