"""Every case in a folder of its own."""

import pytest


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The folder that a case is run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
