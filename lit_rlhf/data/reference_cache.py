"""Log-probs of preference pairs under the reference, computed once and kept on disk, so that no second model is held.

The reference is the policy as the run found it. A file of the folder holds the log-probs of one list of pairs under
one reference, and is named by a digest of the weights, the token ids and the precision: other weights or other pairs
never find it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_rlhf.data.collate import EncodedPair, encode_pair, stack_pairs
from lit_rlhf.data.encoding import TextKey, text_key
from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import base_weights, check_reference, without_adapters
from lit_rlhf.models.parallel import whole
from lit_rlhf.types import PreferenceBatch, Row

if TYPE_CHECKING:
    from lit_rlhf.algorithms.preference import PreferenceModule

_Texts: TypeAlias = tuple[TextKey, TextKey, TextKey]
_LogProbs: TypeAlias = tuple[Tensor, Tensor]  # of a pair's chosen and rejected completion, one per token
_CHANGING = (
    "algo.reference_cache needs the same pairs in every pass, and these change; give data.fixed_pairs=true where the "
    "data has it, or leave algo.reference_cache out"
)


class ReferenceCache:
    """The reference's log-probs of every pair that was prepared.

    Args:
        folder: where the files are, or will be.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.reference: str | None = None  # digest of the weights; a checkpoint carries it
        self._known: dict[_Texts, _LogProbs] = {}

    def identify(self, policy: nn.Module) -> None:
        """Take the policy as it is now for the reference, unless there is one."""
        if self.reference is None:
            check_reference(policy)
            self.reference = weights_digest(policy)

    def prepare(self, module: PreferenceModule, rows: Sequence[Row], next_pass: Sequence[Row] | None = None) -> None:
        """Have the log-probs of `rows`: from this run, from the folder, or computed and put there. All ranks call it.

        Args:
            module: the algorithm in training.
            rows: with `prompt`, `chosen` and `rejected`.
            next_pass: the rows of the pass after this one.

        Raises:
            InputError: the rows change from pass to pass; or they are not in the folder and the policy, which would
                have to compute them, is the reference no more.
        """
        if next_pass is not None and [_texts(row) for row in rows] != [_texts(row) for row in next_pass]:
            raise InputError(_CHANGING)
        pairs = {_texts(row): row for row in rows}
        if pairs.keys() <= self._known.keys():
            return
        encoded = [encode_pair(module.encoder, row, module.row_limit) for row in pairs.values()]
        file = self.folder / f"{self._digest(encoded, module)}.pt"
        broadcast = module.trainer.strategy.broadcast  # what the first rank finds is so for all
        found = broadcast(_read(file, encoded))
        if found is None:
            if not broadcast(weights_digest(module.models.policy) == self.reference):
                raise InputError(
                    f"algo.reference_cache: there is no {file}, in which this run keeps the reference's log-probs of "
                    f"{len(pairs)} pairs, and the policy has been trained since; give the folder the run was begun with"
                )
            found = _compute(module, encoded)
            if module.rank == 0:
                _write(file, found)
        self._known |= zip(pairs, found, strict=True)

    def attach(self, batch: PreferenceBatch, rows: Sequence[Row]) -> PreferenceBatch:
        """The batch of `rows` with their log-probs as `ref_chosen` and `ref_rejected`."""
        known = [self._known.get(_texts(row)) for row in rows]
        if any(pair is None for pair in known):
            raise InputError(_CHANGING)
        sides = [_padded([pair[side] for pair in known if pair is not None], batch.chosen_ids) for side in (0, 1)]
        return replace(batch, ref_chosen=sides[0], ref_rejected=sides[1])

    def _digest(self, encoded: Sequence[EncodedPair], module: PreferenceModule) -> str:
        digest = hashlib.sha256(f"{self.reference} {module.trainer.precision}".encode())
        for pair in encoded:
            digest.update(repr(pair).encode())
        return digest.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """A digest of all weights and their names, whatever device they are on; adapters are no part of a reference.

    Of a sharded model every rank has to ask.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(base_weights(model).items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(whole(weight.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _texts(row: Row) -> _Texts:
    return text_key(row["prompt"]), text_key(row["chosen"]), text_key(row["rejected"])


def _compute(module: PreferenceModule, encoded: Sequence[EncodedPair]) -> list[_LogProbs]:
    """The log-probs of every pair; each rank scores its share."""
    ranks: list[Any] = [list(_scored(module, encoded[module.rank :: module.world_size]))]
    if module.world_size > 1:
        own, ranks = ranks[0], [None] * module.world_size
        dist.all_gather_object(ranks, own)
    return [ranks[i % module.world_size][i // module.world_size] for i in range(len(encoded))]


def _scored(module: PreferenceModule, encoded: Sequence[EncodedPair]) -> Iterator[_LogProbs]:
    size = max(1, module.batch_size // (module.world_size * module.accumulate))
    for start in range(0, len(encoded), size):
        rows = stack_pairs(encoded[start : start + size], module.tokenizer.pad_token_id).completions()
        precision, policy = module.trainer.precision_plugin.forward_context(), module.models.policy
        with torch.no_grad(), precision, without_adapters(policy):
            logprobs = module.models.score(rows.to(module.device)).logprobs.cpu()
            of_rows = [x[mask].clone() for x, mask in zip(logprobs, rows.response_mask, strict=True)]
        yield from zip(of_rows[: len(of_rows) // 2], of_rows[len(of_rows) // 2 :], strict=True)


def _padded(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    padded = rows[0].new_zeros(like.shape)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def _write(file: Path, found: Sequence[_LogProbs]) -> None:
    """Write under a temporary name and rename: a file with a digest for its name is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    flat = [row for pair in found for row in pair]
    torch.save({"logprobs": torch.cat(flat), "lengths": torch.tensor([len(row) for row in flat])}, temporary)
    temporary.replace(file)


def _read(file: Path, encoded: Sequence[EncodedPair]) -> list[_LogProbs] | None:
    if not file.is_file():
        return None
    expected = [len(side) for pair in encoded for side in pair[1:]]
    try:
        saved = torch.load(file, weights_only=True)
        rows = saved["logprobs"].split(saved["lengths"].tolist())
    except Exception as error:  # of torch, pickle, zipfile, ...
        raise InputError(f"algo.reference_cache: {file} cannot be read ({type(error).__name__}); delete it") from error
    if [len(row) for row in rows] != expected:
        raise InputError(f"algo.reference_cache: {file} does not hold the log-probs of these pairs; delete it")
    return list(zip(rows[::2], rows[1::2], strict=True))
