"""A checkpoint as a folder: what every rank holds of weights and optimiser in a file of its own, the rest in one.

    last.ckpt/rest.pt                   what is the same on every rank
    last.ckpt/rank-00001-of-00004.pt    its state_dict and optimizer_states, a shard as {"shard": x, "of": shape}

Tensors and plain containers only, as in a checkpoint of one file: `weights_only=True` reads them, and nothing runs.
Shards are along the first dimension; one behind the other they are the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lit_rlhf.durable import part_of, remove, replace, sync_folder, write_durably, writing
from lit_rlhf.errors import InputError
from lit_rlhf.ranks import gather_objects

_OF_A_RANK = ("state_dict", "optimizer_states")
_REST = "rest.pt"
_SHARD = {"shard", "of"}  # the keys of one


def save_sharded(checkpoint: Mapping[str, Any], folder: Path, rank: int, ranks: int) -> None:
    """Write this rank's part; the folder has its name once every rank has written its own. All ranks call it.

    Raises:
        InputError: some rank could not write; on every one of them.
    """
    parts = part_of(folder)
    own = {name: map_leaves(checkpoint[name], _packed) for name in _OF_A_RANK if name in checkpoint}

    def clear() -> None:
        check_takes_a_checkpoint(folder)
        remove(parts)
        parts.mkdir(parents=True)

    def write() -> None:
        write_durably(own, parts / _file(rank, ranks))
        if rank == 0:
            write_durably({name: x for name, x in checkpoint.items() if name not in _OF_A_RANK}, parts / _REST)

    def rename() -> None:
        sync_folder(parts)
        replace(folder, parts)

    for step in (clear if rank == 0 else None, write, rename if rank == 0 else None):
        with on_all_ranks(), writing(folder, f", on rank {rank}"):
            if step is not None:
                step()


def load_sharded(folder: Path, rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """The checkpoint with this rank's shards, of as many ranks as there are now; of another number, with everything."""
    if mesh.size() != len(_files(folder)):
        return load_merged(folder)
    own: dict[str, Any] = map_leaves(_load(folder / _file(rank, mesh.size())), lambda x: _unpacked(x, mesh))
    return _load(folder / _REST) | own


def load_merged(folder: Path) -> dict[str, Any]:
    """The checkpoint as a run without shards would have written it.

    Raises:
        InputError: a file is missing or cannot be read, or they are not of one checkpoint.
    """
    ranks = [_load(file) for file in _files(folder)]
    try:
        merged: dict[str, Any] = _merged(ranks)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"ckpt_path: the files in {folder} are not of one checkpoint") from error
    return _load(folder / _REST) | merged


def is_sharded_checkpoint(path: str | Path) -> bool:
    """Whether this is the folder of a sharded checkpoint."""
    return Path(path, _REST).is_file()


def check_takes_a_checkpoint(path: Path) -> None:
    """Raise an `InputError` where a folder stands that is no checkpoint."""
    if path.is_dir() and not is_sharded_checkpoint(path):
        raise InputError(f"the checkpoint {path} could not be written: a folder that is none has its name")


def _file(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.pt"


def _files(folder: Path) -> list[Path]:
    """Every rank's, in order."""
    found = sorted(folder.glob("rank-[0-9]*-of-[0-9]*.pt"))
    last = found[0].stem.rpartition("-")[2] if found else ""
    ranks = int(last) if last.isdigit() else len(found)
    expected = [folder / _file(rank, ranks) for rank in range(ranks)]
    if not found or found != expected:
        raise InputError(f"ckpt_path: {folder} is no whole checkpoint: it has {len(found)} of {ranks} ranks' files")
    return found


def _load(file: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of torch, pickle, zipfile, ...
        raise InputError(f"ckpt_path: {file} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(loaded, dict):
        raise InputError(f"ckpt_path: {file} is no part of a checkpoint of lit_rlhf")
    return loaded


def _packed(x: Any) -> Any:
    """A tensor as it is written."""
    if not isinstance(x, DTensor):
        return x
    return {"shard": x.to_local().detach().to("cpu", copy=True), "of": list(x.shape)}


def _unpacked(x: Any, mesh: DeviceMesh) -> Any:
    """What `_packed` has packed."""
    if not _is_shard(x):
        return x
    local = x["shard"].to(mesh.device_type)
    stride = torch.empty(x["of"], device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(x["of"]), stride=stride)


def _merged(parts: Sequence[Any]) -> Any:
    """The whole of what every rank has a part of."""
    first = parts[0]
    if _is_shard(first):
        return torch.cat([part["shard"] for part in parts])
    if isinstance(first, dict):
        return {key: _merged([part[key] for part in parts]) for key in first}
    if isinstance(first, list):
        return [_merged(part) for part in zip(*parts, strict=True)]
    return first


def map_leaves(tree: Any, fn: Callable[[Any], Any]) -> Any:
    """`tree` with `fn(leaf)` for everything in its dictionaries and lists; a packed shard is a leaf."""
    if isinstance(tree, Mapping) and not _is_shard(tree):
        return {key: map_leaves(value, fn) for key, value in tree.items()}
    return [map_leaves(value, fn) for value in tree] if isinstance(tree, list) else fn(tree)


def _is_shard(x: Any) -> bool:
    return isinstance(x, dict) and x.keys() == _SHARD


@contextmanager
def on_all_ranks() -> Iterator[None]:
    """What fails with an `InputError` on one rank fails with it on all, and none waits. All ranks enter it."""
    failed = None
    try:
        yield
    except InputError as error:
        failed = str(error)
    for sentence in gather_objects(failed):
        if sentence is not None:
            raise InputError(sentence)
