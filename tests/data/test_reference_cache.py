"""Log-probs of the reference on disk: the right ones, computed once, by the untrained policy alone."""

import pytest
import torch

from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.checkpoints import AtomicCheckpointIO
from lit_rlhf.data import reference_cache
from lit_rlhf.data.modules import ArithmeticData, RowsDataModule
from lit_rlhf.data.reference_cache import weights_digest
from lit_rlhf.errors import InputError
from tests.algorithms.test_resume import checkpointed
from tests.helpers import assert_gradients_equal, build, gradients, tiny_model, trainer
from tests.pairs import pair_rows, plain_pairs

ROWS, HELD_OUT = pair_rows(8), pair_rows(11)[8:]


def make(folder, seed=0, **arguments):
    defaults = {"batch_size": 4, "lr": 1e-2, "seed": 7, "reward_funcs": None}
    return build(DPO, tiny_model(seed=seed).double(), reference_cache=folder, **{**defaults, **arguments})


def fit(module, rows=ROWS, held_out=HELD_OUT, devices=1, epochs=2, ckpt_path=None, callbacks=(), validate=False):
    saves = {"callbacks": list(callbacks), "enable_checkpointing": bool(callbacks), "plugins": [AtomicCheckpointIO()]}
    fitter = trainer(devices, epochs=epochs, limit_val_batches=1.0, **saves)
    data = RowsDataModule(rows, held_out)
    if validate:
        fitter.validate(module, datamodule=data, verbose=False)
    fitter.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def files(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def scored(monkeypatch):
    """How many pairs were scored for the cache."""
    seen, scored = [], reference_cache._scored
    monkeypatch.setattr(reference_cache, "_scored", lambda m, pairs: seen.append(len(pairs)) or scored(m, pairs))
    return seen


def test_the_batches_carry_the_log_probs_of_the_reference(tmp_path):
    module = make(tmp_path)
    reference = tiny_model().double()
    fit(module, epochs=1)
    assert module.models.reference is None, "no second model is held"
    batch = module.collate(ROWS)
    chosen, rejected = plain_pairs(reference, batch)
    torch.testing.assert_close(batch.ref_chosen, chosen, atol=1e-6, rtol=0)
    torch.testing.assert_close(batch.ref_rejected, rejected, atol=1e-6, rtol=0)
    assert weights_digest(module.models.policy) != weights_digest(reference), "the policy has moved meanwhile"
    assert batch.ref_chosen.dtype == torch.float64


def test_loss_and_gradient_are_those_with_a_reference_model(tmp_path):
    trained, whole = fit(make(tmp_path), epochs=1), build(DPO, tiny_model().double())
    whole.models.policy.load_state_dict(trained.models.policy.state_dict())
    expected = whole.training_step(whole.collate(ROWS))
    found = trained.training_step(trained.collate(ROWS))
    assert found.item() == pytest.approx(expected.item(), abs=1e-8)
    assert_gradients_equal(gradients(trained, found), gradients(whole, expected), atol=1e-7)


@pytest.mark.parametrize("validate", [False, True])
def test_the_run_is_that_with_a_reference_model(validate, tmp_path):
    cached, whole = fit(make(tmp_path), validate=validate), fit(make(None), validate=validate)
    for (name, found), expected in zip(
        cached.models.policy.named_parameters(), whole.models.policy.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=name)
    found, expected = (
        {k: float(v) for k, v in m.trainer.callback_metrics.items() if k[:4] == "val/"} for m in (cached, whole)
    )
    assert found == pytest.approx(expected, abs=1e-6)
    assert found["val/reward_margin"] != 0


def test_they_are_computed_once_and_found_again(tmp_path, scored):
    first = fit(make(tmp_path), validate=True)
    assert scored == [3, 8], "held-out pairs for the validation before the fit, then the training pairs"
    assert len(files(tmp_path)) == 2
    second = fit(make(tmp_path))
    assert len(scored) == 2
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"seed": 1}, [8, 3]),  # other weights
        ({"rows": [*ROWS[1:], {**ROWS[0], "chosen": "60"}]}, [8]),  # other pairs
        ({"lr": 1e-3}, []),
        ({"batch_size": 2}, []),
    ],
)
def test_other_weights_and_other_pairs_are_computed_anew(change, again, tmp_path, scored):
    fit(make(tmp_path))
    scored.clear()
    rows = change.pop("rows", ROWS)
    fit(make(tmp_path, **change), rows)
    assert scored == again


def test_weights_of_another_dtype_are_other_weights():
    model = tiny_model()
    assert weights_digest(model) == weights_digest(tiny_model())
    digests = {weights_digest(m) for m in (model, tiny_model(seed=1), tiny_model().double(), tiny_model().bfloat16())}
    assert len(digests) == 4


@pytest.mark.parametrize("folder_of", ["same", "empty"])
def test_a_resumed_run_takes_the_log_probs_its_run_began_with(folder_of, tmp_path, scored):
    whole = fit(make(tmp_path / "same"), callbacks=[checkpointed(tmp_path, every_n_train_steps=1)])
    scored.clear()
    resumed = lambda: fit(make(tmp_path / folder_of, seed=1), ckpt_path=tmp_path / "epoch=0-step=1.ckpt")  # noqa: E731
    if folder_of == "same":
        for a, b in zip(whole.parameters(), resumed().parameters(), strict=True):
            assert torch.equal(a, b)
    else:
        with pytest.raises(InputError, match=r"there is no .*\.pt, .* of 8 pairs, .* give the folder the run"):
            resumed()
    assert scored == [], "the trained policy is not the reference"


class Changing(RowsDataModule):
    """Other rejected completions from a pass on."""

    def __init__(self, from_pass):
        super().__init__(ROWS)
        self.from_pass = from_pass

    def rows_of(self, iteration):
        return [{**row, "rejected": "9"} for row in ROWS] if iteration >= self.from_pass else ROWS


@pytest.mark.parametrize(("from_pass", "steps"), [(1, 0), (2, 4)])  # before anything is trained, if one pass shows it
def test_pairs_that_change_from_pass_to_pass_are_refused(from_pass, steps, tmp_path):
    fitter = trainer(epochs=3)
    with pytest.raises(InputError, match=r"needs the same pairs in every pass, and these change; give data"):
        fitter.fit(make(tmp_path), datamodule=Changing(from_pass))
    assert fitter.global_step == steps


def test_the_built_in_task_has_fixed_pairs_for_it(tmp_path):
    data = {"held_out": 4, "train_size": 16}
    run = lambda **extra: trainer(epochs=2).fit(  # noqa: E731
        DPO(policy="tiny", batch_size=8, reference_cache=tmp_path), datamodule=ArithmeticData(**data, **extra)
    )
    run(fixed_pairs=True)
    with pytest.raises(InputError, match="and these change"):
        run()


def test_a_dictionary_batch_has_no_log_probs_and_is_refused(tmp_path):
    module = fit(make(tmp_path), epochs=1)
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3)}
    batch = {f"chosen_{key}": value for key, value in ids.items()}
    batch |= {"rejected_input_ids": torch.tensor([[5, 6, 8]]), "rejected_attention_mask": torch.ones(1, 3)}
    with pytest.raises(InputError, match="no reference model is held; leave"):
        module.training_step(batch)


@pytest.mark.parametrize("damage", ["truncated", "other", "empty"])
def test_a_damaged_file_is_named(damage, tmp_path):
    fit(make(tmp_path), held_out=())
    (file,) = tmp_path.iterdir()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "empty":
        torch.save({}, file)
    else:
        torch.save({"logprobs": torch.zeros(3), "lengths": torch.tensor([3])}, file)
    with pytest.raises(InputError, match=f"algo.reference_cache: .*{file.name} .*; delete it"):
        fit(make(tmp_path), held_out=())


def test_a_broken_save_leaves_nothing_that_would_be_read(tmp_path, monkeypatch):
    def half(saved, path):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        fit(make(tmp_path))
    assert not list(tmp_path.glob("*.pt"))


class Runs:
    """What unpickles into a command."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(make(tmp_path / "cache"), held_out=())
    (file,) = (tmp_path / "cache").iterdir()
    torch.save({"logprobs": Runs(), "lengths": torch.ones(1)}, file)
    with pytest.raises(InputError, match="delete it"):
        fit(make(tmp_path / "cache"), held_out=())
    assert not (tmp_path / "ran").exists()


def test_two_ranks_compute_them_together_and_one_writes(tmp_path):
    two = fit(make(tmp_path / "two"), devices=2)
    one = fit(make(tmp_path / "one"))
    assert files(tmp_path / "two") == files(tmp_path / "one")
    for name in files(tmp_path / "one"):
        saved = [torch.load(tmp_path / folder / name, weights_only=True) for folder in ("one", "two")]
        assert saved[0]["lengths"].tolist() == saved[1]["lengths"].tolist()
        torch.testing.assert_close(saved[0]["logprobs"], saved[1]["logprobs"], atol=1e-6, rtol=0)
    for (name, a), b in zip(one.models.policy.named_parameters(), two.models.policy.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0, msg=name)
    resumed = fit(make(tmp_path / "one"), devices=2)  # a file from one process serves two
    for a, b in zip(resumed.models.policy.parameters(), two.models.policy.parameters(), strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)
