"""The command line as a user meets it: in a folder of their own, with files of their own, and with mistakes."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.data.modules import ArithmeticData
from tests.runs import QUIET, fork, metrics_of, new_process

TINY = ("debug=tiny", *QUIET)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's folder, which knows nothing of the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(file, rows):
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sums(count=40):
    return [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(count)]


def run_folder(finished):
    """Where the run says it left everything: its last line."""
    assert finished.code == 0, finished.err
    return Path(finished.out.strip().splitlines()[-1])


# start-up


@pytest.mark.parametrize(
    ("argument", "code", "said"),
    [
        ("--help", 0, "clip-higher, token-level loss"),
        ("algo=dapoo", 2, "error: unknown choice algo=dapoo; did you mean 'dapo'?"),
        ("algo.groupsize=3", 2, "error: unknown key 'algo.groupsize'; did you mean 'group_size'?"),
        ("algo.group_size=many", 2, "error: 'algo.group_size' must be int, got 'many'"),
        ("algo.lr='", 2, "error: algo.lr=' cannot be read: token recognition error"),
    ],
)
def test_help_and_configuration_errors_import_nothing_heavy(here, argument, code, said):
    driver = """
import sys
from lit_rlhf.train import main
try:
    main()
    code = 0
except SystemExit as stop:
    code = stop.code
print()
print(code, [name for name in ("torch", "lightning", "transformers") if name in sys.modules])
"""
    finished = new_process(argument, cwd=here, command=("-c", driver))
    assert finished.out.splitlines()[-1] == f"{code or 0} []"
    assert said in finished.out + finished.err


# mistakes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["algo=dapoo"], "unknown choice algo=dapoo; did you mean 'dapo'?"),
        (["algo.groupsize=3"], "unknown key 'algo.groupsize'; did you mean 'group_size'?"),
        (["algo.lr='"], "algo.lr=' cannot be read: token recognition error"),
        (["algo=grpo foo"], "unknown choice algo=grpo foo; did you mean 'grpo'?"),
        (["reward.funcs=[a.b"], "reward.funcs=[a.b cannot be read: "),
        (["algo.lr=1e-4,1e-3"], "algo.lr=1e-4,1e-3 are several values; write [...] for a list, or add -m"),
        (["hydra.run.dir=a(b"], "hydra.run.dir=a(b cannot be read: "),
        (["plugins=one"], "'plugins' must be list, got 'one'"),
        (["experiment=enhanced_ppo"], "unknown choice experiment=enhanced_ppo; did you mean 'signal/enhanced_ppo'?"),
        (["algo.policy_loss=clp"], "unknown policy loss 'clp': did you mean 'clip'? registered: "),
        (
            ["algo.policy_loss=lit_rlhf.registry.get"],
            "policy loss: module 'lit_rlhf.registry' has no 'get': did you mean ",
        ),
        (["algo.policy_loss=lit_rlhf.DAPO"], "policy loss: lit_rlhf.algorithms.dapo.DAPO is a class; give an object"),
        (["plugins=[nowhere]"], "plugins: there is no module 'nowhere'"),
        (["algo._target_=lit_rlhf.algorithms.dapo.DAPPO"], "Error loading 'lit_rlhf.algorithms.dapo.DAPPO'"),
        (["algo._target_=nowhere.DAPO"], "Error loading 'nowhere.DAPO'"),
        (["algo._target_=builtins.dict"], "algo._target_=builtins.dict is no algorithm"),
        (["algo._target_=torch.nn.Linear"], "algo._target_=torch.nn.Linear is no algorithm"),
        (["algo.group_size=1"], "algo.group_size=1: GRPO compares the samples of one prompt with each other"),
        (["algo.scale_rewards=yes"], "algo.scale_rewards must be one of std, none, batch, got 'yes'"),
        (["trainer.precision=99"], "Precision 99 is invalid."),
        (["model.path=./nowhere"], "model.path: there is no folder ./nowhere"),
        (["data.path=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["ckpt_path=nowhere.ckpt"], "ckpt_path: there is no file nowhere.ckpt"),
    ],
)
def test_a_mistake_on_the_command_line_is_answered_by_one_sentence(here, arguments, sentence):
    assert fork(*arguments, *TINY, cwd=here).sentence().startswith(sentence)


def test_a_dry_run_refuses_what_the_run_would(here):
    sentence = "logger.wandb.log_model must be true, false or all, got 'maybe'"
    assert fork("dry_run=true", "logger.wandb.log_model=maybe", cwd=here).sentence() == sentence


def test_batch_sizes_that_do_not_divide(here):
    sizes = ["algo.prompts_per_rollout=5", "algo.group_size=3", "algo.minibatches=2"]
    sentence = fork(*sizes, *TINY, cwd=here).sentence()
    assert sentence.startswith("15 samples per device")
    assert "do not divide into algo.minibatches=2" in sentence
    sizes = ["algo.batch_size=7", "trainer.accumulate_grad_batches=2"]
    assert "algo.batch_size=7 does not divide" in fork("algo=sft", *sizes, *TINY, cwd=here).sentence()


def test_data_that_cannot_be_used(here):
    Path("empty.jsonl").write_text("")
    Path("binary.jsonl").write_bytes(bytes(range(256)))
    jsonl("long.jsonl", [*sums(3), {"prompt": "1+" * 90 + "1=", "answer": "91"}])
    jsonl("prompts.jsonl", sums())
    sentence_of = lambda *arguments: fork(*arguments, *TINY[1:], cwd=here).sentence()  # noqa: E731
    assert sentence_of("data.path=empty.jsonl").startswith("empty.jsonl is empty")
    assert sentence_of("data.path=binary.jsonl").startswith("binary.jsonl is not a text file")
    sentence = sentence_of("data.path=long.jsonl")
    assert sentence.startswith("1 of 4 training prompts do not fit the model: the longest has 182 tokens")
    assert "data.long_rows=drop" in sentence
    sentence = sentence_of("algo=sft", "data.path=prompts.jsonl", "algo.batch_size=4")
    assert sentence.startswith("SFT needs a text 'completion' in every row")


@pytest.mark.slow
def test_reward_functions_that_cannot_be_used(here):
    jsonl("sums.jsonl", sums())
    Path("mine.py").write_text("""
def short(completions, **columns):
    return [1.0]
def nan(completions, **columns):
    return [float("nan")] * len(completions)
def breaks(completions, **columns):
    raise KeyError("level\\nof the row")
""")
    sentence_of = lambda name: fork("data.path=sums.jsonl", f"reward.funcs=[{name}]", *TINY, cwd=here).sentence()  # noqa: E731
    assert "reward function short returned 1 rewards; expected a list of 16 numbers" in sentence_of("mine.short")
    assert sentence_of("mine.nan").startswith("reward function nan returned nan for row 0")
    assert sentence_of("mine.breaks").startswith("reward function breaks raised KeyError: ")
    assert "module 'mine' has no function 'shrt'; the nearest is 'short'" in sentence_of("mine.shrt")
    assert "there is no module 'mein'" in sentence_of("mein.short")


@pytest.mark.slow
def test_checkpoints_that_cannot_be_continued(here):
    checkpoint = run_folder(fork("algo=sft", *TINY, cwd=here)) / "checkpoints" / "last.ckpt"
    Path("truncated.ckpt").write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    torch.save({"state_dict": {}}, "foreign.ckpt")
    sentence_of = lambda file: fork("algo=grpo", f"ckpt_path={file}", *TINY, cwd=here).sentence()  # noqa: E731
    assert sentence_of(checkpoint).startswith("ckpt_path: a checkpoint of SFT cannot continue as GRPO")
    assert sentence_of("truncated.ckpt").startswith("ckpt_path: truncated.ckpt is not a readable checkpoint")
    assert sentence_of("foreign.ckpt").startswith("ckpt_path: foreign.ckpt is not a checkpoint of lit_rlhf")


def test_a_mistake_in_code_keeps_its_traceback(here):
    """Only what the user gave is answered by a sentence."""
    Path("broken.py").write_text("import no_such_package_of_theirs\n")
    finished = fork("plugins=[broken]", *TINY, cwd=here)
    assert finished.code == 1
    assert "Traceback" in finished.err
    assert "no_such_package_of_theirs" in finished.err


def test_a_lost_rank_is_a_sentence_and_no_mistake_of_the_users(here):
    said = "rank 1, step 3: another rank has ended; its own output says why"
    Path("gone.py").write_text(f"raise RuntimeError({said!r})\n")
    finished = fork("plugins=[gone]", *TINY, cwd=here)
    assert (finished.code, finished.err.strip().splitlines()[-1]) == (1, f"error: {said}")
    assert "Traceback" not in finished.err
    Path("odd.py").write_text("raise RuntimeError('rank deficient')\n")
    assert "Traceback" in fork("plugins=[odd]", *TINY, cwd=here).err


@pytest.mark.slow
def test_mistakes_in_a_process_of_their_own(here):
    sentence = new_process("algo.group_size=1", "debug=tiny", cwd=here).sentence()
    assert sentence.startswith("algo.group_size=1: GRPO compares")
    assert new_process("debug=tiny", "algo.lr='", cwd=here).sentence().startswith("algo.lr=' cannot be read")


# what a run leaves behind


def assert_complete(folder, accuracies):
    rows = metrics_of(folder)
    validations = [row for row in rows if "val/accuracy_greedy" in row]
    assert [row["step"] for row in validations] == accuracies
    for row in validations:
        assert 0 < row["val/accuracy_sampled"] < row["val/accuracy_greedy"] <= 1
    assert [f.name for f in sorted((folder / "config").iterdir())] == ["config.yaml", "hydra.yaml", "overrides.yaml"]
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == accuracies[-1]
    assert [f.name for f in folder.glob("wandb/offline-run-*/*.wandb")]
    return rows, validations[-1]


def greedy_accuracy(folder):
    """Of the exported model, by Transformers alone, on the problems that the run held out."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = []
    for row in ArithmeticData(held_out=16).held_out_rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        said = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        right.append(tokenizer.decode(said, skip_special_tokens=True) == row["answer"])
    return sum(right) / len(right)


@pytest.mark.slow
def test_a_run_leaves_metrics_checkpoint_configuration_and_model(here):
    finished = new_process("algo=grpo", "debug=tiny", cwd=here)
    folder = run_folder(finished)
    assert folder.parent.parent == here / "outputs"
    rows, last = assert_complete(folder, accuracies=[0, 4])
    (rollout,) = [row for row in rows if "reward/reward_mean" in row]
    assert 0.2 < rollout["reward/reward_mean"] == rollout["reward/accuracy"] < 0.7
    assert 0.3 < rollout["stability/entropy"] < 1
    assert 1 < rollout["rollout/response_length"] < 5
    assert rollout["rollout/staleness_max"] == 0
    assert 0 < rollout["stability/clip_fraction"] + rollout["stability/approx_kl"] < 0.1
    assert greedy_accuracy(folder / "model") == last["val/accuracy_greedy"]
    assert f"val/accuracy_greedy: {last['val/accuracy_greedy']:.3f}" in finished.out
    assert "reward " in finished.err
    assert "accuracy " in finished.err
    assert "Traceback" not in finished.err


@pytest.mark.slow
def test_the_console_script_runs_demonstrations(here):
    script = shutil.which("lit-rlhf", path=str(Path(sys.executable).parent))
    finished = new_process("algo=sft", "debug=tiny", "hydra.run.dir=out", cwd=here, command=(script,))
    assert run_folder(finished) == here / "out"
    rows, last = assert_complete(here / "out", accuracies=[0, 10])
    losses = [row["loss/sft_loss"] for row in rows if "loss/sft_loss" in row]
    assert 0 < losses[0] < 2
    assert greedy_accuracy(here / "out" / "model") == last["val/accuracy_greedy"]


def test_a_run_without_loggers_and_callbacks(here):
    folder = run_folder(fork("algo=sft", "debug=tiny", "logger=null", "callbacks=null", cwd=here))
    assert not (folder / "metrics.csv").exists()
    assert not (folder / "model").exists()


def test_prompts_and_a_reward_function_of_the_users_own(here):
    levels = {f"{n}+1=": n % 3 for n in range(40)}
    jsonl("sums.jsonl", [{"prompt": prompt, "level": level, "note": [level]} for prompt, level in levels.items()])
    Path("my_file.py").write_text("""
import json
def my_function(prompts, completions, completion_ids, level, **columns):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps([prompts, completions, level, sorted(columns), columns["note"]]) + "\\n")
    return [0.5 * len(ids) + x for ids, x in zip(completion_ids, level, strict=True)]
""")
    sizes = ["algo.prompts_per_rollout=8", "algo.group_size=2", "data.held_out=6"]
    arguments = ["data.path=sums.jsonl", "reward.funcs=[my_file.my_function]", *sizes, *TINY[1:]]
    folder = run_folder(fork(*arguments, "trainer.max_epochs=1", cwd=here))
    calls = [json.loads(line) for line in Path("calls.jsonl").read_text().splitlines()]
    assert any(len(call[0]) == 16 for call in calls)
    for prompts, completions, level, others, note in calls:
        assert [levels[prompt] for prompt in prompts] == level
        assert [[x] for x in level] == note
        assert len(completions) == len(prompts)
        assert others == ["log_extra", "log_metric", "note", "trainer_state"]
    (rollout,) = [row for row in metrics_of(folder) if "reward/reward_mean" in row]
    level = next(call[2] for call in calls if len(call[0]) == 16)
    expected = sum(level) / 16 + 0.5 * rollout["rollout/response_length"]
    assert rollout["reward/reward_mean"] == pytest.approx(expected, abs=1e-5)
    assert "val/accuracy_greedy" not in metrics_of(folder)[0], "no verifier, no accuracy"


def test_a_plugin_brings_a_loss_and_an_algorithm(here):
    Path("mine.py").write_text("""
from lit_rlhf import DAPO, register_adv_estimator, register_policy_loss

@register_policy_loss("three_and_a_half")
def three_and_a_half(old_logp, logp, advantages, mask, more=0.0, **named):
    return 0 * logp + 3.5 + more, {}

@register_adv_estimator("my_advantage")
def my_advantage(rewards, mask, **named):
    return rewards - rewards.mean(), rewards

class MyDAPO(DAPO):
    def __init__(self, *, strength: float = 1.0, **rest):
        super().__init__(**rest)
        print("strength", strength)
""")
    sizes = ["algo.prompts_per_rollout=8", "algo.group_size=2", "algo.minibatches=2"]
    by_name = ["plugins=[mine]", "algo.policy_loss=three_and_a_half", "algo.advantage_estimator=my_advantage"]
    by_node = ["algo.policy_loss._target_=mine.three_and_a_half", "algo.policy_loss.more=1.0"]
    for loss, expected in ((by_name, 3.5), (by_node, 4.5)):
        folder = run_folder(fork(*loss, *sizes, *TINY, f"hydra.run.dir={expected}", cwd=here))
        (rollout,) = [row for row in metrics_of(folder) if "loss/policy_loss" in row]
        assert rollout["loss/policy_loss"] == pytest.approx(expected)
    arguments = ["algo._target_=mine.MyDAPO", "algo.strength=2.5", "hydra.run.dir=out", *sizes, *TINY]
    finished = fork(*arguments, cwd=here)
    assert run_folder(finished) == here / "out"
    assert "strength 2.5\n" in finished.out


# rewards


@pytest.mark.slow
def test_a_reward_model_of_one_run_is_the_reward_of_another(here):
    """Training sees the model's rewards alone, and accuracy is still reported."""
    judged = fork("algo=reward_modeling", "trainer.max_steps=2", "trainer.max_epochs=-1", *TINY[1:], cwd=here)
    judge = run_folder(judged) / "model"
    finished = fork("algo=ppo", f"reward.funcs=[{judge}]", *TINY, cwd=here)
    rows = metrics_of(run_folder(finished))
    (rollout,) = [row for row in rows if "rewards/reward_model" in row]
    assert rollout["rewards/reward_model"] == rollout["reward/reward_mean"]
    assert rollout["rewards/reward_model_std"] > 0
    assert any("val/accuracy_greedy" in row for row in rows)


def test_rewards_with_arguments(here):
    Path("mine.py").write_text(
        "def longer(completions, than):\n    return [float(len(c) > than) for c in completions]\n"
    )
    funcs = "lit_rlhf.rewards.exact_match,{_target_: mine.longer, than: 2},"
    funcs += '{_target_: lit_rlhf.rewards.regex_format, pattern: "[0-9]{1,2}"}'
    finished = fork(f"reward.funcs=[{funcs}]", "reward.weights=[1,0.5,0]", "reward.timeout=20", *TINY, cwd=here)
    (rollout,) = [row for row in metrics_of(run_folder(finished)) if "rewards/longer" in row]
    total = rollout["rewards/exact_match"] + 0.5 * rollout["rewards/longer"]
    assert rollout["reward/reward_mean"] == pytest.approx(total, abs=1e-6)
    assert 0 < rollout["rewards/regex_format"] < 1
    assert rollout["rewards/longer"] + rollout["rewards/regex_format"] <= 1 + 1e-6


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (
            "[{_target_: lit_rlhf.rewards.regex_format, patern: a}]",
            "unknown key 'reward.funcs.0.patern'; did you mean 'pattern'?",
        ),
        ("[{pattern: a}]", "a reward function's node needs a _target_, an import path; got {'pattern': 'a'}"),
        ("[./nowhere]", "reward model: there is no folder ./nowhere; give a model folder or a Hub name"),
        (
            "[lit_rlhf.rewards.math]",
            "reward function 'lit_rlhf.rewards.math': module 'lit_rlhf.rewards' has no function 'math'; the",
        ),
        ("[mine.needs]", "reward function needs needs 'solution', which the data does not have; it has answer"),
        ("[mine.hangs]", "reward function hangs has not returned after 0.5 seconds; if it needs longer raise"),
    ],
)
def test_rewards_that_cannot_be_used_are_one_sentence(here, reward, sentence):
    Path("mine.py").write_text(
        "import re\n\n\ndef needs(completions, solution):\n    return []\n\n\n"
        "def hangs(completions):\n    return [float(bool(re.match(r'(a|aa)+$', 'a' * 60 + 'b')))] * len(completions)\n"
    )
    assert fork(f"reward.funcs={reward}", "reward.timeout=0.5", *TINY, cwd=here).sentence().startswith(sentence)
