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
from lightning.pytorch.utilities import rank_zero_warn
from tqdm import tqdm  # type: ignore[import-untyped]

from lit_rlhf.callbacks.hooks import RLHFCallback
from lit_rlhf.durable import write_text
from lit_rlhf.errors import check_number
from lit_rlhf.monitoring.checks import of_rollouts
from lit_rlhf.monitoring.gates import GATES, Gate
from lit_rlhf.monitoring.healthy import Healthy, checked_bounds, moved_bounds
from lit_rlhf.monitoring.tracks import Track, plain, tracks_from

_FORMAT = 2  # of the state in a checkpoint; another one's is left alone
Turns = dict[str, tuple[int, int]]  # by gate, the rollout at which it was noticed, and at which it began


@dataclass
class Finding:
    """One thing that is wrong with a run, or was."""

    gate: str
    since: int  # rollout (or pass) at which it began
    says: str  # what is wrong, with the numbers
    advice: str  # what to change
    until: int | None = None  # the rollout at which all was well again
    unit: str = "rollout"  # or pass


class StabilityMonitor(RLHFCallback):
    """Looks at every rollout's (or pass's) metrics through the gates of `monitoring.gates`.

    A gate that finds something prints it, sends a W&B alert and remembers it, once, and again if it comes back. Most
    judge by medians over ten rollouts, and what is extreme is found at once. Where all is well nothing is said.

    Args:
        patience: rollouts in a row that a gate has to find something in, unless it judges at once, and nothing until
            it is over.
        bounds: other bounds than the algorithm's, by the names of `monitoring.healthy.Healthy`.
        file: the findings are written there as JSON, for the report; beside it, in `bounds.json`, the bounds that are
            not those of `Healthy()`.
    """

    def __init__(
        self, patience: int = 5, bounds: Mapping[str, Any] | None = None, file: str | Path | None = None
    ) -> None:
        check_number("callbacks.monitor.patience", patience, at_least=1)
        self.patience, self.bounds = patience, checked_bounds(bounds or {})
        self.file = None if file is None else Path(file)
        self.findings: list[Finding] = []
        self._tracks: dict[str, Track] = {}
        self._since: Turns = {}  # of gates that find something
        self._well: Turns = {}  # of gates that no longer do
        self._unit = "rollout"

    def on_metrics(self, trainer: Trainer, module: LightningModule, values: Mapping[str, float]) -> None:
        """Take a validation's metrics, or look at another rollout's."""
        for name, value in values.items():
            self._tracks.setdefault(name, Track()).add(value)
        if "rollout/iteration" not in values:
            return
        iteration = int(values["rollout/iteration"])
        self._unit = "rollout" if of_rollouts(self._tracks) else "pass"
        healthy = self._healthy(module)
        before = [asdict(finding) for finding in self.findings]
        for gate in GATES:
            self._look(gate, healthy, iteration, trainer)
        if before != [asdict(finding) for finding in self.findings]:
            self._write(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave a file also where nothing is found, and what was found before a run was resumed."""
        self._write(trainer)
        if self.file is not None and trainer.is_global_zero:
            _save(self.file.with_name("bounds.json"), moved_bounds(self._healthy(pl_module)))

    def _healthy(self, module: LightningModule) -> Healthy:
        return Healthy(**{**asdict(getattr(module, "healthy", Healthy())), **self.bounds})

    def _write(self, trainer: Trainer) -> None:
        if self.file is not None and trainer.is_global_zero:
            _save(self.file, [asdict(finding) for finding in self.findings])

    def _look(self, gate: Gate, healthy: Healthy, iteration: int, trainer: Trainer) -> None:
        says = gate.says(self._tracks, healthy)
        known = next((f for f in self.findings if f.gate == gate.name and f.until is None), None)
        turns, others = (self._well, self._since) if says is None else (self._since, self._well)
        others.pop(gate.name, None)
        if says is None and known is None:
            return
        if gate.name not in turns:
            ago = gate.turned(self._tracks, healthy, wrong=says is not None)
            turns[gate.name] = (iteration, max(1, iteration - ago))
        noticed, turned = turns[gate.name]
        lasts = iteration - noticed + 1 >= self.patience
        if known is not None:
            known.until = turned if says is None and lasts else None
        elif says is not None and (lasts or gate.looks_at or gate.extreme_says(self._tracks, healthy)):
            self.findings.append(Finding(gate.name, turned, says, gate.advice, unit=self._unit))
            self._tell(self.findings[-1], trainer)

    def _tell(self, finding: Finding, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        text = f"since {finding.unit} {finding.since}: {finding.says}. Try: {finding.advice}"
        tqdm.write(f"[{finding.gate}] {text}", file=sys.stderr)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.alert(title=f"lit_rlhf: {finding.gate}", text=text)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers: a resumed run goes on judging by what came before."""
        return {
            "format": _FORMAT,
            "tracks": plain(self._tracks),
            "since": {name: list(when) for name, when in self._since.items()},
            "well": {name: list(when) for name, when in self._well.items()},
            "findings": [asdict(finding) for finding in self.findings],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse; a state that cannot be read is left alone with a warning: the run is to go on without it."""
        try:
            _check_format(state_dict.get("format"))
            tracks = tracks_from(state_dict["tracks"])
            since, well = (
                {gate: (noticed, turned) for gate, (noticed, turned) in state_dict[name].items()}
                for name in ("since", "well")
            )
            findings = [Finding(**finding) for finding in state_dict["findings"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            rank_zero_warn(
                "the checkpoint's stability monitor is of another version; it starts afresh, without earlier findings "
                f"({type(error).__name__}: {error})"
            )
            return
        self._tracks, self._since, self._well, self.findings = tracks, since, well, findings


def _save(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=1) + "\n")


def _check_format(number: Any) -> None:
    if number != _FORMAT:
        raise ValueError(f"format {number} instead of {_FORMAT}")
