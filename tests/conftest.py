"""Shared set-up: one thread, no network, no account."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import pytest
import torch


@pytest.fixture(autouse=True)
def _quiet_torch():
    torch.set_num_threads(1)
    torch.manual_seed(0)
