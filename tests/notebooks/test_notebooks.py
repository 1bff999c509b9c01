"""Every notebook runs from its first cell to its last, shows what its text claims, and is committed without outputs."""

import nbformat
import pytest

from tests.notebooks.executing import FOLDER, NOTEBOOKS, execute, figures

LARGEST = 150_000  # bytes of a figure in the documentation
CLAIMS = {  # run in the notebook's own kernel, after its last cell
    "quickstart": """
for line in (mean, median):
    assert sum(line.y[-5:]) / 5 > sum(line.y[:5]) / 5 + 0.05, line.y
""",
    "own_reward_and_data": """
first, last = ({m: sum(run.line(m).y[part]) / 5 for m in ("reward/reward_mean", "rewards/even")}
               for part in (slice(5), slice(-5, None)))
assert last["reward/reward_mean"] > first["reward/reward_mean"] + 0.15
assert last["rewards/even"] > first["rewards/even"] + 0.25
assert run.samples[0]["rollout"] == 0 and run.samples[-1]["rollout"] == 29
""",
    "subclass_an_algorithm": """
torch.testing.assert_close(gradient_at([[1.0, 1.0]]), -advantages)
torch.testing.assert_close(gradient_at([[1.2, 0.8]]), torch.zeros(1, 2), atol=1e-5, rtol=0)
torch.testing.assert_close(hard / plain, torch.tensor([0.75] * 4 + [0.25] * 4))
accuracy = {name: run.line("reward/accuracy").y for name, (_, run) in trained.items()}
assert len({y[0] for y in accuracy.values()}) == 1, "the same completions in the first rollout"
assert len({tuple(y) for y in accuracy.values()}) == 3, "and other ones afterwards"
for y in accuracy.values():
    assert sum(y[-5:]) / 5 > sum(y[:5]) / 5 + 0.04, accuracy
""",
    "reading_stability_curves": """
gates = {name: {finding.gate for finding in found} for name, found in findings.items()}
assert gates["healthy"] == set(), gates
assert "reward lost" in gates["learning rate x 100"], gates
assert "entropy collapse" in gates["entropy collapse"], gates
assert "length" in gates["pays for length"], gates
assert "value function" in gates["broken value function"], gates
reward = runs["healthy"].line("reward/reward_mean").y
assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.05, reward
""",
    "three_stages": """
assert sft.line("loss/sft_loss").y[-1] < sft.line("loss/sft_loss").y[0] - 1
assert sum(pairs.line("preference/preference_accuracy").y[-10:]) / 10 > 0.85
reward, right = policy.line("reward/reward_mean").y, policy.line("val/accuracy_sampled").y
assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 2, reward
assert right[-1] > right[0] + 0.15, right
""",
    "comparing_algorithms": """
assert [row["group"] for row in rows] == ["grpo", "grpo", "dapo", "dapo"]
assert all(float(row["after"]) > float(row["before"]) + 0.03 for row in rows), rows
assert Path("sweep/comparison.png").stat().st_size > 10_000
""",
}


def test_there_are_claims_for_every_notebook():
    assert {path.stem for path in NOTEBOOKS} == set(CLAIMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_a_notebook_shows_what_it_claims(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = execute(FOLDER / f"{name}.ipynb", tmp_path, CLAIMS[name])
    assert all(len(picture) < LARGEST for picture in figures(done).values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs_and_with_their_figures(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 40
    for name in (cell.metadata["figure"] for cell in cells if "figure" in cell.metadata):
        picture = FOLDER.parent / "docs" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size < LARGEST
