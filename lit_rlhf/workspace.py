"""Save a W&B workspace for this library's runs: `python -m lit_rlhf.workspace ENTITY/PROJECT`.

Sections in the order in which one looks: is the reward rising, is training stable, then the rest. It is a saved view of
the project, beside everyone's own; saving again adds another.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.failing import fail

ROLLOUTS, STEPS = "rollout/iteration", "trainer/global_step"  # the x-axis; that of val/
LAYOUT: Mapping[str, Sequence[tuple[str, ...]]] = {  # section -> panels -> the metrics of each
    "reward": (
        ("reward/reward_mean",),
        ("reward/accuracy",),
        ("reward/reward_std",),
        ("reward/zero_std_fraction",),
        ("reward/length_correlation",),
        ("reward/histogram",),
    ),
    "stability": (
        ("stability/approx_kl",),
        ("stability/kl_divergence",),
        ("stability/entropy",),
        ("stability/clip_fraction_low", "stability/clip_fraction_high"),
        ("stability/ratio_max",),
        ("stability/ratio_histogram",),
        ("stability/grad_norm",),
        ("stability/advantage_std",),
        ("stability/explained_variance",),
        ("stability/ess",),
        ("stability/mismatch_kl",),
        ("stability/skipped_fraction",),
    ),
    "loss": (("loss/loss",), ("loss/policy_loss",), ("loss/value_loss",), ("loss/kl_loss",), ("loss/entropy_loss",)),
    "rollout": (
        ("rollout/response_length", "rollout/response_length_max"),
        ("rollout/truncated_fraction",),
        ("rollout/staleness",),
        ("rollout/length_histogram",),
        ("samples",),
    ),
    "preference": (
        ("preference/preference_accuracy",),
        ("preference/reward_margin",),
        ("preference/chosen_reward", "preference/rejected_reward"),
        ("preference/chosen_logps", "preference/rejected_logps"),
    ),
    "val": (
        ("val/accuracy_sampled", "val/accuracy_greedy"),
        ("val/reward_sampled", "val/reward_greedy"),
        ("val/preference_accuracy",),
        ("val/sft_loss",),
        ("val/kl_divergence",),
        ("val/response_length_sampled", "val/response_length_greedy"),
    ),
    "perf": (("perf/tokens_per_second",), ("perf/rollout_seconds", "perf/update_seconds"), ("perf/wait_seconds",)),
}
_OPEN = ("reward", "stability", "val")


def workspace(entity: str, project: str, name: str = "lit_rlhf") -> Any:
    """The layout as a `wandb_workspaces.workspaces.Workspace`; nothing is sent before its `save()`.

    Args:
        entity: the user or team of the project.
        project: its name, as in `logger.wandb.project`.
        name: of the view.

    Raises:
        InputError: the package is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        message = "a workspace needs the package wandb-workspaces: pip install 'lit_rlhf[wandb]'"
        raise InputError(message) from error
    sections = [
        ws.Section(
            name=section,
            panels=[_panel(metrics, STEPS if section == "val" else ROLLOUTS) for metrics in panels],
            is_open=section in _OPEN,
            layout_settings=ws.SectionLayoutSettings(columns=3, rows=2),
            panel_settings=ws.SectionPanelSettings(x_axis=STEPS if section == "val" else ROLLOUTS),
        )
        for section, panels in LAYOUT.items()
    ]
    settings = ws.WorkspaceSettings(x_axis=ROLLOUTS, remove_legends_from_panels=False)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _panel(metrics: tuple[str, ...], x_axis: str) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if metrics == ("samples",):
        return wr.WeavePanelSummaryTable(table_name="samples")
    return wr.LinePlot(title=", ".join(metrics), x=x_axis, y=list(metrics))


def save(target: str, name: str) -> str:
    """Save the workspace to `ENTITY/PROJECT`; returns its address.

    Raises:
        InputError: nobody is logged in, the package is not installed, or W&B cannot be reached or refuses.
    """
    from lit_rlhf.loggers import logged_in

    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise InputError(f"give the workspace's place as ENTITY/PROJECT, got {target!r}")
    found = workspace(entity, project, name)
    if not logged_in():
        raise InputError("a workspace is saved in your W&B account, and nobody is logged in; run wandb login first")
    try:
        found.save()
        return str(found.url)
    except Exception as error:  # of its client, of several libraries
        raise InputError(f"W&B did not take the workspace for {target}: {type(error).__name__}: {error}") from error


def main() -> None:
    """Entry point of `python -m lit_rlhf.workspace`."""
    parser = argparse.ArgumentParser(prog="python -m lit_rlhf.workspace", description=__doc__)
    parser.add_argument("place", metavar="ENTITY/PROJECT", help="user or team, and project")
    parser.add_argument("--name", default="lit_rlhf", help="of the saved view (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(save(arguments.place, arguments.name))
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
