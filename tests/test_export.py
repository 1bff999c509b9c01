"""`python -m lit_rlhf.export`: the model in a checkpoint, of a file or of shards, is the one that the run left."""

import torch

from lit_rlhf import export
from lit_rlhf.sharded_checkpoints import is_sharded_checkpoint
from tests.runs import QUIET, fork

RUN = ("algo=reward_modeling", "debug=tiny", "validate_first=false", "threads=1", *QUIET)


def in_shards(file, folder):
    """What one sharded rank would have written."""
    checkpoint = torch.load(file, weights_only=True)
    folder.mkdir()
    own = {name: checkpoint.pop(name) for name in ("state_dict", "optimizer_states")}
    torch.save(own, folder / "rank-00000-of-00001.pt")
    torch.save(checkpoint, folder / "rest.pt")
    assert is_sharded_checkpoint(folder)


def test_a_checkpoint_becomes_the_model_of_its_run(tmp_path):
    run = fork(*RUN, f"hydra.run.dir={tmp_path}/run", cwd=tmp_path)
    assert run.code == 0, run.err
    file, shards = tmp_path / "run/checkpoints/last.ckpt", tmp_path / "shards.ckpt"
    in_shards(file, shards)
    for path in (file, shards):
        made = fork(*RUN, f"ckpt_path={path}", f"hydra.run.dir={tmp_path}/{path.stem}", cwd=tmp_path, main=export.main)
        assert made.code == 0, made.err
        folder = tmp_path / path.stem / "model"
        assert made.out.strip().splitlines()[-1] == str(folder)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (folder / name).read_bytes() == (tmp_path / "run/model" / name).read_bytes(), name

    other = fork("algo=dpo", f"ckpt_path={file}", "hydra.run.dir=other", cwd=tmp_path, main=export.main)
    assert other.sentence() == f"ckpt_path: {file} is of RewardModeling, not of DPO; give its algo="
    nothing = fork("algo=dpo", cwd=tmp_path, main=export.main)
    assert nothing.sentence().startswith("ckpt_path: give the checkpoint to export, such as")
