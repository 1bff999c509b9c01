"""What must hold for every algorithm on pairs: padding, splits, ranks, resuming, validation, and its data."""

from dataclasses import fields, replace

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.algorithms.reward_modeling import RewardModeling
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.types import PreferenceBatch, SamplingConfig
from tests.algorithms.test_resume import SaveAt, assert_same, checkpointed, everything
from tests.helpers import (
    EOS,
    NumberTokenizer,
    assert_gradients_equal,
    build,
    gradients,
    pretend_trainer,
    tiny_model,
    trainer,
    with_columns,
)
from tests.pairs import pair_rows, random_pairs, sequences

SETTINGS = {
    "dpo": (DPO, {"beta": 0.3}),
    "ipo": (DPO, {"kind": "ipo"}),
    "robust": (DPO, {"kind": "robust", "label_smoothing": 0.1}),
    "hinge": (DPO, {"kind": "hinge"}),
    "reward": (RewardModeling, {"margin": 0.2, "temperature": 0.7, "center_coef": 0.1}),
}


def make(name, model=None, algorithm=None, **arguments):
    """A module in float64, of the DPO family one that has moved from its reference."""
    known, extra = SETTINGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)  # a reward head begins at random
        module = build(algorithm or known, model, **{**extra, **arguments})
    if module.models.reference is not None:
        module.models.reference.load_state_dict(tiny_model(seed=1).state_dict())
    return module


def loss_gradients_metrics(module, *batches):
    losses = [module.training_step(batch) for batch in batches]
    return sum(losses).item(), gradients(module, *losses), module.pop_metrics()


def assert_metrics_equal(found, expected, without=()):
    assert found.keys() == expected.keys()
    assert any(value != 0 for value in expected.values())
    for name in expected.keys() - set(without):
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name


# C26, C27


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 3)])
@pytest.mark.parametrize("name", SETTINGS)
def test_padding_columns_of_garbage_change_nothing(name, left, right):
    module, batch = make(name), random_pairs()
    if module.models.reference is not None:  # so that NaN in given log-probs is seen, too
        chosen, rejected = module.reference_logprobs(batch).chunk(2)
        batch = replace(batch, ref_chosen=chosen, ref_rejected=rejected)
    loss, expected, metrics = loss_gradients_metrics(module, batch)

    padded = with_columns(batch, left, right)
    assert padded.chosen_ids.shape[1] == batch.chosen_ids.shape[1] + right
    found_loss, found, found_metrics = loss_gradients_metrics(module, padded)

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    assert_metrics_equal(found_metrics, metrics)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_order_of_the_pairs_does_not_matter(name):
    module, batch = make(name), random_pairs()
    loss, expected, metrics = loss_gradients_metrics(module, batch)
    found_loss, found, found_metrics = loss_gradients_metrics(module, batch[torch.tensor([4, 1, 5, 0, 3, 2])])
    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    assert_metrics_equal(found_metrics, metrics)


# C28


EMPTY = {"chosen": (3, 7, 0, 5, 2, 6), "rejected": (2, 4, 0, 5, 1, 3)}  # the third pair counts for nothing
SPLITS = {
    "even": [[0, 1, 2], [3, 4, 5]],
    "uneven": [[5, 0], [2], [1, 3, 4]],
    "one by one": [[0], [1], [2], [3], [4], [5]],
}


def split(batch, parts):
    counts = {"step_tokens": batch.response_mask.sum(), "step_rows": batch.response_mask.any(1).sum()}
    return [replace(batch[torch.tensor(rows)], **counts) for rows in parts]


@pytest.mark.parametrize("parts", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("name", SETTINGS)
def test_any_split_into_micro_batches_gives_the_same_gradient(name, parts):
    module, batch = make(name), random_pairs(**EMPTY)
    loss, expected, metrics = loss_gradients_metrics(module, batch)
    others = loss_gradients_metrics(module, batch[torch.tensor([0, 1, 3, 4, 5])])
    assert loss == pytest.approx(others[0], abs=1e-12), "a pair without a token counts for nothing"
    assert_metrics_equal(others[2], metrics)

    found_loss, found, found_metrics = loss_gradients_metrics(module, *split(batch, parts))

    assert found_loss == pytest.approx(loss, abs=1e-12)
    assert_gradients_equal(found, expected)
    shares = [key for key in metrics if key.endswith("loss")]  # a mean over the micro-batches of their shares
    assert_metrics_equal(found_metrics, metrics, without=shares)
    for key in shares:
        assert found_metrics[key] * len(parts) == pytest.approx(metrics[key], abs=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_undoes_what_lightning_and_ddp_divide_by(name):
    module, batch = make(name), random_pairs()
    whole = module.training_step(batch).item()
    pretend_trainer(module, accumulate=3, world_size=2)
    losses = [module.training_step(part).item() for part in split(batch, SPLITS["uneven"])]
    assert sum(losses) / 3 / 2 == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_without_counts_a_batch_is_one_of_the_steps_micro_batches(name):
    module, batch = make(name), random_pairs()
    whole = module.training_step(batch).item()
    pretend_trainer(module, accumulate=4)
    assert module.training_step(batch).item() / 4 == pytest.approx(whole / 4, abs=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
def test_pairs_without_a_token_have_gradients_of_zero(name):
    module, batch = make(name), random_pairs((0, 0), (0, 0), (2, 3))
    loss, found, _ = loss_gradients_metrics(module, batch)
    assert loss == 0
    assert set(found) == {name for name, p in module.models.named_parameters() if p.requires_grad}
    assert all((gradient == 0).all() for gradient in found.values())


# ranks and micro-batches in Lightning's own loop


def reported(algorithm, folder):
    """Plain gradient descent, leaving behind what every rank ended with."""

    class Reported(algorithm):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.models.parameters() if p.requires_grad], 0.1)

        def publish(self, stats, extra=None):
            self.published = {name: float(value) for name, value in stats.compute().items()}
            return super().publish(stats, extra)

        def on_fit_end(self):
            weights = {n: p for n, p in self.models.state_dict().items() if not n.startswith("reference")}
            report = {"weights": weights, "metrics": self.published, "steps": self.global_step}
            torch.save(report, folder / f"{self.trainer.world_size}x{self.accumulate}-{self.rank}.pt")

    return Reported


def run(module, rows, folder, devices, accumulate=1):
    trainer(devices, accumulate).fit(module, datamodule=RowsDataModule(rows))
    files = [folder / f"{devices}x{accumulate}-{rank}.pt" for rank in range(devices)]
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("name", ["dpo", "ipo", "reward"])
def test_ranks_and_micro_batches_make_the_same_steps(name, layout, tmp_path):
    untied = {"tie_word_embeddings": False} if name == "reward" else {}
    model = lambda: tiny_model(**untied).double()  # noqa: E731
    module = lambda: make(name, model(), reported(SETTINGS[name][0], tmp_path), batch_size=8)  # noqa: E731
    rows = pair_rows(17)
    (expected,) = run(module(), rows, tmp_path, 1)
    start = {n: p.clone() for n, p in module().models.state_dict().items()}
    for found in run(module(), rows, tmp_path, *layout):
        assert found["steps"] == expected["steps"] == 2
        moved = 0.0
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, atol=1e-10, rtol=0)
            moved = max(moved, float((weight - start[key]).abs().max()))
        assert moved > 1e-4, "the steps changed nothing"
        assert_metrics_equal(found["metrics"], expected["metrics"])


# a killed run


PASSES, STEPS = 3, 4


def fit(name, accumulate=1, seed=0, ckpt_path=None, callbacks=(), devices=1, rows=None, **arguments):
    algorithm, extra = SETTINGS[name]
    optimisation = {"lr": 1e-2, "lr_schedule": "linear", "warmup_steps": 2, "seed": 7, "batch_size": 8}
    torch.manual_seed(seed)
    module = build(algorithm, tiny_model(seed=seed), **{**optimisation, **extra, **arguments})
    saves = any(hasattr(callback, "save_top_k") for callback in callbacks)
    saving = {"callbacks": list(callbacks), "enable_checkpointing": saves}
    fitter = trainer(devices, accumulate, PASSES, gradient_clip_val=1.0, plugins=[AtomicCheckpointIO()], **saving)
    fitter.fit(module, datamodule=RowsDataModule(rows or pair_rows(STEPS * 8)), ckpt_path=ckpt_path)
    return module, fitter


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("name", "cached"), [("dpo", False), ("dpo", True), ("reward", False)])
def test_a_resumed_run_ends_bit_for_bit_like_one_without_a_break(name, accumulate, cached, tmp_path):
    extra = {"reference_cache": tmp_path / "cache"} if cached else {}
    odd = SaveAt(2 * STEPS + 1, tmp_path / "odd.ckpt")  # within a step where there are two micro-batches
    whole = fit(name, accumulate, callbacks=[checkpointed(tmp_path, every_n_train_steps=1), odd], **extra)
    expected = everything(*whole)
    assert whole[1].global_step == PASSES * STEPS
    for file in (f"epoch=1-step={STEPS + 2}.ckpt", f"epoch=1-step={2 * STEPS}.ckpt", "odd.ckpt"):
        # the resumed run begins with other weights, that the checkpoint replaces
        assert_same(everything(*fit(name, accumulate, seed=1, ckpt_path=tmp_path / file, **extra)), expected)
    other = everything(*fit(name, accumulate, seed=1, **extra))
    assert not torch.equal(
        other["weights"]["models.policy.lm_head.weight"], expected["weights"]["models.policy.lm_head.weight"]
    )


def test_a_run_is_not_continued_with_another_batch_size(tmp_path):
    fit("dpo", callbacks=[checkpointed(tmp_path, every_n_epochs=1)])
    with pytest.raises(InputError, match=r"algo.batch_size=8 \(now 4\); resume with the same"):
        fit("dpo", ckpt_path=tmp_path / "epoch=0-step=4.ckpt", batch_size=4)
    with pytest.raises(InputError, match=r"algo.reference_cache=null \(now a folder\); resume with the same"):
        fit("dpo", ckpt_path=tmp_path / "epoch=0-step=4.ckpt", reference_cache=tmp_path)


# batches as plain dictionaries


NAMES = {
    "dpo": {"implicit_reward", "chosen_reward", "rejected_reward", "reward_margin", "preference_accuracy"},
    "reward": {
        *("preference_accuracy", "reward_margin", "chosen_reward_mean", "rejected_reward_mean"),
        *("chosen_reward_std", "rejected_reward_std"),
    },
}


def as_dict(batch, left=0):
    """Whole sequences in Signal's format, padded with garbage on the right, or on the left."""
    found = {}
    for side in ("chosen", "rejected"):
        rows = sequences(batch, side)
        width = max(map(len, rows)) + 2
        pad = lambda row, value: [value] * (width - len(row)) if left else []  # noqa: B023, E731
        end = lambda row, value: [] if left else [value] * (width - len(row))  # noqa: B023, E731
        found[f"{side}_input_ids"] = torch.tensor([pad(r, 9) + r + end(r, 9) for r in rows])
        found[f"{side}_attention_mask"] = torch.tensor([pad(r, 0) + [1] * len(r) + end(r, 0) for r in rows])
    return found


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["dpo", "robust", "hinge", "reward"])
def test_a_dictionary_of_sequences_gives_the_loss_and_gradient_of_the_typed_batch(name, left):
    module, batch = make(name), random_pairs()
    batch.rejected_ids[3, :2] = batch.chosen_ids[3, :2]  # completions that begin alike: the border is not to be seen
    loss, expected, metrics = loss_gradients_metrics(module, batch)
    found_loss, found, found_metrics = loss_gradients_metrics(module, as_dict(batch, left))
    assert found_loss == pytest.approx(loss, abs=1e-9)
    assert_gradients_equal(found, expected, atol=1e-7)  # what cancels does so in float32, in which Llama's norm works
    documented = NAMES["reward" if name == "reward" else "dpo"]
    assert documented <= found_metrics.keys() == metrics.keys()
    for key in ("preference_accuracy", "reward_margin", "loss"):
        assert found_metrics[key] == pytest.approx(metrics[key], abs=1e-9), key


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_lightning_trains_on_a_loader_of_dictionaries(name):
    module = make(name, tiny_model())
    before = {n: p.clone() for n, p in module.models.policy.state_dict().items()}
    trainer(epochs=2).fit(module, torch.utils.data.DataLoader([as_dict(random_pairs())], batch_size=None))
    assert module.global_step == 2
    assert any(not torch.equal(before[n], p) for n, p in module.models.policy.state_dict().items())


# data


def test_every_pair_is_seen_once_a_pass_with_eos_and_its_margin():
    rows = pair_rows(10, margin=[0.5, None, *range(8)])
    module = make("reward", batch_size=3)
    loader = module.training_loader(lambda i: rows)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    seen = [row for batch in batches for row in batch_rows(batch)]
    assert len(seen) == len(set(seen)) == 9
    encoded = {encoded_row(row) for row in rows}
    assert set(seen) <= encoded
    again = [row for batch in loader for row in batch_rows(batch)]
    assert set(again) <= encoded
    assert again != seen, "each pass has an order of its own"


def encoded_row(row):
    encode = lambda text: tuple(NumberTokenizer().encode(text))  # noqa: E731
    margin = "none" if row["margin"] is None else float(row["margin"])
    return encode(row["prompt"]), (*encode(row["chosen"]), EOS), (*encode(row["rejected"]), EOS), margin


def batch_rows(batch):
    for i in range(len(batch)):
        ids = [
            tuple(getattr(batch, f"{part}_ids")[i][getattr(batch, f"{part}_mask")[i]].tolist())
            for part in ("prompt", "chosen", "rejected")
        ]
        margin = float(batch.margin[i])
        yield *ids, "none" if margin != margin else margin


@pytest.mark.parametrize(
    ("rows", "arguments", "sentence"),
    [
        (pair_rows(3), {"batch_size": 4}, "3 pairs do not fill one batch of algo.batch_size=4"),
        (
            [{"prompt": "5", "chosen": "6"}] * 4,
            {"batch_size": 4},
            "DPO needs a text 'chosen' and a text 'rejected' in every row; 4 of 4 have not, only chosen, prompt",
        ),
        (
            [*pair_rows(3), {"prompt": "5", "chosen": "6", "rejected": None}],
            {"batch_size": 4},
            "1 of 4 have not, only chosen, prompt",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_refused(rows, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        trainer().fit(make("dpo", **arguments), datamodule=RowsDataModule(rows))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="batch_size=6 does not divide over 1 devices"):
        trainer(accumulate=4).fit(make("dpo", batch_size=6), datamodule=RowsDataModule(pair_rows(8)))


CONTEXT = 128


@pytest.mark.parametrize("long_side", ["chosen", "rejected"])
@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_a_pair_may_fill_the_context_and_no_more(name, long_side):
    def pair(tokens):
        sides = {"chosen": "6", "rejected": "7", long_side: "6 " * tokens}
        return {"prompt": "5", **sides}

    fits, long = pair(CONTEXT - 2), pair(CONTEXT - 1)
    for rows, held_out, which in (([fits] * 3 + [long], [], "training"), ([fits] * 4, [fits] * 3 + [long], "held-out")):
        data = RowsDataModule(rows, held_out)
        with pytest.raises(InputError, match=f"1 of 4 {which} rows with .* the longest has 129 tokens, .* 128;"):
            trainer().fit(make(name, batch_size=4, reward_funcs=None), datamodule=data)


# validation


def validated(module, held_out, devices=1, **arguments):
    fitter = trainer(devices, limit_val_batches=1.0)
    fitter.validate(module, datamodule=RowsDataModule([], held_out, **arguments), verbose=False)
    return {name: float(value) for name, value in fitter.callback_metrics.items()}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", ["dpo", "ipo", "reward"])
def test_held_out_pairs_are_ranked_and_held_out_prompts_sampled(name, devices):
    module = make(name, sampling=SamplingConfig(max_new_tokens=4))
    rows = pair_rows(12)[1:]  # the first is a tie, which rounding decides
    found = validated(
        module,
        [*rows[:5], {"prompt": "9 9", "chosen": None, "rejected": ""}, *rows[5:]],
        devices,
        validation_batch_size=2,
    )
    compared = module.compare(module.collate(rows))
    right = float((compared.chosen > compared.rejected).double().mean())
    assert 0 < right < 1
    assert found["val/preference_accuracy"] == pytest.approx(right, abs=1e-6)
    margin = float((compared.chosen - compared.rejected).mean())
    assert found["val/reward_margin"] == pytest.approx(margin, abs=1e-6)
    sampled = {name for name in found if name.endswith(("greedy", "sampled"))}
    assert bool(sampled) == (name != "reward"), "a reward model samples nothing"


def test_without_rewards_or_without_pairs_what_is_left_is_validated():
    module = make("dpo", reward_funcs=None)
    assert validated(module, pair_rows(4)).keys() == {"val/preference_accuracy", "val/reward_margin"}
    assert validated(make("reward", reward_funcs=None), [{"prompt": "5"}]) == {}
    sampled = validated(make("dpo", sampling=SamplingConfig(max_new_tokens=4)), [{"prompt": "5"}])
    assert "val/reward_greedy" in sampled
    assert "val/preference_accuracy" not in sampled


def test_a_pair_that_is_alike_has_equal_rewards_and_is_not_right():
    rows = [{"prompt": "5 6", "chosen": "7 8", "rejected": "7  8"}] * 2  # other texts, the same tokens
    for name in ("dpo", "reward"):
        found = validated(make(name, reward_funcs=None), rows)
        assert found == {"val/preference_accuracy": 0, "val/reward_margin": 0}


def test_the_batch_type_has_the_fields_that_these_tests_pad():
    two_dimensional = {f.name for f in fields(PreferenceBatch)} - {"margin", "step_tokens", "step_rows"}
    assert {name.split("_")[0] for name in two_dimensional} == {"prompt", "chosen", "rejected", "ref"}
