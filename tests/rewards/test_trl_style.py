"""Reward functions written for TRL run as they are: called by hand, and in a rollout of a training run."""

import math

import pytest
import torch

from lit_rlhf import GRPO
from lit_rlhf.data import RowsDataModule
from lit_rlhf.rewards import RewardFunctions, TrainerState
from lit_rlhf.types import SamplingConfig
from tests.helpers import NumberTokenizer, tiny_model, trainer
from tests.rewards.trl_style import CHAT, PLAIN, SCRIPT

ASK = [{"role": "system", "content": "short"}, {"role": "user", "content": "6*7"}]
COLUMNS = {"answer": "42", "task": "math"}
NAMES = {kind: RewardFunctions([fn for fn, _ in table]).names for kind, table in (("plain", PLAIN), ("chat", CHAT))}
CASES = [(kind, *case) for kind, table in (("plain", PLAIN), ("chat", CHAT)) for case in table]


def test_there_are_twenty_at_least_and_none_twice():
    assert len(PLAIN) >= 20
    assert len({*NAMES["plain"], *NAMES["chat"]}) == len(CASES)


@pytest.mark.parametrize(("kind", "fn", "expected"), CASES, ids=[*NAMES["plain"], *NAMES["chat"]])
def test_it_gives_what_it_should(kind, fn, expected):
    rewards = RewardFunctions(fn)
    rewards.trainer_state = TrainerState(global_step=0, epoch=0.0, max_steps=4)
    N = len(SCRIPT)
    prompts = ["6 * 7 ="] * N if kind == "plain" else [ASK] * N
    columns = {name: [value] * N for name, value in COLUMNS.items()}
    total, parts = rewards(prompts, SCRIPT, [[5] * 64] * N, columns)
    wanted = torch.tensor([math.nan if x is None else x for x in expected], dtype=torch.float32)
    torch.testing.assert_close(parts[:, 0], wanted, equal_nan=True)
    torch.testing.assert_close(total, wanted, equal_nan=True)
    assert ASK == [{"role": "system", "content": "short"}, {"role": "user", "content": "6*7"}]


class Scripted(NumberTokenizer):
    """Whatever is sampled reads as one of the texts of the script: its first token says which."""

    chat_template = "contents, joined by spaces"

    def encode(self, text, add_special_tokens=True):
        return [2 + ord(c) % 60 for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return SCRIPT[ids[0] % len(SCRIPT)]

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return " ".join(message["content"] for message in messages)


class Kept(GRPO):
    """Keeps what was sampled, and what would have been logged."""

    def sample_recorded(self, prompts):
        self.sampled = super().sample_recorded(prompts)
        self.logged = {name: float(value) for name, value in self.stats.compute().items()}
        return self.sampled


@pytest.mark.parametrize(("kind", "table"), [("plain", PLAIN), ("chat", CHAT)])
def test_they_run_in_a_rollout_of_a_training_run(kind, table):
    tasks = ["math", "code"]
    rows = [{"prompt": "6 * 7 =" if kind == "plain" else ASK, **COLUMNS, "task": tasks[i % 2]} for i in range(8)]
    module = Kept(
        policy=tiny_model(),
        tokenizer=Scripted(),
        reward_funcs=[fn for fn, _ in table],
        reward_weights=[1.0 + i for i in range(len(table))],
        group_size=4,
        prompts_per_rollout=8,
        sampling=SamplingConfig(max_new_tokens=5, temperature=4.0),
    )
    trainer(max_epochs=1).fit(module, datamodule=RowsDataModule(rows))

    texts = (module.sampled.response_ids[:, 0] % len(SCRIPT)).tolist()
    assert set(texts) == set(range(len(SCRIPT))), "some texts were never judged"
    mathematics = [rows[i % 8]["task"] == "math" for i in order_of(module)]
    total = torch.zeros(32)
    for k, (name, (_, expected)) in enumerate(zip(NAMES[kind], table, strict=True)):
        value = {"if_mathematics": lambda i, m, e=expected: e[i] if m else None}
        value["if_code"] = lambda i, m: None if m else float(i == 4)
        of = value.get(name, lambda i, m, e=expected: e[i])
        found = [of(i, m) for i, m in zip(texts, mathematics, strict=True)]
        wanted = torch.tensor([math.nan if x is None else x for x in found], dtype=torch.float32)
        torch.testing.assert_close(module.sampled.reward_parts[:, k], wanted, equal_nan=True, msg=name)
        assert module.logged[f"rewards/{name}"] == pytest.approx(float(wanted.nanmean()), abs=1e-6)
        assert module.logged[f"rewards/{name}_std"] == pytest.approx(float(wanted[~wanted.isnan()].std()), abs=1e-5)
        total += (1.0 + k) * wanted.nan_to_num()
    torch.testing.assert_close(module.sampled.raw_rewards, total)
    if kind == "plain":
        right = sum(text in (0, 2, 3, 4, 5) for text in texts) / 32
        assert module.logged["rewards/logging/accuracy"] == pytest.approx(right)
        assert module.rewards.extras["logging/gold"] == ["42"] * 32
        assert module.rewards.extras["logging/seen"] == [SCRIPT[i] for i in texts]


def order_of(module):
    """The dataset's row of every sample."""
    return [module.prompts._row(position) for position in module.sampled.group_ids.tolist()]
