"""Checkpoints that cannot be continued, or evaluated."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from tests.malformed.answers import QUICK, SMALL, Payload, evaluated, trained
from tests.runs import fork

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of one rollout."""
    folder = tmp_path_factory.mktemp("checkpoint")
    finished = fork(*QUICK, *SMALL, "hydra.run.dir=run", "callbacks.export=null", cwd=folder)
    assert finished.code == 0, finished.err
    return folder / "run/checkpoints/last.ckpt"


def first_of(found):
    return next(iter(found["state_dict"]))


def shorten(found):
    found["state_dict"][first_of(found)] = found["state_dict"][first_of(found)][:3]


def spoil(found):
    found["state_dict"][first_of(found)][0] = float("nan")


NO_CHECKPOINT = "ckpt_path: bad.ckpt is not a checkpoint of lit_rlhf; give one of the run folder's checkpoints/"
UNREADABLE = "ckpt_path: bad.ckpt is not a readable checkpoint ("
NOT_WHOLE = "ckpt_path: bad.ckpt is no whole checkpoint, "
NO_STATE = "ckpt_path: no whole checkpoint, where the run stands is not in it; give another"
NO_OPTIMISER = "ckpt_path: a checkpoint without the optimiser's state cannot be continued"
OTHER_MODEL = "ckpt_path: the checkpoint's models are not those of this run (1 weights differ"
FILES = [  # what is in the file instead
    (lambda raw: raw[: len(raw) // 2], UNREADABLE),
    (lambda raw: raw[:10], UNREADABLE),
    (lambda raw: b"", UNREADABLE),
    (lambda raw: b"hello", UNREADABLE),
    (lambda raw: os.urandom(1000), UNREADABLE),
    (lambda raw: raw[:5000] + b"\0" * 2000 + raw[7000:], UNREADABLE),
    (lambda raw: pickle.dumps(Payload()), UNREADABLE),
    (lambda raw: {"lit_rlhf": Payload()}, UNREADABLE),
    (lambda raw: [1, 2], NO_CHECKPOINT),
    (lambda raw: torch.zeros(3), NO_CHECKPOINT),
    (lambda raw: {"state_dict": {}, "epoch": 1}, NO_CHECKPOINT),
    (lambda raw: {"lit_rlhf": {}}, NOT_WHOLE + "'state_dict' is missing"),
]
CHANGES = [  # what was done to its content
    (lambda c: c.pop("state_dict"), NOT_WHOLE + "'state_dict' is missing"),
    (lambda c: c.pop("loops"), NOT_WHOLE + "'loops' is missing"),
    (lambda c: c.pop("pytorch-lightning_version"), NOT_WHOLE + "'pytorch-lightning_version' is missing"),
    (lambda c: c.pop("optimizer_states"), NO_OPTIMISER),
    (lambda c: c.update(optimizer_states=[{}]), NO_OPTIMISER),
    (lambda c: c.pop("lr_schedulers"), NO_OPTIMISER),
    (lambda c: c["lit_rlhf"].pop("algorithm"), NO_STATE),
    (lambda c: c["lit_rlhf"].pop("ranks"), NO_STATE),
    (lambda c: c["lit_rlhf"].update(ranks=[5]), NO_STATE),
    (lambda c: c["lit_rlhf"]["ranks"][0].update(loop={"iteration": 3}), "ckpt_path: where the run stands cannot be re"),
    (lambda c: c["lit_rlhf"]["ranks"][0]["loop"].update(more=3), "ckpt_path: where the run stands cannot be read (Typ"),
    (lambda c: c["lit_rlhf"].update(algorithm="DAPO"), "ckpt_path: a checkpoint of DAPO cannot continue as GRPO"),
    (lambda c: c["lit_rlhf"]["ranks"].append({}), "ckpt_path: saved by 2 processes, now there are 1; resume with"),
    (lambda c: c["state_dict"].pop(first_of(c)), OTHER_MODEL),
    (shorten, OTHER_MODEL),
    (spoil, "ckpt_path: weights that are no finite numbers, such as "),
]
ARGUMENTS = [
    ("ckpt_path=nowhere.ckpt", "ckpt_path: there is no file nowhere.ckpt"),
    ("ckpt_path=.", "ckpt_path: there is no file ."),
    ("ckpt_path=best", "ckpt_path=best is no file; give a checkpoint, or last for the newest"),
    ("ckpt_path=", "ckpt_path= is no file; give a checkpoint, or last for the newest"),
]
OTHER_RUNS = [
    ("algo=sft", "ckpt_path: a checkpoint of GRPO cannot continue as SFT"),
    ("seed=9", "ckpt_path: the run was made with seed=1 (now 9); resume with the same"),
    ("model.lora={r: 2}", "ckpt_path: the run was made with model.lora=null (now {r: 2, alpha: 4})"),
    ("algo.kl_coef=0.1", "ckpt_path: the checkpoint's models are not those of this run"),
]
EVALUATED = [  # by number of `CHANGES`
    (0, NOT_WHOLE + "'state_dict' is missing"),
    (13, "ckpt_path: the policy in bad.ckpt is no model like model.path"),
    (15, "ckpt_path: bad.ckpt has weights that are no finite numbers, such as "),
]


def changed(checkpoint, change):
    found = torch.load(checkpoint, weights_only=True)
    change(found)
    torch.save(found, "bad.ckpt")


@pytest.mark.parametrize(("make", "sentence"), FILES)
def test_files(checkpoint, make, sentence):
    made = make(checkpoint.read_bytes())
    Path("bad.ckpt").write_bytes(made) if isinstance(made, bytes) else torch.save(made, "bad.ckpt")
    assert trained("ckpt_path=bad.ckpt").startswith(sentence)


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
def test_contents(checkpoint, change, sentence):
    changed(checkpoint, change)
    assert trained("ckpt_path=bad.ckpt").startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), ARGUMENTS)
def test_arguments(argument, sentence):
    assert trained(argument).startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), OTHER_RUNS)
def test_other_runs(checkpoint, argument, sentence):
    assert trained(f"ckpt_path={checkpoint}", argument).startswith(sentence)


@pytest.mark.parametrize(("number", "sentence"), EVALUATED)
def test_what_is_evaluated(checkpoint, number, sentence):
    changed(checkpoint, CHANGES[number][0])
    assert evaluated("ckpt_path=bad.ckpt").startswith(sentence)
