"""Reward models against worked numbers, plain forward passes and Transformers' own sequence classification."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.callbacks.hf_export import HFExport
from lit_rlhf.data.modules import ArithmeticData
from lit_rlhf.data.tasks import character_tokenizer
from lit_rlhf.errors import InputError
from lit_rlhf.models.scoring import Values
from lit_rlhf.text import with_own_pad_token
from tests.helpers import EOS, KINDS, PAD, build, gradients, tiny_model, trainer
from tests.pairs import pair_rows, random_pairs, sequences


def judge(kind="llama", **arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return build(RewardModeling, tiny_model(kind).double(), **arguments)


class Given:
    """Models that give these rewards to the 2N completions."""

    def __init__(self, rewards):
        self.rewards = torch.tensor(rewards, dtype=torch.float64)

    def score_values(self, rows):
        return Values(torch.zeros(rows.response_mask.shape), self.rewards)


@pytest.mark.parametrize(
    ("rewards", "arguments", "expected"),
    [
        ((2, 0), {}, 0.1269280),
        ((2, 0), {"margin": 1}, 0.3132617),
        ((2, 0), {"margin": 1, "temperature": 0.5}, 0.1269280),
        ((2, 0), {"margin": 0.5, "temperature": 0.5}, 0.0485874),  # the seeds' delta / tau - 1
        ((7, 7), {"margin": 0.1, "temperature": 0.1}, 1.3132617),
        ((7, 7), {"margin": 1, "temperature": 0.1}, 10.0000454),
        ((2, 1), {"center_coef": 0.01}, 0.4032617),
        ((3, 2), {}, 0.3132617),  # a constant in both rewards changes nothing
        ((2, 1), {}, 0.3132617),
    ],
)
def test_worked_numbers(rewards, arguments, expected):
    module = judge(**arguments)
    module.__dict__["models"] = Given(rewards)
    assert module.training_step(random_pairs((3,), (2,), (2,))).item() == pytest.approx(expected, abs=1e-6)


def test_the_loss_and_the_metrics_are_the_papers_sums():
    module, batch = judge(margin=0.2, temperature=0.7, center_coef=0.1), random_pairs()
    module.__dict__["models"] = Given([1, 2, 0, -1, 3, 2, 0.5, 1, 0, 1, -2, 2])
    pairs = [(1, 0.5), (2, 1), (0, 0), (-1, 1), (3, -2), (2, 2)]
    ranked = [math.log(1 + math.exp(-(w - r - 0.2) / 0.7)) for w, r in pairs]
    centred = [0.1 * (w + r) ** 2 for w, r in pairs]

    found = module.training_step(batch).item()

    assert found == pytest.approx((sum(ranked) + sum(centred)) / 6, abs=1e-9)
    w, r = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    assert module.pop_metrics() == pytest.approx(
        {
            "loss": found,
            "reward_loss": sum(ranked) / 6,
            "center_loss": sum(centred) / 6,
            "preference_accuracy": 3 / 6,  # a tie is not right
            "reward_margin": float((w - r).mean()),
            "chosen_reward_mean": float(w.mean()),
            "chosen_reward_std": float(w.std()),
            "rejected_reward_mean": float(r.mean()),
            "rejected_reward_std": float(r.std()),
        }
    )


def test_a_rows_own_margin_goes_before_the_modules():
    module, batch = judge(margin=1.0), random_pairs((3, 3), (2, 2), (2, 2))
    module.__dict__["models"] = Given([2, 2, 0, 0])
    own = replace(batch, margin=torch.tensor([0.0, float("nan")]))
    assert module.compare(own).losses["reward_loss"].tolist() == pytest.approx([0.1269280, 0.3132617], abs=1e-6)
    assert module.compare(batch).losses["reward_loss"].tolist() == pytest.approx([0.3132617] * 2, abs=1e-6)


def test_a_rows_margin_is_finite_or_none():
    module, rows = judge(margin=1.0), pair_rows(3)
    batch = module.collate([{**row, "margin": m} for row, m in zip(rows, [0.5, None, float("nan")], strict=True)])
    assert module.margins(batch).tolist() == [0.5, 1.0, 1.0]
    for margin in (math.inf, -math.inf):
        with pytest.raises(InputError, match=f"^a row of pairs: 'margin' is {margin}; expected a finite"):
            module.collate([{**rows[0], "margin": margin}, rows[1]])


@torch.no_grad()
def plain_rewards(module, rows):
    """Each sequence on its own: the trunk's state at its last token, by hand."""
    trunk, head = module.models.policy.base_model, module.models.value_head
    return [float(trunk(torch.tensor([row])).last_hidden_state[0, -1] @ head.weight) for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_is_read_at_the_last_token(kind):
    module, batch = judge(kind), random_pairs()
    found = module.compare(batch)
    expected = [plain_rewards(module, sequences(batch, side)) for side in ("chosen", "rejected")]
    assert found.chosen.tolist() == pytest.approx(expected[0], abs=1e-6)
    assert found.rejected.tolist() == pytest.approx(expected[1], abs=1e-6)
    shorter = [row[:-1] for row in sequences(batch, "chosen")]
    assert found.chosen.tolist() != pytest.approx(plain_rewards(module, shorter), abs=1e-3)


def test_rows_end_with_eos_and_it_is_the_token_that_is_judged():
    module = judge()
    (row,) = [{"prompt": "5 6", "chosen": "7 8", "rejected": "9"}]
    found = module.compare(module.collate([row]))
    assert found.chosen.tolist() == pytest.approx(plain_rewards(module, [[5, 6, 7, 8, EOS]]), abs=1e-6)
    assert found.rejected.tolist() == pytest.approx(plain_rewards(module, [[5, 6, 9, EOS]]), abs=1e-6)


def test_the_head_begins_as_the_n_details_have_it():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build(RewardModeling, tiny_model(hidden_size=512, intermediate_size=16))
    weight = module.models.value_head.weight
    assert weight.shape == (512,)
    assert float(weight.std()) == pytest.approx(1 / math.sqrt(513), rel=0.1)
    assert module.models.reference is None
    assert module.models.value_trunk is None


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("qwen2", False), ("llama", True), ("gpt2", True)])
def test_every_weight_that_is_trained_gets_a_gradient(kind, tied):
    module = build(RewardModeling, tiny_model(kind, tie_word_embeddings=tied).double())
    module.models.policy.base_model.requires_grad_(True)
    found = gradients(module, module.training_step(random_pairs()))
    assert set(found) == {name for name, p in module.models.named_parameters() if p.requires_grad}
    head = module.models.policy.get_output_embeddings().weight
    assert head.requires_grad == tied
    assert "value_head.weight" in found


def test_weights_that_the_user_froze_stay_frozen():
    model = tiny_model()
    model.model.embed_tokens.requires_grad_(False)
    build(RewardModeling, model)
    assert not model.model.embed_tokens.weight.requires_grad


def test_the_gradient_is_that_of_finite_differences():
    module, batch = judge("gpt2", margin=0.2, temperature=0.7, center_coef=0.1), random_pairs()
    found = gradients(module, module.training_step(batch))
    parameters = dict(module.models.named_parameters())
    for name in ("value_head.weight", "policy.transformer.wte.weight", "policy.transformer.h.0.attn.c_attn.weight"):
        index, step, values = int(found[name].abs().argmax()), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameters[name].view(-1)[index] += sign * step
                values.append(module.training_step(batch).item())
                parameters[name].view(-1)[index] -= sign * step
        assert float(found[name].view(-1)[index]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4), name


def test_swapped_pairs_turn_the_sign_of_the_difference():
    """C34: L(u) - L(-u) = -u / tau."""
    module, batch = judge(temperature=0.7), random_pairs()
    swapped = replace(
        batch,
        **{"chosen_ids": batch.rejected_ids, "rejected_ids": batch.chosen_ids},
        **{"chosen_mask": batch.rejected_mask, "rejected_mask": batch.chosen_mask},
    )
    right, wrong = module.compare(batch), module.compare(swapped)
    difference = right.losses["reward_loss"] - wrong.losses["reward_loss"]
    torch.testing.assert_close(difference, -(right.chosen - right.rejected) / 0.7, atol=1e-9, rtol=0)


def test_training_ranks_the_pairs():
    module, batch = judge(), random_pairs()
    optimizer = torch.optim.SGD([p for p in module.models.parameters() if p.requires_grad], lr=0.05)
    for _ in range(20):
        gradients(module, module.training_step(batch))
        optimizer.step()
        metrics = module.pop_metrics()
    assert metrics["preference_accuracy"] == 1
    assert metrics["loss"] < 0.3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": 0}, "algo.temperature must be above 0, got 0"),
        ({"center_coef": -1}, "algo.center_coef must be at least 0, got -1"),
        ({"margin": float("nan")}, "algo.margin must be a finite number, got nan"),
    ],
)
def test_arguments_without_a_meaning_are_refused(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        build(RewardModeling, **arguments)


# what a run leaves


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_rewards(kind, side, tmp_path):
    module, batch = judge(kind), random_pairs()
    module.export_model().save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert (model.config.num_labels, model.config.pad_token_id) == (1, PAD)
    assert type(model).__name__.endswith("ForSequenceClassification")
    rows = [[*row[:-1], EOS] for row in sequences(batch, "chosen")]
    width = max(map(len, rows))
    pad = lambda row, value: [value] * (width - len(row)) if side == "left" else []  # noqa: E731
    end = lambda row, value: [] if side == "left" else [value] * (width - len(row))  # noqa: E731
    ids = torch.tensor([pad(row, PAD) + row + end(row, PAD) for row in rows])
    mask = torch.tensor([pad(row, 0) + [1] * len(row) + end(row, 0) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(ids, attention_mask=mask, position_ids=positions).logits
        usual = model(ids, attention_mask=mask).logits
    assert found.shape == (6, 1)
    assert found[:, 0].tolist() == pytest.approx(plain_rewards(module, rows), abs=1e-5)
    if side == "right":
        assert usual[:, 0].tolist() == pytest.approx(plain_rewards(module, rows), abs=1e-5)


def test_a_runs_folder_holds_the_reward_model_and_its_tokenizer(tmp_path):
    module = RewardModeling(policy="tiny", lr=1e-2, batch_size=4)
    trainer(max_steps=2, callbacks=[HFExport(tmp_path)]).fit(module, datamodule=ArithmeticData(held_out=8))
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    tokenizer.padding_side = "right"
    texts = ["1+2=3", "12+34=47", "99+99=198"]
    rows = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, 0]
        sides = [text.partition("=") for text in texts]
        pairs = [{"prompt": a + "=", "chosen": b, "rejected": b} for a, _, b in sides]
        expected = module.compare(module.collate(pairs)).chosen
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_eos_never_looks_like_padding():
    """Transformers reads the reward at the last token that is no padding: EOS as padding would hide it."""
    tokenizer = character_tokenizer()
    assert with_own_pad_token(tokenizer) is tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    module = RewardModeling(policy="tiny", tokenizer=tokenizer)
    assert module.tokenizer.pad_token_id != module.tokenizer.eos_token_id == tokenizer.eos_token_id
    assert module.export_model().config.pad_token_id == module.tokenizer.pad_token_id
    assert tokenizer.pad_token_id == tokenizer.eos_token_id, "the user's own tokenizer stays as it is"
    bare = character_tokenizer()
    bare.pad_token, bare.unk_token = bare.eos_token, None
    other = with_own_pad_token(bare)
    assert other.pad_token_id is not None
    assert other.pad_token_id != other.eos_token_id
