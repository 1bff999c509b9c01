"""Runs on one process and on two ranks, and what every rank ended with."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.models.parallel import whole
from tests.algorithms.settings import rollout_from, rows_for, with_other_models
from tests.helpers import build, prompt_rows, tiny_model, trainer

UNEVEN = (3, 7, 1, 5, 2, 6, 4, 0)
ONE_RANK_EMPTY = (3, 7, 1, 5, 0, 0, 0, 0)
PROMPT_LENGTHS = (2, 5, 1, 4, 5, 3, 1, 2)


def reported(algorithm, folder, adamw=False):
    """The algorithm with plain gradient descent (unless `adamw`), leaving behind what every rank ended with."""

    class Reported(algorithm):
        def configure_optimizers(self):
            trainable = [p for p in self.models.parameters() if p.requires_grad]
            return super().configure_optimizers() if adamw else torch.optim.SGD(trainable, 0.1)

        def publish(self, stats, extra=None):
            values = {name: float(value) for name, value in stats.compute().items()}
            if stats is self.stats:
                self.published = values
            else:
                self.validated = values
            return super().publish(stats, extra)

        def on_fit_end(self):
            metrics = {name: value for name, value in self.published.items() if not name.startswith("perf/")}
            weights = {name: whole(x) for name, x in self.models.state_dict().items()}
            report = {"weights": weights, "metrics": metrics, "steps": self.global_step}
            report["validated"] = getattr(self, "validated", {})
            torch.save(
                report | {"loop": self.loop.to_plain()},
                folder / f"{self.trainer.world_size}x{self.accumulate}-{self.rank}.pt",
            )

    return Reported


def run(make, data, folder, devices, accumulate=1, epochs=1, strategy="ddp", **of_trainer):
    """Fit; every rank's report."""
    trainer(devices, accumulate, epochs, strategy, **of_trainer).fit(make(), datamodule=RowsDataModule(data))
    files = [folder / f"{devices}x{accumulate}-{rank}.pt" for rank in range(devices)]
    return [torch.load(file, weights_only=True) for file in files]


def run_of_four(make, folder, devices, accumulate=1, epochs=1, strategy="ddp"):
    return run(make, prompt_rows(4), folder, devices, accumulate, epochs, strategy)


def assert_same_run(found, expected, start, atol=1e-10, metrics_atol=1e-8):
    for report in found:
        moved = 0.0
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(report["weights"][name], weight, atol=atol, rtol=0)
            moved = max(moved, float((weight - start[name]).abs().max()))
        assert moved > 1e-4, "the step changed nothing"
        assert report["metrics"].keys() == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            assert report["metrics"][name] == pytest.approx(value, abs=metrics_atol), name
        assert report["loop"]["numbers"] == pytest.approx(expected["loop"]["numbers"], rel=1e-9)


def on_given_rows(algorithm, change=lambda rows: rows):
    """The algorithm on rows that are given: every rank takes its share of them instead of sampling."""

    class GivenRows(algorithm):
        def gather(self, prompts):
            share = len(self.rows) // self.world_size
            return self.rows[self.rank * share : (self.rank + 1) * share]

    def make(folder, adamw=False, lengths=UNEVEN, **arguments):
        sizes = {"group_size": 2, "prompts_per_rollout": 4, "minibatches": 1, "update_epochs": 1}
        module = build(reported(GivenRows, folder, adamw), tiny_model().double(), **{**sizes, **arguments})
        rows = rows_for("", module.models.policy, lengths, PROMPT_LENGTHS)
        module.rows = change(replace(rollout_from(rows)))
        return with_other_models(module)

    return make


def start_of(module):
    return {name: x.clone() for name, x in module.models.state_dict().items()}
