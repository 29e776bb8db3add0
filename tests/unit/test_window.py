"""Windows: which steps are due, and how far along they are."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

from lightning_sparsity import epochs
from lightning_sparsity.core.window import (
    Asked,
    Ends,
    Steps,
    Window,
    check_moment,
    is_time,
    resolve,
)


def due(steps, until=40):
    return [step for step in range(until + 1) if steps.due(step)]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (Steps(5, 0, 20), [5, 10, 15, 20]),  # not at 0: nothing was trained yet
        (Steps(5, 0, 18), [5, 10, 15]),
        (Steps(5, 3, 20), [3, 8, 13, 18]),
        (Steps(5, 1, 11), [1, 6, 11]),
        (Steps(1, 4, 7), [4, 5, 6, 7]),
        (Steps(100, 0, 30), []),
        (Steps(100, 7, 30), [7]),
        (Steps(5, 9, 9), [9]),
        (Steps(5, 10, 4), []),
        (Steps(5, 0, 0), []),
    ],
)
def test_due_steps(steps, expected):
    assert due(steps) == expected
    # A window that arrives is due at its end as well, if it has one after the start.
    end = {steps.end} if max(steps.start, 1) <= steps.end else set()
    assert due(dataclasses.replace(steps, arrives=True)) == sorted({*expected} | end)


def test_epochs_are_due_at_their_last_step():
    assert due_by_epoch(Steps("epoch", 5, 30)) == [8, 16, 24]
    assert due_by_epoch(Steps("epoch", 5, 30, arrives=True)) == [8, 16, 24, 30]
    assert due_by_epoch(Steps("epoch", 9, 24)) == [16, 24]
    assert due_by_epoch(Steps("epoch", 9, 24, arrives=True)) == [16, 24]


def test_every_nth_epoch_is_counted_from_the_start_of_training():
    assert due_by_epoch(Steps(epochs(2), 0, 40)) == [16, 32]
    assert due_by_epoch(Steps(epochs(2), 9, 31)) == [16]
    assert due_by_epoch(Steps(epochs(2), 17, 40)) == [32]
    assert due_by_epoch(Steps(epochs(3), 0, 40)) == [24]
    assert due_by_epoch(Steps(epochs(3), 0, 30, arrives=True)) == [24, 30]
    assert due_by_epoch(Steps(epochs(5), 0, 39)) == []
    for start, end in ((5, 30), (9, 24)):
        assert due_by_epoch(Steps(epochs(1), start, end)) == due_by_epoch(
            Steps("epoch", start, end)
        )


def due_by_epoch(steps):
    """Due steps of a training whose epochs have 8 steps."""
    return [
        step for step in range(41) if steps.due(step, step % 8 == 0 and steps.counts(step // 8 - 1))
    ]


def test_intervals_in_steps_count_no_epochs():
    assert not any(Steps(5, 0, 40).counts(epoch) for epoch in range(10))
    assert Steps(5, 0, 40).epochs is None


def test_progress_runs_from_zero_to_one_and_stops():
    steps = Steps(5, 10, 30)
    assert [steps.progress(s) for s in (0, 10, 15, 20, 30, 31, 1000)] == [0, 0, 0.25, 0.5, 1, 1, 1]
    assert Steps(1, 0, 4).progress(1) == 0.25


@pytest.mark.parametrize("end", [0, 5])
def test_progress_of_a_single_moment(end):
    steps = Steps(1, end, end)
    assert [steps.progress(s) for s in range(7)] == [0.0 if s < end else 1.0 for s in range(7)]


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("total", [4, 5, 7, 9, 20, 100])
@pytest.mark.parametrize(
    ("every", "start", "end"),
    [(5, 0, 20), (100, 0, 20), (5, 7, 20), (5, 30, 20), (5, 0, 0), (5, 0, 4), (1, 9, 9)],
)
def test_whether_any_step_is_due(every, start, end, total, arrives):
    steps = Steps(every, start, end, arrives)
    assert steps.opens(total) == bool(due(steps, total))
    assert steps.opens(math.inf) == bool(due(steps, 200))


def test_whether_an_epoch_may_end_in_the_window():
    assert Steps("epoch", 0, 20).opens(20)
    assert not Steps("epoch", 30, 40).opens(20)
    assert not Steps("epoch", 0, 0).opens(20)
    assert Steps(epochs(3), 0, 20).opens(20)
    assert Steps(epochs(3), 0, 20).opens(20, epochs=3)
    assert not Steps(epochs(3), 0, 20).opens(20, epochs=2)
    assert Steps(epochs(3), 0, 20, arrives=True).opens(20, epochs=2)
    assert not Steps(epochs(3), 0, 20).jumps


@pytest.mark.parametrize(
    ("time", "total", "step"),
    [
        (7, 100, 7),
        (7, math.inf, 7),
        (0, math.inf, 0),
        (0.75, 100, 75),
        (1.0, 24, 24),
        (0.0, 24, 0),
        (0.29, 100, 29),  # 28.999999999999996
        (0.5, 25, 12),
        (0.1, 3, 1),
    ],
)
def test_times_in_steps(time, total, step):
    found = resolve(time, total)
    assert found == step
    assert isinstance(found, int)


def test_the_beginning_is_known_without_the_end():
    assert resolve(0.0, math.inf) == 0
    assert Window(5, 0.0, 20).resolve(math.inf) == Steps(5, 0, 20)


@pytest.mark.parametrize("total", [math.inf, -1, 0, math.nan])
def test_fractions_of_an_unknown_length(total):
    with pytest.raises(ValueError, match="0.75 is a fraction of training.*optimizer steps"):
        Window(5, 0, 0.75).resolve(total)
    with pytest.raises(ValueError, match="0.5 is a fraction of training"):
        Window(5, 0.5, 20).resolve(total)


def test_windows_in_steps():
    assert Window().resolve(1000) == Steps(100, 0, 1000)
    assert Window("epoch", 0.25, 0.75).resolve(200) == Steps("epoch", 50, 150)
    assert Window(3, 5, 10).resolve(math.inf) == Steps(3, 5, 10)
    assert Window(3, 5, 1.0).resolve(7) == Steps(3, 5, 7)
    assert Window(3, 5, 10).resolve(9, arrives=True) == Steps(3, 5, 10, arrives=True)


@pytest.mark.parametrize("every", [0, -5, 2.0, "step", "epochs", None, True])
def test_intervals_are_checked(every):
    with pytest.raises(ValueError, match=r"update_interval=.*positive number.*\"epoch\".*epochs"):
        Window(every)


@pytest.mark.parametrize(
    ("number", "error"),
    [(0, ValueError), (-2, ValueError), (1.5, TypeError), ("5", TypeError), (True, TypeError)],
)
def test_numbers_of_epochs_are_checked(number, error):
    with pytest.raises(error, match=r"^epochs\(.*number must be"):
        epochs(number)


def test_numbers_of_epochs_may_come_from_numpy():
    assert epochs(np.int64(5)) == epochs(5)
    assert type(epochs(np.int64(5)).number) is int
    assert f"every {epochs(5)}" == "every 5 epochs"


@pytest.mark.parametrize("key", ["start", "end"])
@pytest.mark.parametrize("time", [-1, 1.5, -0.1, math.nan, math.inf, "end", None, True])
def test_times_are_checked(key, time):
    with pytest.raises(ValueError, match=rf"update_{key}=.*int >= 0.*float in \[0, 1\]"):
        Window(**{key: time})


def test_ends_that_cannot_be_meant():
    with pytest.raises(ValueError, match=r"update_end=1 .*update_end=1\.0"):
        Window(end=1)
    with pytest.raises(ValueError, match="update_end=5 comes before update_start=9"):
        Window(start=9, end=5)
    with pytest.raises(ValueError, match=r"update_end=0\.1 comes before update_start=0\.5"):
        Window(start=0.5, end=0.1)
    assert Window(start=1, end=2).resolve(9) == Steps(100, 1, 2)


def test_what_is_a_time():
    assert all(map(is_time, (0, 1, 10**9, 0.0, 0.5, 1.0)))
    assert not any(map(is_time, (-1, 1.5, -0.5, math.nan, math.inf, True, False, "1", None)))


def test_windows_pickle_and_compare():
    window = Window("epoch", 0, 0.5)
    assert pickle.loads(pickle.dumps(window)) == window != Window("epoch", 0, 0.75)
    assert eval(repr(window)) == window
    window = Window(epochs(5), 0, 0.5)
    assert pickle.loads(pickle.dumps(window)) == window == eval(repr(window))
    assert window != Window("epoch", 0, 0.5)
    assert window.resolve(20) == Steps(epochs(5), 0, 10)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(5, 11, [5, 11]), (1, 30, [1, 30]), (0, 8, [8]), (7, 7, [7]), (0.25, 0.5, [10, 20])],
)
def test_updates_at_both_ends(start, end, expected):
    window = Ends(start=start, end=end)
    assert due(window.resolve(40)) == expected
    assert not window.resolve(40).jumps
    assert pickle.loads(pickle.dumps(window)) == window != Ends(start=start, end=39)


def test_moments_of_a_round():
    for good in (0, 7, 0.0, 0.99):
        check_moment("f(x=)", good)
    for bad in (-1, 1.0, -0.5, math.nan):
        with pytest.raises(
            ValueError, match=r"^f\(x=\): must be an optimizer step \(int >= 0\) or"
        ):
            check_moment("f(x=)", bad)
    for bad in (True, None, "end"):
        with pytest.raises(TypeError, match=r"^f\(x=\): must be an optimizer step"):
            check_moment("f(x=)", bad)


@pytest.mark.parametrize("every", [1, 5, "epoch", epochs(2)])
def test_nothing_is_due_where_the_method_asks(every):
    steps = Asked(every, 0, 1.0).resolve(20, arrives=True)
    assert (steps.start, steps.end) == (0, 20)
    assert not any(steps.due(step, last_of_epoch=True) for step in range(25))
    assert not any(steps.counts(epoch) for epoch in range(5))
    assert steps.opens(20, epochs=1)
    assert not dataclasses.replace(steps, start=21).opens(20)
