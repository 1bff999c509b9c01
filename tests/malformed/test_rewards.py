"""Reward functions that return, do or are what nothing can be learnt from."""

from pathlib import Path

import pytest

from tests.malformed.answers import trained

pytestmark = pytest.mark.slow

SOURCE = """
import asyncio, math

NOT_CALLABLE = 3
def short(completions, **columns): return [1.0]
def texts(completions, **columns): return ["good"] * len(completions)
def nested(completions, **columns): return [[1.0]] * len(completions)
def number(completions, **columns): return 1.0
def nothing(completions, **columns): return None
def nan(completions, **columns): return [math.nan] * len(completions)
def infinite(completions, **columns): return [math.inf] * len(completions)
def huge(completions, **columns): return [1e300] * len(completions)
def raises(completions, **columns): raise KeyError("level")
def needs(completions, solution): return [1.0] * len(completions)
def positional(a, b): return [1.0] * len(a)
def endless(completions, **columns):
    while True: pass
async def asleep(completions, **columns): await asyncio.sleep(3600)
async def fails(completions, **columns): return {}["key"]
def leaves(completions, **columns): raise RuntimeError("the key is " + __import__("os").environ["MY_API_KEY"])
class Needs:
    def __init__(self, threshold): pass
    def __call__(self, completions, **columns): return [1.0] * len(completions)
class Silent: pass
"""
REWARDS = [
    ("mine.short", "reward function short returned 1 rewards; expected a list of 32 numbers or None"),
    ("mine.texts", "reward function texts returned 'good' (str) for row 0; expected a number"),
    ("mine.nested", "reward function nested returned [1.0] (list) for row 0; expected a number"),
    ("mine.number", "reward function number returned a float; expected a list of 32 numbers or None"),
    ("mine.nothing", "reward function nothing returned a NoneType; expected a list of 32 numbers or None"),
    ("mine.nan", "reward function nan returned nan for row 0; expected a finite number"),
    ("mine.infinite", "reward function infinite returned inf for row 0; expected a finite number"),
    ("mine.huge", "reward function huge returned 1e+300 for row 0; expected a finite number"),
    ("mine.raises", "reward function raises raised KeyError: 'level'"),
    ("mine.leaves", "reward function leaves raised RuntimeError: the key is ***"),
    ("mine.needs", "reward function needs needs 'solution', which the data does not have; it has answer"),
    ("mine.positional", "reward function positional needs 'a', which the data does not have; it has answer"),
    ("mine.endless", "reward function endless has not returned after 0.5 seconds; if it needs longer raise"),
    ("mine.asleep", "reward function asleep has not returned after 0.5 seconds; if it needs longer raise"),
    ("mine.fails", "reward function fails raised KeyError: 'key'"),
    ("mine.Needs", "reward function Needs: making it raised TypeError: "),
    ("mine.Silent", "reward function Silent made a Silent; expected something that can be called"),
    (
        "mine.NOT_CALLABLE",
        "reward function 'mine.NOT_CALLABLE': module 'mine' has no function 'NOT_CALLABLE', only a v",
    ),
    ("mine.shrt", "reward function 'mine.shrt': module 'mine' has no function 'shrt'; the nearest is 'short'"),
    ("mein.short", "reward function 'mein.short': there is no module 'mein'"),
    ("broken.short", "reward function 'broken.short': importing broken raised SyntaxError: "),
    ("mine.py", "reward function 'mine.py' is a file and no import string"),
    ("short", "reward function 'short' is no import string: write 'my_file.my_function'"),
    ("{short: 1}", "a reward function's node needs a _target_, an import path; got {'short': 1}"),
]
ARGUMENTS = [
    ("reward.funcs=[]", "reward functions: at least one is needed, got none"),
    ("reward.weights=[1]", "reward weights: there are no reward functions to weight; give those too"),
    ("reward.weights=many", "'reward.weights' must be Sequence[float], got 'many'"),
    ("reward.timeout=-1", "reward.timeout must be above 0, got -1"),
]


@pytest.mark.parametrize(("reward", "sentence"), REWARDS)
def test_functions(monkeypatch, reward, sentence):
    monkeypatch.setenv("MY_API_KEY", "sk-planted-in-the-environment")
    Path("mine.py").write_text(SOURCE)
    Path("broken.py").write_text("def short(:\n")
    given = [f"reward.funcs=[{reward}]", "reward.timeout=0.5", "callbacks.export=null"]
    assert trained(*given).startswith(sentence)


@pytest.mark.parametrize(("argument", "sentence"), ARGUMENTS)
def test_arguments(argument, sentence):
    assert trained(argument).startswith(sentence)
