"""`python -m lit_rlhf.evaluate`: what it measures, what it leaves behind, and how it answers mistakes."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import lit_rlhf
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.checkpoints import _NEEDED
from lit_rlhf.cli import primary
from lit_rlhf.config import conf_dir, prepare_arguments
from lit_rlhf.data.modules import RowsDataModule
from lit_rlhf.errors import InputError
from lit_rlhf.evaluate import _load_policy, check_evaluation, evaluate, main
from lit_rlhf.evaluation import Candidate, Figures, evaluate_rows, kl_to, wins
from lit_rlhf.functional import mean_interval, rate_interval
from lit_rlhf.models.loading import load_causal_lm
from lit_rlhf.rewards import Judges, RewardFunctions, verifier
from lit_rlhf.types import SamplingConfig
from tests.helpers import NumberTokenizer, build, plain_logprobs, prompt_rows, sum_of_ids, tiny_model, trainer
from tests.runs import QUIET, fork, new_process

CARD = Path(lit_rlhf.__file__).parent / "assets" / "tiny_base" / "README.md"
NAN = float("nan")
FEW = SamplingConfig(max_new_tokens=6, group_size=2)


def configured(*arguments):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("evaluate", prepare_arguments(arguments, primary("evaluate")))


def lines_of(folder):
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def values(report):
    return {name: metric["value"] for name, metric in report["metrics"].items()}


# the shipped model


@pytest.mark.slow
def test_the_shipped_model_is_what_its_card_says(tmp_path):
    said = dict(re.findall(r"\| (greedy|sampled) \| ([\d.]+) \|", CARD.read_text()))
    report = evaluate(configured("samples=4", "ks=[1,4]"), tmp_path)
    found = report["metrics"]
    assert report["data"]["prompts"] == 512
    for decoding, accuracy in said.items():
        metric = found[f"accuracy_{decoding}"]
        assert metric["value"] == pytest.approx(float(accuracy), abs=0.001)
        assert metric["low"] < float(accuracy) < metric["high"]
    assert found["accuracy_greedy"]["samples"] == 512
    assert found["accuracy_sampled"]["samples"] == 4 * 512
    assert found["pass_at_1"]["value"] == pytest.approx(found["accuracy_sampled"]["value"])


def test_what_is_left_behind(tmp_path):
    report = evaluate(
        configured("samples=3", "limit=5", "batch_size=2", "rollout.max_new_tokens=4", "rollout.stop=['=']"), tmp_path
    )
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    lines = lines_of(tmp_path)
    assert len(lines) == 5 * (1 + 3)
    assert sorted({line["prompt_index"] for line in lines}) == [0, 1, 2, 3, 4]
    sampled = [line for line in lines if line["decoding"] == "sampled"]
    assert [line["sample"] for line in sampled[:4]] == [0, 1, 2, 0]
    for line in lines:
        a, b = map(int, line["prompt"].rstrip("=").split("+"))
        assert line["correct"] == line["reward"] == line["rewards"]["exact_match"] == (line["answer"] == str(a + b))
        assert line["completion"].strip() == line["answer"]
    found = report["metrics"]
    right = [line["correct"] for line in sampled]
    assert found["accuracy_sampled"]["value"] == pytest.approx(sum(right) / 15)
    any_right = [any(right[i : i + 3]) for i in range(0, 15, 3)]
    assert found["pass_at_3"]["value"] == pytest.approx(sum(any_right) / 5)
    assert tuple(found["pass_at_3"][end] for end in ("value", "low", "high")) == pytest.approx(
        rate_interval([float(x) for x in any_right])
    )
    assert {"pass_at_1", "pass_at_2", "maj_at_2", "maj_at_3"} <= found.keys()
    assert found["response_length_greedy"] | {"prompts": 5, "samples": 5} == found["response_length_greedy"]
    assert report["settings"]["sampling"]["group_size"] == 3
    assert report["versions"]["torch"] == torch.__version__
    assert report["model"]["parameters"] == 790_144


def test_a_seed_decides_everything_and_the_batch_nothing(tmp_path):
    def found(name, *arguments):
        folder = tmp_path / name
        folder.mkdir()
        evaluate(configured("samples=2", "limit=6", "greedy=false", *arguments), folder)
        return (folder / "samples.jsonl").read_text(), json.loads((folder / "evaluation.json").read_text())["metrics"]

    first = found("first", "batch_size=6")
    assert found("again", "batch_size=6") == first
    other = found("smaller", "batch_size=4")
    assert other[0] == first[0]
    assert found("seed", "seed=2")[0] != first[0]


def test_rows_to_evaluate_on(tmp_path):
    whole = "data.held_out=3", "data.train_size=4", "samples=1", "greedy=false"
    counts = {
        split: evaluate(configured(*whole, f"rows={split}"), tmp_path)["data"]["prompts"]
        for split in ("held_out", "train")
    }
    assert counts == {"held_out": 3, "train": 4}
    with pytest.raises(InputError, match="rows=held_out of the data are none; give the other"):
        evaluate(configured("data.held_out=0"), tmp_path)


def test_reward_models_are_moved_to_the_device(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(RewardFunctions, "to", lambda self, device: moved.append((self.names, str(device))) or self)
    given = ["limit=1", "samples=1", "greedy=false", "device=cpu"]
    evaluate(configured(*given, "against.path=tiny", "judge=lit_rlhf.rewards.numeric_answer"), tmp_path)
    assert moved[:2] == [(["exact_match"], "cpu"), (["numeric_answer"], "cpu")], "before anything is sampled"


# models


def toy(seed=0, **arguments):
    judges = arguments.pop("judges", Judges(RewardFunctions([sum_of_ids])))
    sampling = arguments.pop("sampling", FEW)
    return Candidate(tiny_model(seed=seed), NumberTokenizer(), judges, sampling, **arguments)


@pytest.mark.parametrize("sampling", [SamplingConfig(5, temperature=0.7, group_size=2), SamplingConfig(5, top_k=4)])
def test_the_kl_to_a_reference(sampling):
    candidate, reference = toy(sampling=sampling), tiny_model(seed=1)
    rollout = candidate.complete(prompt_rows(3), 0).rollout
    assert kl_to(candidate.policy, candidate, rollout).abs().max() < 1e-5
    own, other = (plain_logprobs(m, rollout, sampling.temperature) for m in (candidate.policy, reference))
    delta = (other - own).clamp(-20, 20)
    k3 = torch.where(rollout.response_mask, delta.exp() - 1 - delta, 0)
    torch.testing.assert_close(kl_to(reference, candidate, rollout), k3.sum(1), rtol=1e-3, atol=1e-3)


def test_figures_of_reference_and_opponent():
    sampling = SamplingConfig(max_new_tokens=4, group_size=3)
    seen = []
    found = evaluate_rows(
        toy(sampling=sampling),
        prompt_rows(5),
        ks=(),
        batch_size=2,
        reference=tiny_model(seed=1),
        against=toy(2, sampling=sampling, stage=2),
        record=seen.append,
    )
    own = [r for r in seen if r["model"] == "model" and r["decoding"] == "sampled"]
    other = [r for r in seen if r["model"] == "against"]
    assert (len(own), len(other)) == (15, 15)
    by_prompt = lambda records: [[r["reward"] for r in records if r["prompt_index"] == i] for i in range(5)]  # noqa: E731
    pairs = [
        [(a > b) + (a == b) / 2 for a in mine for b in its]
        for mine, its in zip(by_prompt(own), by_prompt(other), strict=True)
    ]
    assert found["win_rate"]["value"] == pytest.approx(sum(map(sum, pairs)) / 45)
    difference = [sum(mine) / 3 - sum(its) / 3 for mine, its in zip(by_prompt(own), by_prompt(other), strict=True)]
    assert tuple(found["score_difference"][end] for end in ("value", "low", "high")) == pytest.approx(
        mean_interval(difference)
    )
    tokens = sum(r["tokens"] for r in own)
    assert found["kl_per_token"]["samples"] == tokens
    assert found["kl_per_token"]["value"] * tokens == pytest.approx(found["kl_per_sequence"]["value"] * 15)


def test_a_second_model_and_a_reference_on_the_command_line(tmp_path):
    found = values(evaluate(configured("limit=6", "samples=4", "against.path=tiny", "reference.path=tiny"), tmp_path))
    assert found["kl_per_sequence"] == pytest.approx(0, abs=1e-5)
    texts = {
        m: [r["completion"] for r in lines_of(tmp_path) if (r["model"], r["decoding"]) == (m, "sampled")]
        for m in ("model", "against")
    }
    assert texts["model"] != texts["against"], "the opponent draws numbers of its own"
    assert {"win_rate", "tie_rate", "score_difference"} <= found.keys()


def test_a_judge_decides_who_wins():
    def longest(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    def first_sample_loses(completions, **kwargs):
        return [float(len(completions[i]) % 3) for i in range(len(completions))]

    seen = []
    arguments = {"against": toy(3, stage=2), "greedy": False, "ks": (), "record": seen.append}
    by_length = evaluate_rows(toy(), prompt_rows(4), judge=RewardFunctions([longest]), **arguments)
    lengths = {
        m: [[r["tokens"] for r in seen if r["model"] == m and r["prompt_index"] == i] for i in range(4)]
        for m in ("model", "against")
    }
    expected, _ = wins(*(torch.tensor(lengths[m]) for m in ("model", "against")))
    assert by_length["win_rate"]["value"] == pytest.approx(float(expected.mean()))
    other = evaluate_rows(toy(), prompt_rows(4), judge=RewardFunctions([first_sample_loses]), **arguments)
    assert other["win_rate"] != by_length["win_rate"]


def test_a_model_against_itself_is_even():
    """The opponent draws other numbers: equal models tie no more often than chance has it."""
    sampling = SamplingConfig(max_new_tokens=6, group_size=8)
    even = evaluate_rows(toy(sampling=sampling), prompt_rows(30), ks=(), against=toy(sampling=sampling, stage=2))
    found = {name: even[name] for name in ("win_rate", "tie_rate")}
    assert found["win_rate"]["low"] < 0.5 < found["win_rate"]["high"]
    assert found["win_rate"]["high"] - found["win_rate"]["low"] < 0.2
    assert found["tie_rate"]["value"] < 0.4


def test_wins_by_hand():
    own, other = torch.tensor([[1.0, 2, NAN], [NAN, NAN, NAN]]), torch.tensor([[1.0, NAN], [1.0, 2]])
    won, tied = wins(own, other)
    assert won.tolist() == [pytest.approx([0.5, 1, NAN], nan_ok=True), pytest.approx([NAN] * 3, nan_ok=True)]
    assert tied.tolist()[0] == pytest.approx([1, 0, NAN], nan_ok=True)


def test_what_applies_to_some_rows_counts_only_there():
    figures = Figures()
    figures.add("accuracy_sampled", torch.tensor([1.0, NAN, NAN, NAN]), 2)
    figures.add("accuracy_sampled", torch.tensor([0.0, 1.0]), 1)
    figures.add("never", torch.tensor([NAN, NAN]), 2)
    figures.add("reward", torch.tensor([3.0]), 1)
    found = figures.metrics()
    assert found.keys() == {"accuracy_sampled", "reward"}
    assert found["accuracy_sampled"] | {"value": 2 / 3, "prompts": 2, "samples": 3} == found["accuracy_sampled"]
    assert found["reward"] == {"value": 3.0, "low": None, "high": None, "prompts": 1, "samples": 1}


@verifier
def judges_some(completion_ids, **kwargs):
    return [None if ids[0] % 3 == 0 else float(ids[0] % 3 == 1) for ids in completion_ids]


def test_accuracy_is_that_of_validation_where_a_verifier_judges_some_completions_only():
    sampling, seen = SamplingConfig(max_new_tokens=4, group_size=4), []
    module = build(GRPO, tiny_model(), sampling=sampling, reward_funcs=[judges_some], validation_samples=4, seed=0)
    fitter = trainer(limit_val_batches=1.0)
    fitter.validate(module, datamodule=RowsDataModule([], prompt_rows(6)), verbose=False)
    candidate = toy(judges=Judges(RewardFunctions([judges_some])), sampling=sampling)
    found = evaluate_rows(candidate, prompt_rows(6), ks=[1], record=seen.append)
    verdicts = [[r["correct"] for r in seen if r["prompt_index"] == i and r["decoding"] == "sampled"] for i in range(6)]
    shares = [[x for x in of_prompt if x is not None] for of_prompt in verdicts]
    assert len({len(share) for share in shares if share}) > 1
    accuracy = found["accuracy_sampled"]
    assert accuracy["value"] == pytest.approx(sum(sum(s) / len(s) for s in shares if s) / sum(map(bool, shares)))
    assert accuracy["value"] == pytest.approx(float(fitter.callback_metrics["val/accuracy_sampled"]), abs=1e-6)
    half = float(fitter.callback_metrics["val/accuracy_sampled_ci"])
    assert (accuracy["high"] - accuracy["low"]) / 2 == pytest.approx(half, abs=1e-6)


def test_prompts_that_the_model_cannot_read():
    rows = [*prompt_rows(3), {"prompt": "5 " * 200}]
    with pytest.raises(InputError, match=r"1 of 4 held-out prompts do not fit the model.*data.long_rows=drop"):
        toy().fitting(rows)
    assert toy().fitting(rows, "drop") == (rows[:3], 1)
    candidate = toy()
    assert candidate.fitting(rows, "truncate") == (rows, 1)
    assert candidate.complete(rows, 0).rollout.prompt_ids.shape[1] == 128 - 6


@verifier
def nobody_knows(completions, **kwargs):
    return [None] * len(completions)


def test_records_hold_what_json_can():
    seen = []
    evaluate_rows(toy(judges=Judges(None, [nobody_knows])), prompt_rows(2), record=seen.append)
    assert [line["reward"] for line in seen] == [None] * (2 + 4)
    assert all(line["correct"] is None for line in seen)
    json.dumps(seen, allow_nan=False)


@pytest.mark.slow
def test_a_checkpoint_of_a_run(tmp_path):
    best = "callbacks=best", "trainer.check_val_every_n_epoch=1"
    run = fork("debug=tiny", "algo.lr=1e-2", *best, f"hydra.run.dir={tmp_path / 'run'}", *QUIET, cwd=tmp_path)
    assert run.code == 0, run.err
    assert {file.name for file in (tmp_path / "run" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    small = "limit=8", "samples=2"
    found = {
        name: values(evaluate(configured(*small, *arguments), tmp_path))
        for name, arguments in {
            "base": [],
            "checkpoint": [f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"],
            "export": [f"model.path={tmp_path}/run/model"],
        }.items()
    }
    assert found["checkpoint"] == found["export"]
    assert found["checkpoint"] != found["base"]
    with pytest.raises(InputError, match=r"ckpt_path: the policy in .*last.ckpt is no model like model.path"):
        evaluate(
            configured(
                *small,
                "model=tiny_scratch",
                "model.layers=2",
                "tokenizer=tiny",
                f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt",
            ),
            tmp_path,
        )


def test_greedy_samples_have_no_kl(tmp_path):
    settings = "samples=2", "limit=4", "reference.path=tiny", "rollout.max_new_tokens=3", "rollout.temperature=0"
    found = values(evaluate(configured(*settings), tmp_path))
    assert "accuracy_sampled" in found
    assert not [name for name in found if name.startswith("kl_")]


def no_verifier(tmp_path, **columns):
    rows = [json.dumps({"prompt": f"{i}+1=", **columns}) + "\n" for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    of_file = "data=file", f"data.path={tmp_path}/rows.jsonl", "data.held_out=0", "rows=train"
    return *of_file, "samples=2", "rollout.max_new_tokens=3", "against.path=tiny", "greedy=false"


def test_a_judge_without_its_column_is_refused_before_anything_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(Candidate, "complete", lambda *_, **__: pytest.fail("sampled"))
    arguments = "reward.funcs=[tests.helpers.sum_of_ids]", "judge=lit_rlhf.rewards.exact_match"
    with pytest.raises(InputError, match=r"exact_match.*answer"):
        evaluate(configured(*no_verifier(tmp_path), *arguments), tmp_path)


def test_a_reward_model_is_no_policy(tmp_path):
    from lit_rlhf.algorithms.reward_modeling import RewardModeling
    from lit_rlhf.callbacks.hf_export import export

    folder = tmp_path / "model"
    export(RewardModeling(policy="tiny"), folder)
    for name in ("model", "reference", "against"):
        with pytest.raises(InputError, match=rf"^{name}\.path: .*model is a reward model \(LlamaForSequenceClass"):
            evaluate(configured("limit=2", f"{name}.path={folder}"), tmp_path)
    with pytest.raises(InputError, match=r"^model\.path: .*model is a reward model"):
        GRPO(policy=str(folder))
    RewardModeling(policy=str(folder))  # goes on from its trunk


def test_weights_of_adapters_need_adapters(tmp_path):
    adapted = load_causal_lm("tiny", lora={"r": 4})
    saved = {f"models.policy.{name}": x for name, x in adapted.state_dict().items()}
    torch.save({**dict.fromkeys(_NEEDED, 0), "state_dict": saved, "lit_rlhf": {}}, tmp_path / "lora.ckpt")
    with pytest.raises(InputError) as caught:
        _load_policy(load_causal_lm("tiny"), str(tmp_path / "lora.ckpt"))
    assert "give the settings of its adapters, model.lora.r=... (" in str(caught.value)
    assert len(str(caught.value)) < 400
    with pytest.raises(InputError, match=r"that the run began with \(\d+ weights differ, the first is \S+\)$"):
        _load_policy(load_causal_lm("tiny", lora={"r": 8}), str(tmp_path / "lora.ckpt"))
    _load_policy(load_causal_lm("tiny", lora={"r": 4}), str(tmp_path / "lora.ckpt"))


# the command line


@pytest.mark.slow
def test_the_command_prints_a_table_and_the_folder(tmp_path):
    ended = new_process("limit=4", "samples=2", "hydra.run.dir=out", cwd=tmp_path, command=("-m", "lit_rlhf.evaluate"))
    assert ended.code == 0, ended.err
    first, *table, folder = ended.out.splitlines()
    assert first == "4 prompts (held_out of ArithmeticData), 2 completions each"
    assert Path(folder) == tmp_path / "out"
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    names = [line.split()[0] for line in table[1:]]
    assert names == list(report["metrics"])
    accuracy = report["metrics"]["accuracy_greedy"]
    line = next(line for line in table if line.startswith("accuracy_greedy"))
    assert line.split()[1:] == [f"{accuracy['value']:.3f}", f"{accuracy['low']:.3f}", "to", f"{accuracy['high']:.3f}"]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("sampels=2", "unknown key 'sampels'; did you mean 'samples'?"),
        ("algo=grpo", "unknown key 'algo'; known: against, batch_size, "),
        ("trainer.devices=2", "unknown key 'trainer.devices'; "),
        ("data=arithmetik", "unknown choice data=arithmetik; did you mean 'arithmetic'?"),
        ("data.limit=3", "unknown key 'data.limit'; known: "),
        ("rollout.temprature=1", "unknown key 'rollout.temprature'; did you mean 'temperature'?"),
        ("rollout.group_size=3", "'rollout.group_size' would have no effect; write samples=..."),
        ("reference=tiny", "reference must be given as reference.path=..., got 'tiny'"),
        ("against.pth=tiny", "unknown key 'against.pth'; did you mean 'path'?"),
        ("judge=my.function", "judge decides who wins, and there is nobody to win against; give against.path=..."),
        ("samples=0", "samples must be at least 1, got 0"),
        ("samples=1.5", "'samples' must be int, got 1.5"),
        ("batch_size=0", "batch_size must be at least 1, got 0"),
        ("limit=0", "limit must be at least 1, got 0"),
        ("ks=[1,16]", "ks must be from 1 to samples=8, got 16"),
        ("ks=[0]", "ks must be from 1 to samples=8, got 0"),
        ("ks=[1.5]", "ks must be from 1 to samples=8, got 1.5"),
        ("ks=3", "'ks' must be list or null, got 3"),
        ("rows=test", "rows must be one of held_out, train, got 'test'"),
        ("greedy=1", "'greedy' must be bool, got 1"),
        ("seed=-1", "seed must be from 0 to 4294967295, got -1"),
    ],
)
def test_a_mistake_is_answered_before_anything_heavy_is_imported(argument, sentence):
    from omegaconf import OmegaConf

    with pytest.raises(InputError) as caught:
        check_evaluation(OmegaConf.to_container(configured(argument)))
    assert str(caught.value).startswith(sentence)


def test_a_mistake_costs_no_import_of_torch(tmp_path):
    driver = """
import sys
from lit_rlhf.evaluate import main
try:
    main()
except SystemExit as stop:
    print(stop.code, [name for name in ("torch", "lightning", "transformers") if name in sys.modules])
"""
    ended = new_process("ks=[9]", cwd=tmp_path, command=("-c", driver))
    assert ended.out == "2 []\n"
    assert ended.err == "error: ks must be from 1 to samples=8, got 9\n"
    helped = new_process("--help", cwd=tmp_path, command=("-m", "lit_rlhf.evaluate"))
    assert helped.code == 0
    assert "samples=8" in helped.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["model.path=./nowhere"], "model.path: there is no folder ./nowhere"),
        (["reference.path=./nowhere"], "reference.path: there is no folder ./nowhere"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path: there is no file nowhere.ckpt"),
        (["reward.funcs=[nowhere.function]"], "reward function 'nowhere.function': there is no module"),
        (["device=gpu9"], "device=gpu9 cannot be used here: "),
        (["device=meta"], "device=meta cannot be used here: "),
        (["plugins=[nowhere]"], "plugins: there is no module 'nowhere'"),
    ],
)
def test_what_cannot_be_loaded_is_said_in_a_sentence(tmp_path, arguments, sentence):
    ended = fork(*arguments, "limit=2", cwd=tmp_path, main=main)
    assert ended.sentence().startswith(sentence)
