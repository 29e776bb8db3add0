"""Distributions: worked numbers, exact sums, errors that name the layer."""

import math
import pickle

import pytest
import torch

from lightning_sparsity.core.apportion import apportion, fill
from lightning_sparsity.core.layer import Layer, dense_layers
from lightning_sparsity.distributions import (
    epsilon,
    er,
    erk,
    erk_power,
    fan_in,
    fixes_total,
    global_by,
    in_proportion,
    keep_dense,
    lamp,
    lamp_score,
    per_layer,
    smart_ratio,
    smart_ratio_with,
    uniform,
    uniform_plus,
    unmatched,
)
from lightning_sparsity.scores import gradient, magnitude, needs_gradient, without_gradient
from lightning_sparsity.structures import Block, Layout, Rows

LENET = {"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}


@pytest.fixture
def lenet():
    return dense_layers(LENET)


def layer(values, name="fc.weight", mask=None, **kwargs):
    weight = torch.tensor(values)
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return Layer(name, weight, mask.bool(), **kwargs)


# Counts by shape


def test_uniform(lenet):
    assert uniform(lenet, 26620) == [23520, 3000, 100]


def test_uniform_looks_at_sizes_and_fits_into_what_is_live():
    pruned = layer([[1.0] * 10], mask=[[1] * 2 + [0] * 8])
    full = layer([[1.0] * 10])
    assert uniform([pruned, full], 10) == [2, 8]


@pytest.mark.parametrize(
    ("total", "densities"),
    [
        (26620, [0.0795678, 0.2301887, 1]),
        (13310, [0.0384841, 0.1113342, 0.9185069]),
        (2662, [0.0076968, 0.0222668, 0.1837014]),
    ],
)
@pytest.mark.parametrize("distribution", [er, erk, erk_power(1)])
def test_er_and_erk_of_a_perceptron(lenet, distribution, total, densities):
    counts = distribution(lenet, total)
    assert sum(counts) == total
    for count, density, part in zip(counts, densities, lenet, strict=True):
        assert abs(count - density * part.size) <= 1


def test_erk_power_zero_is_uniform(lenet):
    assert erk_power(0)(lenet, 12345) == uniform(lenet, 12345)


def test_er_ignores_the_kernel_and_erk_does_not():
    conv = dense_layers({"a": (8, 8, 5, 5), "b": (8, 8, 1, 1)})
    assert er(conv, 416) == uniform(conv, 416)
    assert erk(conv, 416)[1] == 64


def test_transposed_and_grouped_convolutions_count_like_their_mirror_image():
    mask = torch.ones(6, 4, 3, 3, dtype=torch.bool)
    plain = Layer("a", torch.ones(6, 4, 3, 3), mask)
    mirrored = Layer(
        "a", torch.ones(4, 6, 3, 3), mask.transpose(0, 1), layout=Layout(transposed=True)
    )
    # 12 outputs, 4 inputs per group; the weight of the transposed one is (in, out / groups).
    mask = torch.ones(12, 4, 3, 3, dtype=torch.bool)
    grouped = Layer("b", torch.ones(12, 4, 3, 3), mask, layout=Layout(groups=2))
    mask = torch.ones(8, 6, 3, 3, dtype=torch.bool)
    both = Layer("b", torch.ones(8, 6, 3, 3), mask, layout=Layout(groups=2, transposed=True))
    for distribution in (er, erk, epsilon(3), fan_in):
        assert distribution([plain, grouped], 200) == distribution([mirrored, both], 200)
    assert epsilon(3)([grouped], 0) == [3 * (12 + 4) * 9]


def test_counts_are_units_of_the_structure():
    weight, mask = torch.ones(8, 6), torch.ones(8, 6, dtype=torch.bool)
    rows = Layer("rows", weight, mask, structure=Rows())
    blocks = Layer("blocks", weight, mask, structure=Block(2, 3))
    assert uniform([rows, blocks], 8) == [4, 4]
    assert erk([rows, blocks], 8) == [4, 4]


RESNET50_SIZES = (9408, 2048000, 25502912)


@pytest.mark.parametrize(("density", "rest"), [(0.1, 0.090904), (0.2, 0.199679)])
def test_uniform_plus_of_resnet50(density, rest):
    first, last, size = RESNET50_SIZES
    net = dense_layers(
        {"conv1": (64, 3, 7, 7), "middle": (size - first - last, 1, 1, 1), "fc": (1000, 2048)}
    )
    total = round(density * size)
    counts = uniform_plus(net, total)
    assert sum(counts) == total
    assert counts[0] == first
    assert counts[2] == 0.2 * last
    assert counts[1] / net[1].size == pytest.approx(rest, abs=1e-6)


def test_uniform_plus_without_a_convolution_and_without_a_matrix(lenet):
    assert uniform_plus(lenet, 26620)[2] == 200
    assert uniform_plus(lenet, 133100) == uniform(lenet, 133100)
    convs = dense_layers({"a": (4, 1, 3, 3), "b": (4, 4, 3, 3), "c": (4, 4, 3, 3)})
    assert uniform_plus(convs, 36 + 50) == [36, 25, 25]


def test_uniform_plus_that_cannot_pay_for_its_ends():
    net = dense_layers({"conv": (4, 1, 3, 3), "fc1": (20, 36), "fc2": (10, 20)})
    with pytest.raises(ValueError, match=r"uniform_plus: 60 live units are too few, since conv, "):
        uniform_plus(net, 60)


def test_epsilon_is_links_per_unit_and_ignores_the_total():
    net = dense_layers({"fc1": (1000, 784), "fc2": (1000, 1000), "fc3": (10, 1000)})
    counts = epsilon(20)(net, 1)
    assert counts == epsilon(20)(net, 10**9) == [35680, 40000, 10000]
    assert counts[0] / net[0].size == pytest.approx(0.04551, abs=5e-6)
    assert epsilon(1e-9)(net, 0) == [1, 1, 1]


def test_fan_in(lenet):
    assert fan_in(lenet, 26620) == [23400, 3000, 100]
    higgs = dense_layers({"first": (256, 21)})
    assert fan_in(higgs, 161) == [256]


def test_fan_in_needs_single_weights():
    weight = torch.ones(4, 4)
    rows = Layer("net.0.weight", weight, weight.bool(), structure=Rows())
    with pytest.raises(ValueError, match=r"net.0.weight has the structure Rows\(\)"):
        fan_in([rows], 8)


# By name


def test_per_layer_takes_the_first_match(lenet):
    assert per_layer({"fc3": 1.0, "fc*": 0.1})(lenet, 0) == [23520, 3000, 1000]
    assert per_layer({"fc*": 0.1, "fc[3]": 1.0})(lenet, 0) == [23520, 3000, 100]
    assert per_layer({"*": 1e-9})(lenet, 0) == [1, 1, 1]


def test_per_layer_names_what_does_not_match(lenet):
    with pytest.raises(ValueError, match=r"per_layer.*no pattern matches fc3; add one"):
        per_layer({"fc1": 0.1, "fc2": 0.1})(lenet, 0)
    assert unmatched(per_layer({"fc*": 0.1, "conv*": 0.1}), ["fc1", "fc2"]) == ["conv*"]


def test_per_layer_does_not_promise_more_than_is_live():
    pruned = layer([[1.0] * 10], mask=[[1] * 2 + [0] * 8])
    with pytest.raises(ValueError, match="fc.weight should have 5 live units and has only 2"):
        per_layer({"*": 0.5})([pruned], 0)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, math.nan, "0.1", True, None])
def test_per_layer_checks_its_densities(density):
    with pytest.raises(ValueError, match=r"the density of 'fc' must be a number in \(0, 1\]"):
        per_layer({"fc": density})


def test_keep_dense_in_both_conventions(lenet):
    counts = keep_dense(erk, ["fc1"])(lenet, 26620)
    assert counts[0] == 235200
    assert sum(counts[1:]) == 3100
    assert [n / part.size for n, part in zip(counts[1:], lenet[1:], strict=True)] == pytest.approx(
        [0.0810458, 0.6686275], abs=1e-3
    )
    assert keep_dense(uniform, "fc3", charge=True)(lenet, 26620) == [22722, 2898, 1000]
    with pytest.raises(ValueError, match=r"fc1 take 235200 .* largest sparsity is 0.1164"):
        keep_dense(erk, ["fc1"], charge=True)(lenet, 26620)


def test_keep_dense_uncharged_names_the_density_of_the_other_layers(lenet):
    with pytest.raises(
        ValueError, match=r"largest reachable sparsity is 0.999935 \(density 6.452e-05\)"
    ):
        keep_dense(erk, ["fc1"])(lenet, 3)


def test_keep_dense_of_every_layer(lenet):
    assert keep_dense(erk, ["*"])(lenet, 26620) == [235200, 30000, 1000]


def test_keep_dense_around_a_distribution_that_fixes_the_total(lenet):
    assert keep_dense(per_layer({"fc[12]": 0.1}), ["fc3"])(lenet, 0) == [23520, 3000, 1000]
    assert keep_dense(epsilon(1), ["fc3"], charge=True)(lenet, 0) == [1084, 400, 1000]


def test_keep_dense_names_a_pattern_without_a_match(lenet):
    names = [layer.name for layer in lenet]
    assert unmatched(keep_dense(per_layer({"fc*": 0.5}), ["conv1"]), names) == ["conv1"]
    assert unmatched(keep_dense(erk, ["fc1"]), names) == []
    assert unmatched(erk, names) == []


@pytest.mark.parametrize(
    ("make", "none", "numbers"),
    [(per_layer, {}, {3: 0.5}), (lambda patterns: keep_dense(erk, patterns), [], [3])],
)
def test_patterns_are_checked(make, none, numbers):
    with pytest.raises(ValueError, match="needs at least one pattern"):
        make(none)
    with pytest.raises(TypeError, match="patterns of layers must be strings"):
        make(numbers)


# By score


def test_global_by_takes_the_best_of_all_layers():
    small, large = layer([[1.0, 2.0], [3.0, 4.0]]), layer([[10.0, 20.0], [30.0, 40.0]])
    by_magnitude = global_by(magnitude)
    assert by_magnitude([small, large], 6) == [2, 4]
    assert by_magnitude([small, large], 4) == [1, 3]
    assert global_by(magnitude, min_per_layer=0)([small, large], 4) == [0, 4]
    assert global_by(magnitude, min_per_layer=3)([small, large], 6) == [3, 3]


def test_global_by_gives_ties_to_the_earlier_layer():
    ones = layer([[1.0] * 4])
    assert global_by(magnitude)([ones, ones], 5) == [4, 1]


def test_global_by_ranks_live_units_only():
    first = layer([[9.0, 8.0, 1.0]], mask=[[0, 0, 1]])
    second = layer([[2.0, 3.0, 4.0]])
    assert global_by(magnitude)([first, second], 3) == [1, 2]


def test_global_by_lifts_layers_one_after_the_other():
    # At 4 units the last layer is short; lifting it makes the middle one short.
    layers = [layer([[9.0, 8.0, 7.0]]), layer([[6.0, 1.0]]), layer([[0.1, 0.1]])]
    assert global_by(magnitude)(layers, 3) == [1, 1, 1]
    assert global_by(magnitude)(layers, 4) == [2, 1, 1]


def test_global_by_sums_over_a_unit():
    rows = layer([[1.0, 1.0], [3.0, 0.0]], structure=Rows())
    other = layer([[2.5, 0.0], [0.0, 0.1]], structure=Rows())
    assert global_by(magnitude)([rows, other], 3) == [2, 1]


def test_global_by_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        global_by(magnitude)([layer([[1.0, math.nan, 2.0]])], 2)


def test_lamp_score_is_the_share_of_the_tail():
    score = lamp_score(layer([[1.0, -3.0, 2.0]]))
    assert score.dtype == torch.float64
    assert score.tolist() == [[1 / 14, 1.0, 4 / 13]]


def test_lamp_score_of_ties_dead_and_zero_weights():
    tied = lamp_score(layer([[1.0, 1.0, -1.0]]))
    assert tied.tolist() == [[1.0, 1 / 2, 1 / 3]]
    dead = lamp_score(layer([[1.0, 5.0, 2.0]], mask=[[1, 0, 1]]))
    assert dead.tolist() == [[1 / 5, 0.0, 1.0]]
    assert lamp_score(layer([[0.0, 0.0]])).tolist() == [[0.0, 0.0]]


def test_lamp_keeps_small_layers_alive():
    large, tiny = layer([[5.0, 6.0, 7.0, 8.0]]), layer([[1e-3, 2e-3]])
    assert lamp([large, tiny], 2) == [1, 1]
    assert lamp([large, tiny], 2) == global_by(lamp_score)([large, tiny], 2)


# In proportion to a measure


def size(part):
    return part.size


def test_in_proportion_adds_up_and_rounds_to_the_largest_remainder():
    net = dense_layers({"a": (5, 2), "b": (10, 3), "c": (1, 1)})
    assert in_proportion(size)(net, 41) == [10, 30, 1]
    for total in range(42):
        counts = in_proportion(size)(net, total)
        assert sum(counts) == total
        ideals = [total * part.size / 41 for part in net]
        assert all(abs(n - ideal) < 1 for n, ideal in zip(counts, ideals, strict=True))
    assert in_proportion(size)(net, 1) == [0, 1, 0], "no layer needs to get anything"
    assert in_proportion(size)(net, 0) == [0, 0, 0]
    assert in_proportion(size)([], 0) == []


def test_in_proportion_hands_on_what_overflows():
    a = layer([[1.0] * 10], mask=[[1] * 2 + [0] * 8])
    b = layer([[1.0] * 10])
    c = layer([[1.0] * 30])
    # 5, 5 and 15 by size; a has room for 2, and the others share its 3 by size.
    assert in_proportion(size)([a, b, c], 25) == [2, 6, 17]
    assert in_proportion(size)([a, b, c], 42) == [2, 10, 30]


def test_in_proportion_with_measures_of_zero():
    a, b, c = (layer([[1.0] * n], name) for name, n in (("a", 4), ("b", 6), ("c", 2)))

    def only(*names):
        return in_proportion(lambda part: float(part.name in names))

    assert only("a")([a, b, c], 3) == [3, 0, 0]
    # What those with a measure cannot take goes to the others, by their room.
    assert only("a")([a, b, c], 8) == [4, 3, 1]
    assert only("a", "c")([a, b, c], 12) == [4, 6, 2]
    assert only()([a, b, c], 6) == [2, 3, 1]


def test_in_proportion_of_large_and_tiny_measures():
    a, b = layer([[1.0] * 1000], "a"), layer([[1.0] * 1000], "b")
    measures = {"a": 1e-300, "b": 1e300}
    by_name = in_proportion(lambda part: measures[part.name])
    assert by_name([a, b], 999) == [0, 999]
    assert by_name([a, b], 1500) == [500, 1000]


def test_in_proportion_refuses_what_cannot_be():
    a, b = layer([[1.0] * 4]), layer([[1.0] * 6])
    with pytest.raises(ValueError, match="cannot place 11 live units: the 2 layers can take 10"):
        in_proportion(size)([a, b], 11)
    for measure in (math.nan, -1.0, math.inf):
        with pytest.raises(ValueError, match="finite numbers >= 0"):
            in_proportion(lambda part, measure=measure: measure)([a, b], 3)
    with pytest.raises(TypeError, match=r"in_proportion\(3\): measure must be a function"):
        in_proportion(3)


# Smart ratios


CONVS = {"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (16, 16, 3, 3), "fc": (10, 16)}


@pytest.mark.parametrize("vgg", [False, True])
def test_smart_ratios_fall_with_depth(vgg):
    net = dense_layers(CONVS)
    # 20 : 12 : 6, or 20 : 3 : 2/3, of four layers.
    counts = smart_ratio_with(vgg=vgg)(net, 383)
    densities = [n / layer.size for n, layer in zip(counts, net, strict=True)]
    shares = (20, 3, 2 / 3) if vgg else (20, 12, 6)
    for density, share in zip(densities, shares, strict=False):
        assert density / densities[0] == pytest.approx(share / 20, rel=0.02)
    assert densities[3] == 0.3


def test_smart_ratios_of_full_layers():
    net = dense_layers(CONVS)
    first, *others, linear = smart_ratio(net, 2000)
    assert (first, linear) == (216, 48)
    assert others[0] / 1152 == pytest.approx(2 * others[1] / 2304, rel=0.01)
    assert smart_ratio(net, 3720) == [216, 1152, 2304, 48]
    assert smart_ratio(net, 3800) == [216, 1152, 2304, 128]
    assert smart_ratio(net, 3832) == [216, 1152, 2304, 160]
    assert sum(smart_ratio_with(linear=0.7)(net, 383)) == 383
    assert smart_ratio_with(linear=0.7)(net, 383)[3] == 112


def test_smart_ratios_that_cannot_pay_for_the_linear_layers(lenet):
    net = dense_layers(CONVS)
    assert smart_ratio(net, 51) == [1, 1, 1, 48]
    with pytest.raises(ValueError, match=r"50 live units are too few.*smallest density is 0\.0133"):
        smart_ratio(net, 50)
    with pytest.raises(ValueError, match=r"too few.*is 0\.3; .*such as erk"):
        smart_ratio(lenet, 26620)
    assert smart_ratio(lenet, 79860) == [70560, 9000, 300]


# Budgets


@pytest.mark.parametrize(
    "distribution", [uniform, uniform_plus, er, erk, erk_power(0.5), keep_dense(erk, ["fc3"], True)]
)
def test_both_ends_of_what_is_possible(lenet, distribution):
    assert distribution(lenet, 266200) == [235200, 30000, 1000]
    with pytest.raises(ValueError, match=r"can take 26\d+ in all"):
        distribution(lenet, 266201)
    with pytest.raises(ValueError, match="too few"):
        distribution(lenet, 2)


@pytest.mark.parametrize("distribution", [uniform, er, erk])
def test_no_layer_dies(lenet, distribution):
    assert distribution(lenet, 3) == [1, 1, 1]
    assert min(distribution(lenet, 10)) >= 1
    with pytest.raises(
        ValueError, match=r"largest reachable sparsity is 0.999989 \(density 1.127e-05\)"
    ):
        distribution(lenet, 2)


@pytest.mark.parametrize("distribution", [uniform, uniform_plus, er, erk, fan_in, lamp])
def test_no_layers(distribution):
    assert distribution([], 0) == []


def test_apportion_gives_ties_to_the_earlier_layer():
    assert apportion([2.5, 7.5], [5, 15], 10) == [3, 7]
    # A third of a unit is left over in each, whatever the rounding of 4/3 says.
    assert apportion([4 / 3, 1 / 3, 1 / 3], [4, 1, 1], 2, floor=0) == [2, 0, 0]


def test_apportion_keeps_to_floors_and_capacities():
    assert apportion([0.1, 0.1, 4.8], [5, 5, 5], 5) == [1, 1, 3]
    assert apportion([9.0, 1.0], [4, 20], 10) == [4, 6]
    assert apportion([0.5, 0.0, 2.5], [1, 0, 9], 3) == [1, 0, 2]
    assert apportion([0.4, 0.6], [5, 5], 1, floor=0) == [0, 1]
    assert apportion([3.0, 3.0], [2, 9], 6, floor=4) == [2, 4]


def test_apportion_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="cannot place 11 live units: the 2 layers can take 10"):
        apportion([5, 6], [5, 5], 11)
    with pytest.raises(
        ValueError, match=r"3 live units are too few .* sparsity is 0.6 \(density 0.4\)"
    ):
        apportion([1.5, 1.5], [5, 5], 3, floor=2)


def test_fill_hands_on_what_does_not_fit():
    assert fill([1, 1, 2], [100, 2, 100], 14) == [4.0, 2.0, 8.0]
    assert fill([1, 0], [5, 5], 3) == [3.0, 0.0]
    assert fill([1, 3], [5, 5], 99) == [5.0, 5.0]
    assert fill([], [], 0) == []


@pytest.mark.parametrize("raw", [[1.0, math.nan], [1.0, -1.0], [1.0, math.inf]])
def test_fill_refuses_raw_values_that_are_no_weights(raw):
    with pytest.raises(ValueError, match="raw must hold finite numbers >= 0"):
        fill(raw, [5, 5], 3)


# What the engine asks


def test_fixes_total():
    assert fixes_total(epsilon(20))
    assert fixes_total(per_layer({"*": 0.1}))
    assert fixes_total(keep_dense(epsilon(20), ["fc3"]))
    for distribution in (uniform, erk, fan_in, lamp, global_by(magnitude), keep_dense(erk, "fc3")):
        assert not fixes_total(distribution)


def test_needs_gradient():
    assert needs_gradient(global_by(gradient))
    assert needs_gradient(keep_dense(global_by(gradient), ["fc3"]))
    for distribution in (
        uniform,
        uniform_plus,
        er,
        erk,
        erk_power(0.5),
        epsilon(20),
        fan_in,
        lamp,
        global_by(magnitude),
        per_layer({"*": 0.1}),
        keep_dense(erk, ["fc3"]),
        in_proportion(size),
        smart_ratio,
        smart_ratio_with(vgg=True),
    ):
        assert not needs_gradient(distribution)


@pytest.mark.parametrize(
    "distribution",
    [
        uniform,
        erk,
        erk_power(0.5),
        epsilon(20),
        global_by(magnitude, min_per_layer=3),
        in_proportion(size),
        per_layer({"fc3": 1.0, "*": 0.1}),
        smart_ratio_with(linear=0.2, vgg=True),
        keep_dense(global_by(lamp_score), ["fc3", "conv*"], charge=True),
    ],
)
def test_pickles_compare_hash_and_repeat_the_call(distribution):
    assert pickle.loads(pickle.dumps(distribution)) == distribution
    assert len({distribution, pickle.loads(pickle.dumps(distribution))}) == 1
    if not hasattr(distribution, "__name__"):
        assert eval(repr(distribution)) == distribution


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: erk_power(-1), ValueError, r"erk_power\(power=-1\): power must be"),
        (lambda: erk_power("1"), ValueError, "1 is erk"),
        (lambda: erk_power(math.nan), ValueError, "1 is erk"),
        (lambda: smart_ratio_with(0), ValueError, r"linear=0, vgg=False\): linear must be a"),
        (lambda: smart_ratio_with(1.5), ValueError, "the authors' is 0.3"),
        (lambda: epsilon(0), ValueError, r"epsilon\(value=0\): value must be"),
        (lambda: epsilon(math.inf), ValueError, "not a density"),
        (lambda: epsilon(True), ValueError, "not a density"),
        (lambda: global_by("magnitude"), TypeError, "score must be a function"),
        (lambda: global_by(magnitude, min_per_layer=-1), ValueError, "integer >= 0"),
        (lambda: global_by(magnitude, min_per_layer=1.0), ValueError, "integer >= 0"),
        (lambda: keep_dense("erk", ["fc"]), TypeError, "must be a distribution, such as erk"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_user_can_write_one(lenet):
    @without_gradient
    def by_outputs(layers, total):
        capacity = [part.live for part in layers]
        return apportion(fill([part.shape[0] for part in layers], capacity, total), capacity, total)

    assert keep_dense(by_outputs, "fc3", charge=True)(lenet, 5000) == [3000, 1000, 1000]
