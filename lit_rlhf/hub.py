"""Without a network the Hub is known to be away at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def offline_unless_reached() -> Iterator[None]:
    """Ask the Hub once whether it is there: libraries try for half a minute before they look for a copy on disk."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of the HTTP library that huggingface_hub happens to use
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
