"""Rows from a file, a local folder or the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_rlhf.data.columns import conventional, of_one_kind
from lit_rlhf.data.json_files import read_json
from lit_rlhf.errors import InputError
from lit_rlhf.hub import offline_unless_reached
from lit_rlhf.signatures import nearest
from lit_rlhf.types import Row

_JSON = (".jsonl", ".json")
_FILES = (*_JSON, ".parquet")
_ACCEPTED = "a .jsonl, .json or .parquet file, a folder of them, or a dataset of the Hub (org/name)"
_VALIDATION = ("validation", "valid", "val", "dev", "test")  # names of a split to validate on, the best first


def read_rows(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    name: str | None = None,
    split: str = "train",
) -> list[Row]:
    """Read rows in the conventions of `lit_rlhf.data.columns`.

    Args:
        path: a `.jsonl` file (one JSON object per line), a `.json` file (a list of objects), a `.parquet` file, a
            folder of such files or one that `save_to_disk` wrote, or a dataset's name on the Hub (`org/name`). All but
            the JSON files are read by `datasets` (extra `data`).
        columns: our name of a column -> the one that it has there, as in `{"prompt": "question"}`.
        name: the configuration, of a dataset that has several.
        split: which part of a folder or of a dataset of the Hub.

    Raises:
        InputError: names the place and what is wrong with it.
    """
    return read_splits(path, columns, name=name, split=split, validation_split="")[0]


def read_splits(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    *,
    name: str | None = None,
    split: str = "train",
    validation_split: str | None = None,
    validation_path: str | Path | None = None,
) -> tuple[list[Row], list[Row] | None]:
    """The rows to train on, see `read_rows`, and those to validate on where the source has a split of them.

    Args:
        path: see `read_rows`.
        columns: see `read_rows`.
        name: see `read_rows`.
        split: the rows to train on.
        validation_split: the rows to validate on; by default the first that there is of validation, valid, val, dev
            and test; `""` for none.
        validation_path: where those are, if not in `path`; by default all of them are wanted that a file has, or the
            train split of what has none to validate on.
    """
    found = _splits(str(path), name, "data.path")
    train = _rows(found, path, split, "data.split", columns)
    if validation_path is None:
        default = next((known for known in _VALIDATION if known in found and known != split), "")
    else:
        path = validation_path
        found = _splits(str(path), None if _is_file(Path(path).expanduser()) else name, "data.validation_path")
        default = next((known for known in _VALIDATION if known in found), "train")
    validation_split = default if validation_split is None else validation_split
    if not validation_split:
        return of_one_kind(train)[0], None
    train, test = of_one_kind(train, _rows(found, path, validation_split, "data.validation_split", columns))
    return train, test


def _rows(
    found: Mapping[str, Any], path: str | Path, split: str, key: str, columns: Mapping[str, str] | None
) -> list[Row]:
    """The rows of a split, which the argument `key` names."""
    if split not in found:
        raise InputError(f"{key}: {path} has no split {split!r}; it has {', '.join(map(repr, found))}")
    rows = [conventional(value, where, columns) for where, value in found[split]]
    if not rows:
        which = f", split {split}," if len(found) > 1 else ""
        raise InputError(f"{path}{which} has no rows; expected at least one object with a 'prompt'")
    return rows


class _Split:
    """A split of a dataset: its rows by their place, made when they are asked for."""

    def __init__(self, rows: Any, where: str) -> None:
        self.rows, self.where = rows, where

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return ((f"{self.where}, row {n}", row) for n, row in enumerate(self.rows.to_list(), 1))


def _is_file(path: Path) -> bool:
    return path.is_file() or path.suffix.lower() in _FILES


def _splits(path: str, name: str | None, key: str) -> dict[str, Any]:
    """The rows of every split, each with its place, of the path that the argument `key` gives."""
    file = Path(path).expanduser()
    if _is_file(file):
        if name is not None:
            raise InputError(f"data.name={name} chooses among the configurations of a dataset, and {path} is a file")
        file = _existing(file)
        if file.suffix.lower() in _JSON:
            return {"train": read_json(file)}
        return {"train": _Split(_loaded(path, key, _parquet, file), path)}
    if not file.is_dir() and (file.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        raise InputError(f"{path} does not exist; expected {_ACCEPTED}")
    parts = _loaded(path, key, _dataset, file, name)
    return {str(split): _Split(part, f"{path}, split {split}") for split, part in parts.items()}


def _existing(file: Path) -> Path:
    if file.suffix.lower() not in _FILES:
        raise InputError(f"{file} cannot be read; expected {_ACCEPTED}")
    if not file.exists():
        siblings = [f.name for f in file.parent.glob("*") if f.suffix.lower() in _FILES]
        hint = nearest(file.name, siblings) if siblings else f"; expected {_ACCEPTED}"
        raise InputError(f"{file} does not exist{hint}")
    return file


def _parquet(file: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_parquet(str(file))


def _dataset(folder: Path, name: str | None) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    if any((folder / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
        found = load_from_disk(str(folder))
        return {"train": found} if isinstance(found, Dataset) else found
    if folder.is_dir():
        return load_dataset(str(folder), name)
    with offline_unless_reached():
        return load_dataset(str(folder), name)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without progress bars, and without a log of errors that are told in a sentence."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from datasets.utils import logging

    before, verbosity = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not before:
            enable_progress_bars()


def _loaded(path: str, key: str, load: Any, *arguments: Any) -> Any:
    """What `load` returns; whatever goes wrong in `datasets` is one sentence."""
    try:
        with _quiet_datasets():
            return load(*arguments)
    except ImportError as error:
        if error.name != "datasets":
            raise
        raise InputError(f"{path} needs the package datasets: pip install 'lit_rlhf[data]'") from None
    except Exception as error:  # of datasets, huggingface_hub, pyarrow, fsspec, ...
        reason = str(error).strip().partition("\n")[0] or "no reason given"
        raise InputError(
            f"{key}: cannot read {path!r} ({type(error).__name__}: {reason}); expected {_ACCEPTED}"
        ) from error
