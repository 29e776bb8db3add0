"""Schedules: samples, ends, arguments."""

import math
import pickle

import pytest

from lightning_sparsity.schedules import (
    alternating,
    constant,
    cosine,
    cubic,
    cyclic,
    early,
    exponential,
    geometric,
    inverse_power,
    linear,
    sigmoid,
    step,
    until,
)

ALL = [
    constant(0.3),
    linear(0.3),
    cosine(0.3, 0.005),
    inverse_power(0.3),
    cubic(1.0, 0.1),
    exponential(1.0, 0.1),
    geometric(0.3, 0.99, 100),
    step(0.3, {0.5: 0.1}),
    sigmoid(1.0, 0.1),
    cyclic(0.1, 0.5, 3),
    early(cubic(1.0, 0.1), 0.6875),
]

SAMPLES = [
    (constant(0.3), [0.3, 0.3, 0.3, 0.3, 0.3]),
    (cosine(0.3), [0.3, 0.25607, 0.15, 0.04393, 0]),
    (cosine(0.3, 0.005), [0.3, 0.25680, 0.1525, 0.04820, 0.005]),
    (linear(0.3), [0.3, 0.225, 0.15, 0.075, 0]),
    (inverse_power(0.3, power=3), [0.3, 0.12656, 0.0375, 0.00469, 0]),
    (geometric(0.3, gamma=0.99, updates=100), [0.3, 0.23335, 0.18150, 0.14118, 0.10981]),
    (step(0.3, {0.5: 0.5, 0.75: 0.1}), [0.3, 0.3, 0.15, 0.015, 0.015]),
    (cubic(0.0, 0.9), [0, 0.52031, 0.7875, 0.88594, 0.9]),
    (cubic(1.0, 0.1), [1, 0.47969, 0.2125, 0.11406, 0.1]),
    (linear(0.0, 0.9), [0, 0.225, 0.45, 0.675, 0.9]),
    (cosine(0.0, 0.9), [0, 0.13180, 0.45, 0.76820, 0.9]),
    (exponential(1.0, 0.0001), [1, 0.1, 0.01, 0.001, 0.0001]),
    (cyclic(0.1, 0.5, cycles=1), [0.5, 0.44142, 0.3, 0.15858, 0.1]),
    (early(linear(0.3), 0.75), [0.3, 0.2, 0.1, 0, 0]),
]


@pytest.mark.parametrize(("schedule", "samples"), SAMPLES, ids=repr)
def test_samples_at_the_quarters(schedule, samples):
    values = [schedule(x) for x in (0, 0.25, 0.5, 0.75, 1)]
    assert values == pytest.approx(samples, abs=5e-6)


def test_iterative_pruning_removes_the_same_share_each_time():
    schedule = geometric(1.0, 0.8, updates=20)
    for k in range(21):
        assert schedule(k / 20) == pytest.approx(0.8**k)
        assert exponential(1.0, 0.8**20)(k / 20) == pytest.approx(0.8**k)


@pytest.mark.parametrize("normalize", [True, False])
def test_sigmoid_is_optg_eq_16(normalize):
    schedule = sigmoid(0.0, 0.9, steepness=0.5 * 160, normalize=normalize)
    for epoch, sparsity in [(70, 0.00602), (80, 0.45), (90, 0.89398)]:
        assert schedule(epoch / 160) == pytest.approx(sparsity, abs=5e-6)
    assert schedule(1) == 0.9


def test_raw_sigmoid_of_few_epochs_misses_both_ends_and_snaps_to_the_last():
    raw = sigmoid(0.0, 0.9, steepness=0.5 * 10, normalize=False)
    nearly = math.nextafter(1.0, 0.0)
    assert raw(0) == pytest.approx(0.0683, abs=5e-5)
    assert raw(nearly) == pytest.approx(0.8317, abs=5e-5)
    assert raw(1) == 0.9

    normalized = sigmoid(0.0, 0.9, steepness=0.5 * 10)
    assert normalized(0) == 0.0
    assert normalized(nearly) == pytest.approx(0.9)


def test_sigmoid_survives_any_steepness():
    assert sigmoid(1.0, 0.1, steepness=1e9)(0.4) == 1.0
    assert sigmoid(1.0, 0.0, steepness=1e-6)(0.25) == pytest.approx(0.75)


def test_step_counts_a_milestone_from_where_it_is_reached():
    schedule = step(1.0, {0.75: 0.1, 0.25: 0.5})
    assert [schedule(x) for x in (0.2499, 0.25, 0.7499, 0.75)] == [1.0, 0.5, 0.5, 0.05]
    assert step(0.3, {})(1) == 0.3


def test_cyclic_reaches_the_low_value_once_per_cycle():
    schedule = cyclic(0.1, 0.5, cycles=3)
    values = [schedule(k / 1000) for k in range(1001)]
    lows = sum(
        b < a and (c is None or b <= c)
        for a, b, c in zip(values, values[1:], [*values[2:], None], strict=False)
    )
    assert lows == 3
    assert values[-1] == 0.1


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_progress_is_clamped(schedule):
    assert schedule(-0.5) == schedule(0)
    assert schedule(1.5) == schedule(1)


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_repr_repeats_the_call_and_pickles_compare_and_hash(schedule):
    assert eval(repr(schedule)) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert len({schedule, eval(repr(schedule))}) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: constant(x), r"constant\(value=.*\): value must be a finite number, not"),
        (lambda x: linear(x), r"linear\(start=.*, end=0.0\): start must be"),
        (lambda x: cosine(0.3, x), "end must be"),
        (lambda x: inverse_power(0.3, x), "power must be a finite number above 0"),
        (lambda x: cubic(x, 0.1), "start must be"),
        (lambda x: exponential(x, 0.1), "start must be"),
        (lambda x: geometric(0.3, x, 10), "gamma must be"),
        (lambda x: geometric(0.3, 0.9, x), "updates must be"),
        (lambda x: step(x, {}), "value must be"),
        (lambda x: step(0.3, {0.5: x}), "factor at 0.5 must be"),
        (lambda x: step(0.3, {x: 0.5}), "milestone must be"),
        (lambda x: sigmoid(1.0, 0.1, x), "steepness must be"),
        (lambda x: cyclic(x, 0.5, 2), "low must be"),
        (lambda x: cyclic(0.1, 0.5, x), "cycles must be"),
    ],
)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (math.nan, ValueError),
        (math.inf, ValueError),
        (-math.inf, ValueError),
        ("0.3", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
)
def test_arguments_must_be_finite_numbers(make, message, value, error):
    with pytest.raises(error, match=message) as caught:
        make(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inverse_power(0.3, 0), "above 0, not 0"),
        (lambda: exponential(1.0, 0.0), "end must be a finite number above 0"),
        (lambda: exponential(-1.0, 0.5), "start must be a finite number above 0"),
        (lambda: geometric(0.3, 0.0, 10), "gamma must be"),
        (lambda: sigmoid(1.0, 0.1, 0), "steepness must be"),
        (lambda: step(0.3, {90: 0.1}), "write 90 / 160"),
        (lambda: step(0.3, {0: 0.1}), "milestone must be a finite number above 0"),
        (lambda: cyclic(0.5, 0.1, 2), "low must not exceed high"),
        (lambda: cyclic(0.1, 0.5, 0), "cycles must be"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_ramp_until_a_moment_is_the_ramp_over_a_shorter_time():
    ramp = until(cubic, 110 / 160)
    schedule = ramp(0.5, 0.1)
    for epoch in range(111):
        assert schedule(epoch / 160) == pytest.approx(cubic(0.5, 0.1)(epoch / 110))
    assert [schedule(epoch / 160) for epoch in (0, 110, 111, 160)] == [0.5, 0.1, 0.1, 0.1]
    assert repr(ramp) == "until(cubic, 0.6875)"
    assert eval(repr(ramp)) == pickle.loads(pickle.dumps(ramp)) == ramp


@pytest.mark.parametrize("make", [lambda at: until(cubic, at), lambda at: early(linear(0.3), at)])
@pytest.mark.parametrize(
    ("at", "error"),
    [(0, ValueError), (1.5, ValueError), (math.nan, ValueError), ("0.5", TypeError)],
)
def test_a_moment_lies_in_the_window(make, at, error):
    with pytest.raises(error, match=r"(until|early)\(.*: at must"):
        make(at)


def test_only_schedules_can_be_early():
    with pytest.raises(TypeError, match=r"until\(0.3, 0.5\): 0.3 must be a schedule or ramp"):
        until(0.3, 0.5)


def test_cycles_must_be_an_integer():
    with pytest.raises(TypeError, match="cycles must be an integer, not 2.5"):
        cyclic(0.1, 0.5, 2.5)


@pytest.mark.parametrize(
    ("class_path", "init_args", "expected"),
    [
        ("cosine", {"start": 0.3}, cosine(0.3)),
        ("geometric", {"start": 0.3, "gamma": 0.99, "updates": 100}, geometric(0.3, 0.99, 100)),
        ("step", {"value": 0.3, "factors": {0.5: 0.1}}, step(0.3, {0.5: 0.1})),
        ("step", {"value": 0.3, "factors": [[0.5, 0.1]]}, step(0.3, {0.5: 0.1})),
        ("sigmoid", {"start": 1, "end": 0.1, "normalize": False}, sigmoid(1, 0.1, 80, False)),
        ("cyclic", {"low": 0.1, "high": 0.5, "cycles": 2}, cyclic(0.1, 0.5, 2)),
    ],
)
def test_command_lines_can_make_them(class_path, init_args, expected):
    jsonargparse = pytest.importorskip("jsonargparse")
    from lightning_sparsity.core.layer import Schedule

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=Schedule)
    config = {"class_path": f"lightning_sparsity.schedules.{class_path}", "init_args": init_args}
    parsed = parser.parse_object({"schedule": config})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    assert instantiate(parsed).schedule == expected


def test_alternating_is_dense_outside_of_its_phases():
    density = alternating(((0.2, 0.5), (0.8, 1.0)))(0.7, 0.1)
    assert [density(x) for x in (0, 0.19, 0.2, 0.49, 0.5, 0.79, 0.8, 1)] == [
        *(1, 1, 0.1, 0.1),
        *(1, 1, 0.1, 0.1),
    ]
    assert [alternating()(1.0, 0.1)(x) for x in (0, 0.99, 1)] == [1, 1, 0.1]
    assert [alternating(((0.1, 0.3), (0.7, 1))).are_over(x) for x in (0.2, 0.69, 0.7)] == [0, 0, 1]
    assert pickle.loads(pickle.dumps(density)) == density
