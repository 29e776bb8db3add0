"""The parts of the monitor: tracker, history and picture, cost, clock, TensorBoard layout."""

import re

import pytest
import torch
from torch import nn

from lightning_sparsity import DensityMonitor
from lightning_sparsity.core.filters import candidates
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.flops import Flops
from lightning_sparsity.monitors import cost, picture, tensorboard
from lightning_sparsity.monitors.cost import BatchClock, TrainingCost
from lightning_sparsity.monitors.picture import DensityHistory, colours, draw
from lightning_sparsity.monitors.tracker import MaskTracker, _count
from lightning_sparsity.ops.packing import pack
from lightning_sparsity.structures import Unstructured


def make_masks(**live):
    """Masks of ``{name: list of 0 and 1}``, one parameter each."""
    model = nn.ParameterDict({name: torch.zeros(len(bits)) for name, bits in live.items()})
    parameters = [SparseParameter(c, Unstructured()) for c in candidates(model)]
    for kept in parameters:
        kept.set_mask(torch.tensor(live[kept.name], dtype=torch.bool))
    return Masks(parameters)


def change(masks, **live):
    for name, bits in live.items():
        masks[name].set_mask(torch.tensor(bits, dtype=torch.bool))
    masks.changes += 1


# ----------------------------------------------------------------------------- tracker


def test_metrics_at_the_start():
    tracker = MaskTracker(make_masks(a=[1, 1, 0, 0], b=[1, 0]))
    assert tracker.metrics() == {
        "density/total": 0.5,
        "churn/total": 0.0,
        "itop/total": 0.5,
        "density/a": 0.5,
        "churn/a": 0.0,
        "itop/a": 0.5,
        "density/b": 0.5,
        "churn/b": 0.0,
        "itop/b": 0.5,
    }


def test_an_update_by_hand():
    masks = make_masks(a=[1, 1, 0, 0], b=[1, 0])
    tracker = MaskTracker(masks)
    change(masks, a=[1, 0, 1, 0])
    tracker.update({"a", "b"})
    found = tracker.metrics()
    assert found["churn/a"] == 0.5
    assert found["churn/b"] == 0.0
    assert found["churn/total"] == 1 / 3
    assert found["itop/a"] == 0.75
    assert found["itop/total"] == 4 / 6

    change(masks, a=[1, 1, 0, 0])  # back: churn again, nothing new explored
    tracker.update({"a"})
    found = tracker.metrics()
    assert found["churn/a"] == 0.5
    assert found["itop/a"] == 0.75
    assert tracker.courses()["a"].dropped == 2

    change(masks)
    tracker.update({"a"})  # an update that changes nothing
    assert tracker.metrics()["churn/a"] == 0


def test_churn_of_other_layers_stays_that_of_their_last_update():
    masks = make_masks(a=[1, 1, 0, 0], b=[1, 0])
    tracker = MaskTracker(masks)
    change(masks, a=[0, 0, 1, 1])
    tracker.update({"a"})
    change(masks, b=[0, 1])
    tracker.update({"b"})
    assert tracker.metrics()["churn/a"] == 1.0


def test_masks_seen_between_updates_count_as_ever_live():
    masks = make_masks(a=[1, 0, 0, 0])
    tracker = MaskTracker(masks)
    tracker.look()
    change(masks, a=[0, 1, 0, 0])
    tracker.look()
    change(masks, a=[0, 0, 1, 0])
    tracker.update({"a"})
    assert tracker.metrics()["itop/a"] == 0.75


def test_rate_never_decreases():
    generator = torch.Generator().manual_seed(0)
    masks = make_masks(a=[1] * 5 + [0] * 95)
    tracker = MaskTracker(masks)
    rates = [tracker.metrics()["itop/a"]]
    for _ in range(30):
        change(masks, a=(torch.rand(100, generator=generator) < 0.05).tolist())
        tracker.update({"a"})
        rates.append(tracker.metrics()["itop/a"])
    assert rates[0] == 0.05
    assert rates == sorted(rates)
    assert 0.5 < rates[-1] <= 1


def test_state_goes_on_where_it_stopped():
    masks = make_masks(a=[1, 1, 0, 0], b=[1, 0])
    tracker = MaskTracker(masks)
    change(masks, a=[1, 0, 1, 0])
    tracker.update({"a"})
    state = tracker.state_dict()
    other = MaskTracker(make_masks(a=[1, 0, 1, 0], b=[1, 0]))
    assert other.load_state_dict(state)
    assert other.metrics() == tracker.metrics()
    assert other.courses() == tracker.courses()
    assert state["a"]["fired"].tolist() == [0b0111]


def test_state_of_other_parameters_is_left_alone():
    state = MaskTracker(make_masks(a=[1, 1, 0, 0])).state_dict()
    for others in (make_masks(b=[1, 0, 0, 0]), make_masks(a=[1, 0]), make_masks()):
        tracker = MaskTracker(others)
        before = tracker.metrics()
        assert not tracker.load_state_dict(state)
        assert tracker.metrics() == before


def test_no_sparse_parameter_is_a_dense_model():
    found = MaskTracker(make_masks()).metrics()
    assert found == {"density/total": 1.0, "churn/total": 0.0, "itop/total": 1.0}


def test_bits_are_counted():
    everything = torch.arange(256, dtype=torch.uint8)
    assert [int(_count(byte)) for byte in everything] == [n.bit_count() for n in range(256)]
    mask = torch.rand(10_007) < 0.3
    assert int(_count(pack(mask))) == int(mask.sum())


# ---------------------------------------------------------------------------- pictures


def test_history_stays_small_and_even():
    history = DensityHistory(["a"], size=8)
    for step in range(1000):
        history.record(step, {"a": 0.5})
    steps = history.state_dict()["steps"]
    assert 4 <= len(steps) <= 8
    assert len({b - a for a, b in zip(steps, steps[1:], strict=False)}) == 1


def test_history_goes_on_where_it_stopped():
    def run(history, start, end):
        for step in range(start, end):
            history.record(step, {"a": 1 / (1 + step)})

    whole, first, rest = (DensityHistory(["a"], size=8) for _ in range(3))
    run(whole, 0, 50)
    run(first, 0, 23)
    rest.load_state_dict(first.state_dict())
    run(rest, 23, 50)
    assert torch.equal(rest.picture(50, {"a": 0.02}), whole.picture(50, {"a": 0.02}))


def test_picture_shows_each_layer_at_each_time():
    history = DensityHistory(["first.weight", "second.weight"])
    history.record(0, {"first.weight": 1.0, "second.weight": 0.1})
    history.record(50, {"first.weight": 0.1, "second.weight": 0.1})
    image = history.picture(100, {"first.weight": 0.1, "second.weight": 0.1})
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    light, dark = (colours(torch.tensor(d), 0.1).tolist() for d in (1.0, 0.1))
    left = 6 + 8 * len("second") + 6
    for row, column, expected in [
        (30, 20, light),
        (30, 150, dark),
        (70, 20, dark),
        (70, 150, dark),
    ]:
        assert image[:, row, left + column].tolist() == expected


def test_picture_of_nothing():
    assert DensityHistory([]).picture(0, {}) is None
    empty = DensityHistory(["a"])
    assert empty.picture(0, {"a": 1.0}) is None
    empty.record(0, {"a": 0.0})
    assert empty.picture(0, {"a": 0.0}) is not None  # no live weight and no time passed


def test_long_names_lose_their_beginning():
    image = draw(["x" * 100 + ".weight"], torch.full((1, 10), 0.5), (0, 1))
    assert image.shape[2] < 300


def test_colours_are_logarithmic_and_zero_is_black():
    found = colours(torch.tensor([1.0, 0.1, 0.01, 0.001, 0.0]), 0.01).T.tolist()
    assert found == [[253, 231, 37], [33, 144, 141], [68, 1, 84], [68, 1, 84], [0, 0, 0]]


@pytest.mark.parametrize(
    ("lowest", "scale"), [(0.03, 0.01), (0.01, 0.01), (1e-9, 1e-4), (1.0, 0.1)]
)
def test_scale_reaches_down_to_the_lowest_density(lowest, scale):
    assert picture._lowest(torch.tensor([lowest, 1.0, 0.0])) == pytest.approx(scale)


def test_letters_are_black_dots():
    canvas = torch.full((3, 10, 16), 255, dtype=torch.uint8)
    picture.write(canvas, "T!", 0, 0)
    assert (canvas[0, ::2, ::2] == 0).int().tolist() == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
    ]


# -------------------------------------------------------------------------------- cost


def test_training_cost_by_hand():
    total = TrainingCost(Flops({"a": 100.0}, other=20.0))
    assert total.metrics({"a": 0.1}) == {}
    total.add({"a": 0.1}, {})
    total.add({"a": 0.1}, {"a": 1})  # an update that needed the dense gradient
    found = total.metrics({"a": 0.2})
    assert found["flops/inference"] == 40
    assert found["flops/inference_ratio"] == 40 / 120
    assert found["flops/training"] == pytest.approx((90 + 180) / 2)
    assert found["flops/training_ratio"] == pytest.approx((90 + 180) / 2 / 360)


def test_rigl_formula():
    # (3 fS dT + 2 fS + fD) / (dT + 1), with dT sparse steps to one update.
    flops, densities, interval = Flops({"a": 100.0}), {"a": 0.1}, 9
    total = TrainingCost(flops)
    for step in range(interval + 1):
        total.add(densities, {"a": 1} if step == interval else {})
    sparse, dense = 10, 100
    expected = (3 * sparse * interval + 2 * sparse + dense) / (interval + 1)
    assert total.spent == pytest.approx(expected)


def test_unknown_flops_are_not_reported():
    for flops in (None, Flops(unknown="reason")):
        total = TrainingCost(flops)
        total.add({}, {})
        assert total.metrics({}) == {}


def test_cost_goes_on_where_it_stopped():
    total = TrainingCost(Flops({"a": 3.0}, other=0.1))
    total.add({"a": 0.3}, {})
    other = TrainingCost()
    other.load_state_dict(total.state_dict())
    for each in (total, other):
        each.add({"a": 0.7}, {"a": 2})
    assert other.metrics({"a": 0.7}) == total.metrics({"a": 0.7})
    other.load_state_dict(TrainingCost().state_dict())
    assert other.flops is None


def test_clock(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 100.0, 104.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(times))
    clock = BatchClock()
    for _ in range(3):
        clock.start_batch()
    clock.pause()
    for _ in range(2):
        clock.start_batch()
    assert len(clock) == 3
    assert clock.median == 2.0


# ------------------------------------------------------------------------- TensorBoard


def test_charts_find_their_tags():
    charts = {title: re.compile(p[1][0]) for title, p in tensorboard.layout()["sparsity"].items()}

    def of(tag):
        return [title for title, pattern in charts.items() if pattern.match(tag)]

    assert of("density/total") == ["density"]
    assert of("run-density/total") == ["density"]
    assert of("density/net.0.weight") == ["density by layer"]
    assert len(of("churn/total")) == len(of("itop/net.0.weight")) == 1
    assert of("flops/training_ratio") == ["FLOPs relative to dense"]
    assert of("collapse/total") == of("collapse/net.0.weight") == ["layers that collapsed"]
    assert of("flops/training") == of("train_loss") == of("my_density/x") == []


class Recorder:
    def __init__(self):
        self.calls = []

    def add_histogram_raw(self, tag, **kwargs):
        self.calls.append(kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_histogram(dtype):
    writer = Recorder()
    values = torch.tensor([-1.0, 0.0, 0.5, 1.0, float("nan"), float("inf")], dtype=dtype)
    tensorboard.write_histogram(writer, "tag", values, 7)
    (call,) = writer.calls
    assert (call["min"], call["max"], call["num"], call["sum"]) == (-1, 1, 4, 0.5)
    assert call["sum_squares"] == 2.25
    assert sum(call["bucket_counts"]) == 4
    assert len(call["bucket_limits"]) == len(call["bucket_counts"]) == 64
    assert call["bucket_limits"][-1] == 1
    assert call["global_step"] == 7


def test_histogram_of_equal_or_no_values():
    writer = Recorder()
    tensorboard.write_histogram(writer, "tag", torch.zeros(3), 0)
    assert sum(writer.calls[0]["bucket_counts"]) == 3
    tensorboard.write_histogram(writer, "tag", torch.empty(0), 0)
    assert len(writer.calls) == 1


# ---------------------------------------------------------------------------- callback


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, "step"])
def test_bad_interval(bad):
    with pytest.raises(ValueError, match=rf"DensityMonitor\(histograms={bad!r}\): must be"):
        DensityMonitor(histograms=bad)
