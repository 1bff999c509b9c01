"""A limit on time: what it interrupts, and what it leaves as it was."""

import contextlib
import contextvars
import functools
import re
import signal
import threading
import time

import pytest

from lit_rlhf.errors import InputError
from lit_rlhf.rewards import RewardFunctions, regex_format
from lit_rlhf.rewards.timeouts import TimedOut, within

BRIEF = 0.1
FOREVER = 30.0  # far beyond the limit, and an end to a test that has gone wrong


def in_a_thread(call):
    """What the call returns or raises in a thread that is not the main one."""
    found = []

    def run():
        try:
            found.append((call(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(FOREVER)
    value, error = found[0]
    if error is not None:
        raise error
    return value


def directly(call):
    return call()


WHERE = pytest.mark.parametrize("where", [directly, in_a_thread])


def a_sleep():
    time.sleep(FOREVER)


def a_loop():
    end = time.monotonic() + FOREVER
    while time.monotonic() < end:
        pass


def a_loop_that_swallows_exceptions():
    end = time.monotonic() + FOREVER
    while time.monotonic() < end:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def a_regular_expression():
    re.match(r"(a|aa)+$", "a" * 60 + "b")


HANGING = [a_sleep, a_loop, a_loop_that_swallows_exceptions]


@WHERE
@pytest.mark.parametrize("hanging", HANGING)
def test_what_hangs_is_given_up(where, hanging):
    with pytest.raises(TimedOut):
        where(lambda: within(BRIEF, hanging))


def test_a_regular_expression_that_explodes_is_given_up():
    with pytest.raises(TimedOut):
        within(BRIEF, a_regular_expression)


@WHERE
def test_what_is_in_time_returns_or_raises_as_without(where):
    assert where(lambda: within(FOREVER, lambda: 3)) == 3
    assert where(lambda: within(None, lambda: 4)) == 4
    with pytest.raises(KeyError, match="key"):
        where(lambda: within(FOREVER, lambda: {}["key"]))


def test_a_thread_sees_the_context_of_its_caller():
    variable = contextvars.ContextVar("variable", default="outside")

    def call():
        variable.set("inside")
        return within(FOREVER, variable.get)

    assert in_a_thread(call) == "inside"


def test_a_loop_in_a_thread_does_not_go_on_for_ever():
    before = set(threading.enumerate())
    with pytest.raises(TimedOut):
        in_a_thread(lambda: within(BRIEF, a_loop))
    for thread in set(threading.enumerate()) - before:
        thread.join(FOREVER / 2)
        assert not thread.is_alive()


@pytest.fixture
def alarm():
    """A handler and a timer of somebody else's, and what has rung."""
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    yield rung
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)


def test_a_handler_and_a_timer_are_put_back(alarm):
    own = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, FOREVER, 7)
    assert within(5, lambda: 3) == 3
    with pytest.raises(TimedOut):
        within(BRIEF, a_sleep)
    assert signal.getsignal(signal.SIGALRM) is own
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 0.5 * FOREVER < left < FOREVER - 0.9 * BRIEF
    assert interval == pytest.approx(7)
    assert not alarm


def test_without_a_timer_before_there_is_none_after(alarm):
    within(5, lambda: 3)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    within(None, lambda: 3)
    assert not alarm


def test_a_limit_within_a_limit_leaves_the_outer_one_at_work():
    def outer():
        with pytest.raises(TimedOut):
            within(BRIEF, a_sleep)
        a_sleep()

    with pytest.raises(TimedOut):
        within(4 * BRIEF, outer)
    slept = []
    with pytest.raises(TimedOut):  # the outer one is the shorter
        within(BRIEF, lambda: within(FOREVER, lambda: slept.append(time.sleep(3))))
    assert not slept


def test_a_function_may_use_the_alarm_itself(alarm):
    def own(completions):
        handler = signal.signal(signal.SIGALRM, lambda *_: alarm.append("own"))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        signal.pause()
        signal.signal(signal.SIGALRM, handler)
        return [1.0]

    assert RewardFunctions(own)(["p"], ["c"], [[1]], {})[0].tolist() == [1]
    assert alarm == ["own"]


# reward functions


def refusal(fn, timeout=BRIEF, where=directly):
    with pytest.raises(InputError) as caught:
        where(lambda: RewardFunctions(fn, timeout=timeout)(["p"], ["a" * 60 + "b"], [[1]], {}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


HANGS = "has not returned after 0.1 seconds; if it needs longer raise reward.timeout (in Python RewardFunctions(..."


@WHERE
@pytest.mark.parametrize("hanging", HANGING)
def test_a_function_that_hangs_ends_the_run_with_a_sentence(where, hanging):
    def slow(completions):
        return hanging()

    assert f"reward function slow {HANGS}" in refusal(slow, where=where)


def test_a_format_that_explodes_is_named():
    assert f"reward function regex_format {HANGS}" in refusal(regex_format(r"(a|aa)+$"))


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_limits_without_a_meaning_are_refused(timeout):
    with pytest.raises(InputError, match=r"reward\.timeout must be"):
        RewardFunctions(len, timeout=timeout)


def test_no_limit():
    def quick(completions):
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
        return [1.0]

    assert RewardFunctions(functools.partial(quick), timeout=None)(["p"], ["c"], [[1]], {})[0].tolist() == [1]
