"""Every ramp hits both ends to the last bit, stays between them and does not turn back."""

import math

from hypothesis import given
from hypothesis import strategies as st

from lightning_sparsity.schedules import (
    constant,
    cosine,
    cubic,
    cyclic,
    exponential,
    geometric,
    inverse_power,
    linear,
    sigmoid,
)

values = st.floats(-1e3, 1e3)
positive = st.floats(1e-6, 1e3)
progress = st.floats(0, 1)

falls_to_zero = st.builds(inverse_power, values, st.floats(0.1, 10)).map(lambda s: (s, 0.0))
others = st.one_of(
    st.builds(linear, values, values),
    st.builds(cosine, values, values),
    st.builds(cubic, values, values),
    st.builds(exponential, positive, positive),
    st.builds(sigmoid, values, values, st.floats(0.01, 1e3)),
).map(lambda s: (s, s.end))
ramps = others | falls_to_zero


@given(ramps)
def test_ramps_return_the_very_ends(ramp):
    schedule, end = ramp
    assert schedule(0.0) == schedule.start
    assert schedule(1.0) == end


@given(ramps, progress, progress)
def test_ramps_are_monotone_between_their_ends(ramp, x, y):
    schedule, end = ramp
    early, late = schedule(min(x, y)), schedule(max(x, y))
    slack = 1e-12 * max(1.0, abs(schedule.start), abs(end))
    if schedule.start <= end:
        assert schedule.start - slack <= early <= late + slack <= end + 2 * slack
    else:
        assert schedule.start + slack >= early >= late - slack >= end - 2 * slack


@given(values, progress)
def test_constant_is_constant(value, x):
    assert constant(value)(x) == value


@given(values, values, st.integers(1, 50), progress)
def test_cyclic_ends_low_and_stays_in_range(a, b, cycles, x):
    low, high = min(a, b), max(a, b)
    schedule = cyclic(low, high, cycles)
    slack = 1e-12 * max(1.0, abs(low), abs(high))
    assert schedule(0.0) == high
    assert schedule(1.0) == low
    assert low - slack <= schedule(x) <= high + slack


@given(positive, st.floats(0.5, 1.5), st.integers(1, 100), progress)
def test_geometric_multiplies_by_gamma_per_update(start, gamma, updates, x):
    schedule = geometric(start, gamma, updates)
    assert schedule(0.0) == start
    after_one = min(x + 1 / updates, 1.0)
    steps = (after_one - x) * updates
    assert math.isclose(schedule(after_one), schedule(x) * gamma**steps, rel_tol=1e-9)


@given(values, progress)
def test_a_density_ramp_is_one_minus_the_sparsity_ramp(end, x):
    for ramp in (linear, cosine, cubic, sigmoid):
        density, sparsity = ramp(1.0, 1 - end)(x), ramp(0.0, end)(x)
        assert math.isclose(density, 1 - sparsity, abs_tol=1e-9)
