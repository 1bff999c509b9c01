"""How a run answers what it cannot use: with one sentence, and an earlier run's folder as it was."""

from pathlib import Path

from lit_rlhf import evaluate, train
from tests.runs import QUIET, fork

QUICK = ("debug=tiny", *QUIET, "validate_first=false", "threads=1")
SMALL = ("algo.prompts_per_rollout=8", "algo.minibatches=1")
FEW = ("limit=2", "samples=2", "threads=1")
EARLIER = {
    "config/config.yaml": "seed: 7\n",
    "metrics.csv": "step\n1\n",
    "checkpoints/last.ckpt": "weights",
    "model/config.json": "{}",
    "evaluation.json": "{}",
    "samples.jsonl": "{}\n",
}
SECONDS = 60  # that an answer may take, on a busy machine; a hang is killed then


class Payload:
    """Unpickles into a command that leaves a file named `ran`."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def refused(*arguments, main=train.main):
    """The sentence that a command is answered with, in the current directory.

    Nothing else calls itself an error, no traceback is shown, nothing that was read has run, and what an earlier run
    has left in the folder `earlier` is still there.
    """
    for name, content in EARLIER.items():
        Path("earlier", name).parent.mkdir(parents=True, exist_ok=True)
        Path("earlier", name).write_text(content)
    sentence = fork(*arguments, cwd=".", main=main, seconds=SECONDS).sentence()
    left = {file.read_text() for file in Path("earlier").rglob("*") if file.is_file() and file.suffix != ".wandb"}
    assert set(EARLIER.values()) <= left, "something of the earlier run is lost"
    for name in EARLIER.keys() - {"metrics.csv", "config/config.yaml"}:  # which a continued run keeps under other names
        assert Path("earlier", name).read_text() == EARLIER[name]
    assert not Path("ran").exists(), "code in a file was run"
    return sentence


def trained(*arguments):
    """The sentence that `train` answers with, for a run as short as can be."""
    other = any(argument.startswith("algo=") and argument != "algo=grpo" for argument in arguments)
    return refused(*QUICK, *(() if other else SMALL), "hydra.run.dir=earlier", *arguments)


def evaluated(*arguments):
    """The sentence that `evaluate` answers with."""
    return refused(*FEW, "hydra.run.dir=earlier", *arguments, main=evaluate.main)
