"""`report.html`: all that a run left, on a page that loads nothing; looked at by a real browser where there is one."""

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from lightning.pytorch import Callback

from lit_rlhf import compare, report
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.gspo import GSPO
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.callbacks.checkpoint import RolloutCheckpoint
from lit_rlhf.callbacks.report import Report
from lit_rlhf.callbacks.stability_monitor import StabilityMonitor
from lit_rlhf.errors import InputError
from lit_rlhf.monitoring.charts import HEIGHT, Chart, Line, thinned, ticks, y_range
from lit_rlhf.monitoring.healthy import BANDS, Healthy, bands, moved_bounds
from lit_rlhf.monitoring.page import CURVES, write_report
from lit_rlhf.monitoring.run_folder import ENDED, SECONDS, RunFolder
from lit_rlhf.types import SamplingConfig
from tests.algorithms.resuming import fit_of
from tests.runs import fork

EVIL = '<script>document.title = "ran"</script>&"quoted"'
SAMPLE = '{"prompt": "a", "completion": "b", "reward": 1.0, "tokens": 2, "finish": "stop"}'
FINDING = {"gate": "kl", "since": 3, "says": "it moves 0.2 nats", "advice": "lower algo.lr", "until": None}


def leave_run(folder, rollouts=30, findings=(), prompt="2+2=", completion="4"):
    """A run's folder as training leaves it."""
    (folder / "config").mkdir(parents=True)
    names = ["epoch", "step", "rollout/iteration", "reward/reward_mean", "stability/approx_kl", "val/accuracy_sampled"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, names)
        rows.writeheader()
        rows.writerow({"step": 0, "val/accuracy_sampled": 0.25})
        for n in range(1, rollouts + 1):
            rows.writerow(
                {"step": 4 * n, "rollout/iteration": n, "reward/reward_mean": n / 100, "stability/approx_kl": 0.01}
            )
        rows.writerow({"step": 4 * rollouts, "val/accuracy_sampled": 0.75})
    sample = {"prompt": prompt, "completion": completion, "reward": 1.0, "tokens": 2, "finish": "stop"}
    lines = [json.dumps({**sample, "rollout": n}) for n in (0, rollouts - 1)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config" / "config.yaml").write_text("algo: {_target_: lit_rlhf.algorithms.grpo.GRPO}\n")
    (folder / "config" / "overrides.yaml").write_text("- algo=grpo\n- ++algo.lr=1e-4\n- ++reward.funcs=[a.b]\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    (folder / "findings.json").write_text(json.dumps(list(findings)))
    return folder


def test_the_page_holds_what_the_run_left(tmp_path):
    text = write_report(leave_run(tmp_path / "run", findings=[FINDING])).read_text()
    for expected in (
        "<h1>GRPO</h1>",
        "30 rollouts · held-out accuracy 0.250 → 0.750",
        "<b>kl</b>, since rollout 3: it moves 0.2 nats.<br>Try: lower algo.lr.",
        "<h3>Rollout 0</h3>",
        "<h3>Rollout 29</h3>",
        "python -m lit_rlhf.train algo=grpo algo.lr=1e-4 &#x27;reward.funcs=[a.b]&#x27;",
        "<td>torch</td><td>2.13.0</td>",
        "<td>val/accuracy_sampled</td><td>0.25</td><td>0.75</td>",
    ):
        assert expected in text, expected
    assert text.count("<figure") == 3
    assert "found nothing wrong" not in text


def test_a_healthy_run_says_so(tmp_path):
    assert "The stability monitor found nothing wrong." in write_report(leave_run(tmp_path / "run")).read_text()


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    text = write_report(leave_run(tmp_path / "run", prompt=EVIL, completion=EVIL)).read_text()
    assert "<script" not in text
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(|https?://", text)
    assert text.count("&lt;script&gt;") == 4


def test_a_run_continued_in_its_folder_is_one_curve(tmp_path):
    folder = leave_run(tmp_path / "run", rollouts=3)
    (folder / "metrics.1.csv").write_text("step,rollout/iteration,reward/reward_mean\n1,-1,0.5\n")
    (folder / "metrics.2.csv").write_text("step,rollout/iteration,reward/reward_mean\n2,0,nan\n")
    line = RunFolder.read(folder).line("reward/reward_mean")
    assert (line.x, line.y) == ([-1, 1, 2, 3], [0.5, 0.01, 0.02, 0.03])


def test_what_a_killed_run_made_twice_is_shown_once(tmp_path):
    """It went on from the checkpoint after rollout 2; files that the kill has cut off are read as far as they go."""
    folder = leave_run(tmp_path / "run", rollouts=5)
    rows = (folder / "metrics.csv").read_text().splitlines()
    (folder / "metrics.1.csv").write_text("\n".join(rows[:6]))
    (folder / "metrics.csv").write_text("\n".join([rows[0], *rows[4:7]]) + "\n6,5,0.0")
    line = RunFolder.read(folder).line("reward/reward_mean")
    assert (line.x, line.y) == ([1, 2, 3, 4, 5], [0.01, 0.02, 0.03, 0.04, 0.05])
    lines = [json.dumps({**json.loads(SAMPLE), "rollout": n}) for n in (0, 0, 3, 3, 4, 2, 2, 3)]
    (folder / "samples.jsonl").write_text("\n".join(lines) + '\n{"rollout": 4, "pro')
    assert [sample["rollout"] for sample in RunFolder.read(folder).samples] == [0, 0, 2, 2, 3]
    write_report(folder)


def test_a_run_without_a_monitor_is_not_called_sound(tmp_path):
    folder = leave_run(tmp_path / "run")
    (folder / "findings.json").unlink()
    text = write_report(folder).read_text()
    assert "The run had no stability monitor." in text
    assert "nothing wrong" not in text


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"is no run's folder: it has no metrics.csv"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("findings.json", "[1, 2]", "is no list of findings"),
        ("findings.json", "{}", "is no list of findings"),
        ("findings.json", '[{"since": 1}]', "is no list of findings, objects of gate, since, says, advice"),
        ("findings.json", "[", "is no JSON"),
        ("environment.json", "[]", "is no object of names and values"),
        ("environment.json", '{"seconds of training": "x"}', "'seconds of training' must be a number, got 'x'"),
        ("bounds.json", "[1]", "is no object of bounds"),
        ("bounds.json", '{"approx_kl": "x"}', "callbacks.monitor.bounds.approx_kl must be like 0.05, got 'x'"),
        ("samples.jsonl", "[1]", "line 1 is no sample"),
        ("samples.jsonl", SAMPLE, "line 1 is no sample, an object of rollout"),
        ("config/config.yaml", "a: [", "is no YAML"),
        ("config/config.yaml", "- a", "holds no mapping"),
        ("config/overrides.yaml", "a: 1", "holds no list"),
        ("metrics.csv", "step,loss\n1,2,3\n", "line 2 has more cells than the first line has names"),
        ("metrics.csv", b"\x89PNG\xff\x00\n\x00", "is no table of metrics"),
    ],
)
@pytest.mark.parametrize("command", [report, compare])
def test_a_damaged_or_foreign_file_is_one_sentence(tmp_path, capsys, monkeypatch, command, name, content, said):
    file = leave_run(tmp_path / "run") / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sys, "argv", ["command", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"error: {file}: {said}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("findings.json", json.dumps([{key: FINDING[key] for key in ("gate", "since", "says", "advice")}])),
        ("config/config.yaml", "algo: null"),
        ("config/overrides.yaml", ""),
        ("environment.json", ""),
    ],
)
def test_what_is_not_there_is_done_without(tmp_path, name, content):
    folder = leave_run(tmp_path / "run")
    (folder / "config" / "overrides.yaml").unlink()
    (folder / name).write_text(content)
    assert write_report(folder).exists()
    compare.compare([folder], folder)


def fit(folder, *callbacks, ckpt_path=None, rollouts=2):
    """Train for a moment."""
    settings = {"group_size": 2, "prompts_per_rollout": 4, "sampling": SamplingConfig(max_new_tokens=2)}
    return fit_of(GRPO, settings, rollouts, callbacks=[Report(folder), *callbacks], ckpt_path=ckpt_path)


class Hours(Callback):
    """A clock that goes on by a hundred seconds with each rollout; in one of them it breaks."""

    def __init__(self, monkeypatch, breaks_in=None):
        self.rollouts, self.breaks_in = 0, breaks_in
        monkeypatch.setattr("lit_rlhf.callbacks.report.time", SimpleNamespace(monotonic=lambda: 100.0 * self.rollouts))

    def on_train_epoch_end(self, trainer, pl_module):
        self.rollouts += 1
        if self.rollouts == self.breaks_in:
            raise KeyError("broken")


def test_the_seconds_of_a_run_that_is_continued_are_those_of_all_its_parts(tmp_path, monkeypatch):
    def noted(name):
        about = json.loads((tmp_path / name / "environment.json").read_text())
        return about[SECONDS], about[ENDED]

    keeper = RolloutCheckpoint(every_n_epochs=1, dirpath=tmp_path / "run" / "checkpoints")
    with pytest.raises(KeyError):
        fit(tmp_path / "run", Hours(monkeypatch, breaks_in=3), keeper, rollouts=4)
    assert noted("run") == (300.0, False)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "environment.json").write_text(json.dumps({SECONDS: 50.0, ENDED: True}))
    for name, seconds in (("run", 500.0), ("elsewhere", 200.0)):
        last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
        fit(tmp_path / name, Hours(monkeypatch), ckpt_path=last, rollouts=4)
        assert noted(name) == (seconds, True)
    fit(tmp_path / "run", Hours(monkeypatch))
    assert noted("run") == (200.0, True), "begun anew"


def test_a_note_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / ".environment.json.part").mkdir()
    keeper = RolloutCheckpoint(every_n_epochs=1, dirpath=tmp_path / "checkpoints")
    with pytest.warns(UserWarning, match="environment.json was not written"):
        fit(tmp_path, keeper)
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_a_chart_is_drawn_to_scale():
    svg = ElementTree.fromstring(Chart("t", [Line("a", [0, 5, 10], [0.0, 1.0, 0.5])], (0.2, 0.4)).svg())
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.3), "higher values stand higher"
    band = svg.find("rect")
    top, height = float(band.get("y")), float(band.get("height"))
    assert height == pytest.approx(0.2 * (y0 - y1), abs=0.3)
    assert top == pytest.approx(y0 - 0.4 * (y0 - y1), abs=0.3)
    assert all(0 <= y <= HEIGHT for _, y in points)


@pytest.mark.parametrize("ys", [[0.0], [3.0, 3.0], [-2.0], [1e-9, 2e-9], [1e12, -1e12]])
def test_any_values_give_a_chart(ys):
    low, high = y_range(ys, (0.0, 0.1))
    assert low < min(ys) <= max(ys) < high
    assert 2 <= len(ticks(low, high)) <= 7
    ElementTree.fromstring(Chart("t", [Line("a", list(range(len(ys))), ys)], (0.0, 0.1)).svg())


def test_long_curves_are_averaged_and_keep_their_end():
    line = thinned(Line("a", list(range(10_000)), [float(x % 2) for x in range(10_000)]))
    assert len(line.x) <= 301
    assert (line.x[-1], line.y[-1]) == (9999, 1.0)
    assert max(abs(y - 0.5) for y in line.y[:-1]) < 0.02


def test_curves_have_one_title_each():
    assert len({title for title, _ in CURVES}) == len(CURVES)


def test_bands_are_drawn_and_are_those_that_the_readme_states():
    drawn = {metric for _, metrics in CURVES for metric, _ in metrics}
    assert BANDS.keys() <= drawn
    lines = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    stated = {}
    for metric in BANDS.keys() - {"stability/advantage_std"}:  # of which it states where it lies, and no range
        (healthy,) = [line.strip("| ").split(" | ")[-1] for line in lines if line.startswith(f"| `{metric}`")]
        sign, low, number = re.fullmatch(r"(?:([<>]) |([\d.]+) to )([\d.]+)", healthy).groups()
        stated[metric] = (float(number), 1.0) if sign == ">" else (float(low or 0), float(number))
    assert {**stated, "stability/advantage_std": Healthy().advantage_std} == BANDS


LOWER = ("ess", "explained_variance")  # the monitor speaks below their bounds, of the others above


@pytest.mark.parametrize(
    "healthy",
    [
        Healthy(),
        GSPO().healthy,
        PPO().healthy,
        Healthy(approx_kl=0.01, clip_fraction=0.1, truncated_fraction=0.05, ess=0.7, explained_variance=0.6),
        Healthy(approx_kl=0.1, zero_std_fraction=0.5, ess=0.1, explained_variance=-2.0, advantage_std=(0.5, 2.0)),
    ],
    ids=["usual", "GSPO", "PPO", "narrower", "both"],
)
def test_no_band_reaches_beyond_the_bound_that_the_monitor_judged_by(healthy):
    moved = json.loads(json.dumps(moved_bounds(healthy)))
    for metric, (low, high) in bands(moved).items():
        name = metric.split("/")[1]
        bound = getattr(healthy, name)
        if name == "advantage_std":
            assert (low, high) == bound
        else:
            assert (low >= bound) if name in LOWER else (high <= bound), name
            assert name not in moved or bound in (low, high), "it reaches as far as the bound"
        assert low < high
        assert name in moved or (low, high) == BANDS[metric]


def test_the_bands_are_of_the_bounds_that_the_run_had(tmp_path):
    folder = leave_run(tmp_path / "run")
    line = RunFolder.read(folder).line("stability/approx_kl", "k3")
    drawn = {high: Chart("KL to the policy that sampled", [line], (0.0, high)).svg() for high in (0.05, 0.015)}
    assert drawn[0.05] in write_report(folder).read_text()
    monitor = StabilityMonitor(bounds={"approx_kl": 0.015}, file=folder / "findings.json")
    monitor.on_train_start(SimpleNamespace(is_global_zero=True), GSPO())
    assert json.loads((folder / "bounds.json").read_text()) == {"approx_kl": 0.015, "clip_fraction": 0.7}
    text = write_report(folder).read_text()
    assert drawn[0.015] in text
    assert drawn[0.05] not in text
    StabilityMonitor(file=folder / "findings.json").on_train_start(SimpleNamespace(is_global_zero=True), None)
    assert json.loads((folder / "bounds.json").read_text()) == {}


@pytest.mark.slow
def test_a_run_leaves_its_report(tmp_path):
    arguments = ["algo=grpo", "preset=null", "algo.prompts_per_rollout=4", "algo.group_size=2", "trainer.max_epochs=2"]
    arguments += ["data.held_out=4", "logger.wandb=null", "callbacks.progress=null", f"hydra.run.dir={tmp_path}/run"]
    ended = fork(*arguments, cwd=tmp_path)
    assert ended.code == 0, ended.err
    text = (tmp_path / "run" / "report.html").read_text()
    assert "held-out accuracy" in text, "the last validation is in it"
    assert "<h3>Rollout 1</h3>" in text
    assert "<td>threads</td>" in text
    assert "algo.group_size=2" in text


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_it_without_complaint_and_without_scrolling_sideways(tmp_path, width):
    """In a frame of this width, and measured from outside of it."""
    page = write_report(leave_run(tmp_path / "run", findings=[FINDING], completion="x" * 500)).read_text()
    frame = f'<iframe width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
    measure = "const d=document.querySelector('iframe').contentDocument,e=d.documentElement;"
    measure += "document.title=[e.scrollWidth,e.clientWidth,d.querySelectorAll('svg').length].join()"
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}<script>onload=()=>{{{measure}}}</script>")
    command = [BROWSER, *FLAGS.split(), f"--user-data-dir={tmp_path}/profile", "--window-size=1400,1000"]
    command += ["--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/frame.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in shown.stderr
    wide, shows, charts = map(int, re.search(r"<title>(\d+),(\d+),(\d+)</title>", shown.stdout).groups())
    assert width - 20 <= shows == wide
    assert charts == 3
