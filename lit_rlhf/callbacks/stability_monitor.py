"""Says when training goes wrong: what, since when, how bad it is, and what to change."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from tqdm import tqdm  # type: ignore[import-untyped]

from lit_rlhf.callbacks.hooks import RLHFCallback
from lit_rlhf.durable import part_of
from lit_rlhf.errors import check_number
from lit_rlhf.monitoring.gates import GATES, Gate, Healthy, Track, checked_bounds, plain, tracks_from


@dataclass
class Finding:
    """One thing that is wrong with a run, or was."""

    gate: str
    since: int  # rollout (or pass) at which it began
    says: str  # what is wrong, with the numbers
    advice: str  # what to change
    until: int | None = None  # the rollout at which all was well again


class StabilityMonitor(RLHFCallback):
    """Looks at every rollout's metrics through the gates of `monitoring.gates`.

    A gate that finds something prints it, sends a W&B alert and remembers it, once, and again if it comes back. It
    judges by medians over ten rollouts, and says nothing where all is well.

    Args:
        patience: rollouts in a row that a gate has to find something in.
        bounds: other bounds than the algorithm's, by the names of `monitoring.gates.Healthy`.
        file: the findings are written there as JSON, for the report.
    """

    def __init__(
        self, patience: int = 5, bounds: Mapping[str, Any] | None = None, file: str | Path | None = None
    ) -> None:
        check_number("callbacks.monitor.patience", patience, at_least=1)
        self.patience, self.bounds = patience, checked_bounds(bounds or {})
        self.file = None if file is None else Path(file)
        self.findings: list[Finding] = []
        self._tracks: dict[str, Track] = {}
        self._since: dict[str, int] = {}  # of gates that have found something lately, the rollout that it began with

    def on_metrics(self, trainer: Trainer, module: LightningModule, values: Mapping[str, float]) -> None:
        """Look at another rollout's metrics; validation's are left alone."""
        if "rollout/iteration" not in values:
            return
        for name, value in values.items():
            self._tracks.setdefault(name, Track()).add(value)
        iteration = int(values["rollout/iteration"])
        healthy = Healthy(**{**asdict(getattr(module, "healthy", Healthy())), **self.bounds})
        before = [asdict(finding) for finding in self.findings]
        for gate in GATES:
            self._look(gate, healthy, iteration, trainer)
        if before != [asdict(finding) for finding in self.findings]:
            self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a file also where nothing is found, and what was found before a run was resumed."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self.file is None or not trainer.is_global_zero:
            return
        temporary = part_of(self.file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([asdict(found) for found in self.findings], indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.file)

    def _look(self, gate: Gate, healthy: Healthy, iteration: int, trainer: Trainer) -> None:
        tracks = [self._tracks[name] for name in gate.needs if name in self._tracks]
        ready = len(tracks) == len(gate.needs) and (gate.at_once or all(track.full for track in tracks))
        says = gate.check(self._tracks, healthy) if ready else None
        known = next((f for f in self.findings if f.gate == gate.name and f.until is None), None)
        if says is None:
            self._since.pop(gate.name, None)
            if known is not None:
                known.until = iteration
            return
        since = self._since.setdefault(gate.name, iteration)
        if known is None and (gate.at_once or iteration - since + 1 >= self.patience):
            self.findings.append(Finding(gate.name, since, says, gate.advice))
            self._tell(self.findings[-1], trainer)

    def _tell(self, finding: Finding, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        text = f"since rollout {finding.since}: {finding.says}. Try: {finding.advice}"
        tqdm.write(f"[{finding.gate}] {text}", file=sys.stderr)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.alert(title=f"lit_rlhf: {finding.gate}", text=text)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers: a resumed run goes on judging by what came before."""
        return {
            "tracks": plain(self._tracks),
            "since": dict(self._since),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""
        self._tracks, self._since = tracks_from(state_dict["tracks"]), dict(state_dict["since"])
        self.findings = [Finding(**finding) for finding in state_dict["findings"]]
