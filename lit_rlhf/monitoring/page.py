"""`report.html`: a run on one page that needs nothing but itself."""

from __future__ import annotations

import html
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lit_rlhf.durable import write_text
from lit_rlhf.monitoring.charts import Chart, short
from lit_rlhf.monitoring.healthy import bands
from lit_rlhf.monitoring.run_folder import RunFolder

CURVES: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (  # title, (metric, name) of each line
    ("Held-out accuracy", (("val/accuracy_sampled", "sampled"), ("val/accuracy_greedy", "greedy"))),
    ("Reward of what is sampled", (("reward/reward_mean", "reward"),)),
    (
        "Preference accuracy",
        (("preference/preference_accuracy", "training"), ("val/preference_accuracy", "held out")),
    ),
    ("Loss", (("loss/loss", "loss"), ("val/sft_loss", "held out"))),
    ("Entropy, nats", (("stability/entropy", "entropy"),)),
    ("KL to the policy that sampled", (("stability/approx_kl", "k3"),)),
    ("KL to the reference", (("stability/kl_divergence", "k3"),)),
    ("Clipped tokens", (("stability/clip_fraction", "share"),)),
    ("Variance explained by the value function", (("stability/explained_variance", "share"),)),
    (
        "Completions in groups without signal",
        (("reward/zero_std_fraction", "share"),),
    ),
    ("Advantages' standard deviation", (("stability/advantage_std", "std"),)),
    ("Tokens of a completion", (("rollout/response_length", "mean"), ("rollout/response_length_max", "longest"))),
    ("Completions cut off", (("rollout/truncated_fraction", "share"),)),
    ("Gradient's norm", (("stability/grad_norm", "norm"),)),
    ("Effective share of stale samples", (("stability/ess", "share"),)),
    ("Tokens per second", (("perf/tokens_per_second", "sampled"),)),
)
_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into a run's folder, of what lies there.

    Returns:
        The page.

    Raises:
        InputError: it is no run's folder, or a file in it cannot be used.
    """
    run = RunFolder.read(folder)
    file = run.path / "report.html"
    write_text(file, page(run))
    return file


def page(run: RunFolder) -> str:
    """The page of a run."""
    algorithm = run.algorithm or "A run"
    title = f"{algorithm} · {run.path.name}"
    sections = [
        f"<h1>{_e(algorithm)}</h1>",
        f'<p class="soft">{_e(_summary(run))}</p>',
        "<h2>Findings</h2>",
        *_findings(run),
        "<h2>Curves</h2>",
        '<p class="soft">The shaded range is healthy.</p>',
        f'<div class="grid">{"".join(_curves(run))}</div>',
        *_samples(run),
        *_held_out(run),
        "<h2>How it was run</h2>",
        f'<div class="card"><pre>{_e(command(run))}</pre></div>',
        _table(("", ""), run.about.items()) if run.about else "",
    ]
    head = [
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{_e(title)}</title><style>{_STYLE}</style>",
        '<link rel="icon" href="data:,">',  # or the browser asks for one
    ]
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head>\n<body>\n{body}\n</body></html>\n'


def command(run: RunFolder) -> str:
    """What to type to make the run again."""
    return shlex.join(["python", "-m", "lit_rlhf.train", *(arg.lstrip("+") for arg in run.overrides)])


def _summary(run: RunFolder) -> str:
    parts = [f"{run.path.name}"]
    rollouts = run.line("rollout/iteration")
    if rollouts is not None:
        parts.append(f"{rollouts.y[-1]:.0f} {'rollouts' if run.unit == 'rollout' else 'passes'}")
    measures = {"val/accuracy_sampled": "held-out accuracy", "val/preference_accuracy": "held-out pairs in order"}
    for metric, name in measures.items():
        if (line := run.line(metric)) is not None:
            parts.append(f"{name} {line.y[0]:.3f} → {line.y[-1]:.3f}")
    return " · ".join(parts)


def _findings(run: RunFolder) -> Iterable[str]:
    if run.findings is None:
        yield '<div class="card">The run had no stability monitor.</div>'
        return
    if not run.findings:
        yield '<div class="well">The stability monitor found nothing wrong.</div>'
    for found in run.findings:
        until = "" if found.get("until") is None else f" until {found['until']}"
        since = f"since {found.get('unit', 'rollout')} {found['since']}{until}"
        what = f"<b>{_e(found['gate'])}</b>, {since}: {_e(found['says'])}."
        yield f'<div class="finding">{what}<br>Try: {_e(found["advice"])}.</div>'


def _curves(run: RunFolder) -> Iterable[str]:
    healthy = bands(run.bounds)
    for title, metrics in CURVES:
        lines = [line for metric, name in metrics if (line := run.line(metric, name)) is not None]
        if lines:
            values = [f'<span class="k{i}">{_e(n.name)} <b>{short(n.y[-1])}</b></span>' for i, n in enumerate(lines)]
            key = f'<div class="key">{" ".join(values)}</div>'
            chart = Chart(title, lines, healthy.get(metrics[0][0])).svg()
            yield f'<figure class="card"><h3>{_e(title)}</h3>{chart}{key}</figure>'


def _samples(run: RunFolder) -> Iterable[str]:
    if not run.samples:
        return
    first, last = (run.samples[i]["rollout"] for i in (0, -1))
    yield "<h2>Samples, first and last</h2>"
    yield '<div class="two">'
    for rollout in dict.fromkeys((first, last)):
        yield f'<div class="card"><h3>Rollout {rollout}</h3>'
        for sample in [s for s in run.samples if s["rollout"] == rollout][:8]:
            reward = "none" if sample["reward"] is None else short(sample["reward"])
            end = "cut off" if sample["finish"] == "length" else "ended"
            yield f'<div class="sample"><div class="tag">reward {reward} · {sample["tokens"]} tokens · {end}</div>'
            yield f'<pre class="soft">{_e(_cut(sample["prompt"]))}</pre>'
            yield f"<pre>{_e(_cut(sample['completion']))}</pre></div>"
        yield "</div>"
    yield "</div>"


def _held_out(run: RunFolder) -> Iterable[str]:
    names = sorted({name for row in run.rows for name in row if name.startswith("val/")})
    lines = [line for name in names if (line := run.line(name)) is not None]
    if lines:
        yield "<h2>Held-out problems</h2>"
        yield _table(("metric", "first", "last"), [(n.name, short(n.y[0]), short(n.y[-1])) for n in lines])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f"<th>{_e(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_e(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cut(text: str, most: int = 1200) -> str:
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most} characters more)"


def _e(text: object) -> str:
    return html.escape(str(text))
