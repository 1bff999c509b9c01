"""Reads an offline W&B run back: what was logged, and what W&B was told about it."""

import json
import subprocess
import sys
from pathlib import Path


def records_of(folder):
    """Every record of the newest run in a run folder's `wandb/`, by type."""
    file = sorted(Path(folder).glob("wandb/*run-*/*.wandb"))[-1]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    read = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = {}
    for line in read.stdout.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def history_of(folder):
    """What was logged, line by line."""
    return [record["item"] for record in records_of(folder).get("history", [])]


def table_of(folder, name="samples"):
    """Columns and rows of the newest table of that name."""
    newest = [line for line in history_of(folder) if f"{name}._type" in line][-1]
    (file,) = Path(folder).glob(f"wandb/*run-*/files/{newest[f'{name}.path']}")
    table = json.loads(file.read_text())
    return table["columns"], table["data"]
