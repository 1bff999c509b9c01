"""What a model that was loaded has to be, each in one sentence: whole, finite, and of the kind that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import is_adapted


def check_whole(model: Any, info: Mapping[str, Any], key: str, path: str | Path) -> None:
    """Refuse a model of which files leave a part at random, or that reads the tokens that it is to predict.

    Args:
        model: as it was loaded.
        info: what Transformers says about that.
        key: the argument that named it.
        path: what it named.

    Raises:
        InputError: weights are missing, or an adapter has others than this model; or it is an encoder.
    """
    if getattr(model.config, "is_decoder", True) is False:
        raise InputError(f"{key}: {path} is an encoder ({type(model).__name__}); give a causal language model")
    head = model.get_output_embeddings() if _classifier(model) else None  # which a reward model has no use for
    without = {id(p) for p in ([] if head is None else head.parameters())}
    named = dict(model.named_parameters())
    missing = [name for name in sorted(info["missing_keys"]) if id(named.get(name)) not in without]
    strange = sorted(info["unexpected_keys"]) if is_adapted(model) else []
    if missing or strange:
        what = f"has no weights for {missing[0]}" if missing else f"is an adapter of another model, with {strange[0]}"
        raise InputError(
            f"{key}: {path} {what} ({len(missing) + len(strange)} such weights); give a folder whose files are all "
            "of one model"
        )


def check_finite(model: Any, key: str, path: str | Path) -> None:
    """Raise an `InputError` where a weight is NaN or infinite: nothing could be sampled or learnt."""
    named = ((name, p) for name, p in model.named_parameters() if not p.is_meta)
    if broken := next((name for name, p in named if not bool(p.isfinite().all())), None):
        raise InputError(f"{key}: {path} has weights that are no finite numbers, such as {broken}; give another model")


def check_generates(model: Any, key: str = "model.path") -> None:
    """Raise an `InputError` where `model` was loaded from a folder whose weights classify sequences, a reward model."""
    if name := _classifier(model):
        raise InputError(
            f"{key}: {getattr(model, 'name_or_path', '')} is a reward model ({name}), whose language-model head "
            "nobody trained; give a causal language model"
        )


def check_one_label(config: Any, name: str) -> None:
    """Raise an `InputError` unless the model of this configuration gives one number per text."""
    labels = getattr(config, "num_labels", None)
    if labels != 1:
        raise InputError(
            f"reward model: {name} has num_labels={labels}, and a reward is one number; give a sequence-classification "
            "model with num_labels=1, such as the model/ folder of a run with algo=reward_modeling"
        )


def _classifier(model: Any) -> str | None:
    """The architecture that the model's files were written by, if that one classifies sequences."""
    written = getattr(getattr(model, "config", None), "architectures", None) or ()
    return next((str(name) for name in written if name.endswith("ForSequenceClassification")), None)
