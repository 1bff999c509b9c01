"""Reward functions as people write them for TRL's GRPOTrainer, after the kinds that its documentation shows.

`SCRIPT` is what they judge, and `PLAIN` and `CHAT` say by hand what each of them gives to each of its texts: where the
answer is 42 and the task is mathematics, at optimiser step 0 of 4. None of the functions knows of this library.
"""

import asyncio
import functools
import json
import re

import numpy as np
import torch

SCRIPT = (
    "<think>6*7</think>42",
    "<think>\nhmm\n</think>\n41",
    "42",
    "The answer is \\boxed{42}",
    "```python\nprint(42)\n```",
    '{"answer": 42}',
    "no no no no",
    "",
)
_NEVER = (None,) * len(SCRIPT)


def characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def unique_letters(completions, **kwargs):
    return [float(len({c for c in completion if c.isalpha()})) for completion in completions]


def few_tokens(completion_ids, **kwargs):
    """Only token ids are asked for."""
    return [1.0 if len(ids) <= 64 else 0.0 for ids in completion_ids]


def boxed_answer(completions, answer, **kwargs):
    found = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [1.0 if m and m.group(1) == a else 0.0 for m, a in zip(found, answer, strict=True)]


def contains_answer(prompts, completions, answer):
    """No keyword arguments: it is handed what it names."""
    return [0.5 * (a in completion) for completion, a in zip(completions, answer, strict=True)]


def think_tags(completions, **kwargs):
    pattern = re.compile(r"^<think>(?!.*<think>)(.*?)</think>.*$", re.DOTALL | re.MULTILINE)
    return [1.0 if pattern.match(completion) else 0.0 for completion in completions]


def count_tags(completions, **kwargs):
    """Partial credit."""
    return [0.25 * c.count("<think>") + 0.25 * c.count("</think>") for c in completions]


def code_block(completions, **kwargs):
    return [1.0 if re.search(r"```(\w+)?\n.*?```", c, re.DOTALL) else 0.0 for c in completions]


def valid_json(completions, **kwargs):
    def score(text):
        try:
            return 1.0 if "answer" in json.loads(text) else 0.5
        except (json.JSONDecodeError, TypeError):
            return 0.0

    return [score(completion) for completion in completions]


def keywords(completions, words=("answer", "hmm"), **kwargs):
    return [sum(word in completion.lower() for word in words) / len(words) for completion in completions]


def repeats(completions, **kwargs):
    def share(text):
        words = text.split()
        return len(set(words)) / len(words) if words else 0.0

    return [share(completion) - 1.0 if completion else 0.0 for completion in completions]


def if_mathematics(prompts, completions, task, **kwargs):
    """Of several tasks it judges one, and does not apply to the others."""
    return [(1.0 if "42" in c else -1.0) if t == "math" else None for c, t in zip(completions, task, strict=True)]


def if_code(prompts, completions, task, **kwargs):
    return [float("print" in c) if t == "code" else None for c, t in zip(completions, task, strict=True)]


def some_rows(completions, **kwargs):
    return [None if not completion else 1.0 for completion in completions]


async def remote_judge(prompts, completions, answer, **kwargs):
    """One request for all."""
    await asyncio.sleep(0)
    return [float(completion == a) for completion, a in zip(completions, answer, strict=True)]


async def remote_judge_by_row(completions, **kwargs):
    """One request per row, at the same time."""

    async def ask(text):
        await asyncio.sleep(0)
        return -0.1 if text.startswith("<") else 0.0

    return list(await asyncio.gather(*(ask(completion) for completion in completions)))


class NearLength:
    """An object with a setting."""

    def __init__(self, wanted):
        self.wanted = wanted
        self.__name__ = f"near_{wanted}"

    def __call__(self, completions, **kwargs):
        return [-abs(len(completion) - self.wanted) / self.wanted for completion in completions]


class LineCount:
    """A class without arguments, given as it is."""

    def __call__(self, completions, **kwargs):
        return [float(completion.count("\n")) for completion in completions]


def at_most(completions, limit, **kwargs):
    return [0.0 if len(completion) <= limit else -1.0 for completion in completions]


def curriculum(completions, trainer_state, **kwargs):
    """The format counts in the first half of the training."""
    early = trainer_state.global_step < trainer_state.max_steps / 2
    return [1.0 if early and "<think>" in completion else 0.0 for completion in completions]


def logging(completions, answer, log_extra=None, log_metric=None, **kwargs):
    right = [1.0 if a in completion else 0.0 for completion, a in zip(completions, answer, strict=True)]
    if log_extra:
        log_extra("gold", list(answer))
        log_extra("seen", completions)
    if log_metric:
        log_metric("accuracy", sum(right) / len(right))
    return right


def as_array(completions, **kwargs):
    return np.array([len(completion) % 2 for completion in completions])


def as_tensor(completions, **kwargs):
    return torch.tensor([float("4" in completion) for completion in completions])


def not_the_prompt(prompts, completions, **kwargs):
    return [-1.0 if completion in prompt else 0.0 for prompt, completion in zip(prompts, completions, strict=True)]


PLAIN = (
    (characters, (20, 23, 2, 24, 23, 14, 11, 0)),
    (unique_letters, (5, 6, 0, 13, 8, 6, 2, 0)),
    (few_tokens, (1, 1, 1, 1, 1, 1, 1, 1)),
    (boxed_answer, (0, 0, 0, 1, 0, 0, 0, 0)),
    (contains_answer, (0.5, 0, 0.5, 0.5, 0.5, 0.5, 0, 0)),
    (think_tags, (1, 1, 0, 0, 0, 0, 0, 0)),
    (count_tags, (0.5, 0.5, 0, 0, 0, 0, 0, 0)),
    (code_block, (0, 0, 0, 0, 1, 0, 0, 0)),
    (valid_json, (0, 0, 0, 0, 0, 1, 0, 0)),  # 42 is JSON, and has no keys
    (keywords, (0, 0.5, 0, 0.5, 0, 0.5, 0, 0)),
    (repeats, (0, 0, 0, 0, 0, 0, -0.75, 0)),
    (if_mathematics, (1, -1, 1, 1, 1, 1, -1, -1)),
    (if_code, _NEVER),
    (some_rows, (1, 1, 1, 1, 1, 1, 1, None)),
    (remote_judge, (0, 0, 1, 0, 0, 0, 0, 0)),
    (remote_judge_by_row, (-0.1, -0.1, 0, 0, 0, 0, 0, 0)),
    (NearLength(20), (0, -0.15, -0.9, -0.2, -0.15, -0.3, -0.45, -1)),
    (LineCount, (0, 3, 0, 0, 2, 0, 0, 0)),
    (functools.partial(at_most, limit=22), (0, -1, 0, -1, -1, 0, 0, 0)),
    (curriculum, (1, 1, 0, 0, 0, 0, 0, 0)),
    (logging, (1, 0, 1, 1, 1, 1, 0, 0)),
    (as_array, (0, 1, 0, 0, 1, 0, 1, 0)),
    (as_tensor, (1, 1, 1, 1, 1, 1, 0, 0)),
    (not_the_prompt, (0, 0, 0, 0, 0, 0, 0, -1)),  # the empty text is in every prompt
)


def think_format(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(r"^<think>.*?</think>", content, re.DOTALL) else 0.0 for content in contents]


def solution_accuracy(completions, answer, log_extra=None, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    found = [re.findall(r"\d+", content) for content in contents]
    if log_extra:
        log_extra("parsed", ["/".join(numbers) for numbers in found])
    return [float(bool(f) and f[-1] == a) for f, a in zip(found, answer, strict=True)]


def word_count(completions, **kwargs):
    return [len(message["content"].split()) for (message,) in completions]


def the_assistant_speaks(completions, **kwargs):
    return [float(completion[-1]["role"] == "assistant") for completion in completions]


def repeats_the_user(prompts, completions, **kwargs):
    users = [prompt[-1]["content"] for prompt in prompts]
    return [-1.0 if u in c[0]["content"] else 0.0 for u, c in zip(users, completions, strict=True)]


def whole_conversation(prompts, completions, **kwargs):
    """It joins the two in place, and must not change the data by that."""
    joined = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt += completion
        joined.append(prompt)
    return [float(len(messages)) for messages in joined]


async def remote_chat_judge(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [0.1 * len(completion[0]["content"]) for completion in completions]


CHAT = (
    (think_format, (1, 1, 0, 0, 0, 0, 0, 0)),
    (solution_accuracy, (1, 0, 1, 1, 1, 1, 0, 0)),
    (word_count, (1, 4, 1, 4, 3, 2, 4, 0)),
    (the_assistant_speaks, (1, 1, 1, 1, 1, 1, 1, 1)),
    (repeats_the_user, (-1, 0, 0, 0, 0, 0, 0, 0)),  # the user asks "6*7"
    (whole_conversation, (3, 3, 3, 3, 3, 3, 3, 3)),  # system, user, assistant
    (remote_chat_judge, (2.0, 2.3, 0.2, 2.4, 2.3, 1.4, 1.1, 0)),
)
