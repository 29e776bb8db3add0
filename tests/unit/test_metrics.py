"""The metrics on masks and models by hand."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from lightning_sparsity import metrics
from lightning_sparsity.core.filters import candidates
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.metrics import (
    ITOP,
    Churn,
    CompressionRatio,
    Density,
    EffectiveDensity,
    FLOPs,
    GradientFlow,
    HardnessNormalizedEfficiency,
    MaskSimilarity,
    ParameterEfficiency,
    expected_jaccard,
    gradient_norms,
    index_bits,
    live_masks,
)
from lightning_sparsity.structures import Unstructured


def bits(*values):
    return torch.tensor(values, dtype=torch.bool)


def pruned(zeros=2):
    """A network of which some of the 8 + 8 weights are zero."""
    net = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 4))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
        net[0].weight.view(-1)[:zeros] = 0
    return net


def masks_of(net, **changed):
    found = Masks(SparseParameter(c, Unstructured()) for c in candidates(net) if c.index >= 0)
    for name, mask in changed.items():
        found[name].set_mask(mask)
    return found


# ------------------------------------------------------------------------------- sources


def test_every_source_says_the_same():
    net = pruned()
    masks = live_masks(net)
    assert list(masks) == ["0.weight", "3.weight"]
    kept = masks_of(net, **masks)
    for metric in (Density, EffectiveDensity, CompressionRatio):
        values = [float(metric()(source)) for source in (net, masks, kept)]
        assert values[0] == values[1] == values[2] != 1


def test_copies_do_not_change_with_the_model():
    net = pruned()
    before = live_masks(masks_of(net))
    kept = masks_of(net)
    before = live_masks(kept)
    kept["0.weight"].set_mask(torch.zeros(2, 4, dtype=torch.bool))
    assert before["0.weight"].all()


def test_odd_sources_are_refused():
    with pytest.raises(TypeError, match=r"the mask of w is torch\.float32; torch\.bool is needed"):
        Density()({"w": torch.ones(2)})
    with pytest.raises(TypeError, match="list is no model"):
        Density()([bits(1)])


# --------------------------------------------------------------------- all of them at once

SOURCES = {"w": bits(1, 0, 0, 1)}
MAKE = {
    "Density": (Density, (SOURCES,)),
    "EffectiveDensity": (EffectiveDensity, (SOURCES,)),
    "CompressionRatio": (CompressionRatio, (SOURCES,)),
    "MaskSimilarity": (MaskSimilarity, (SOURCES, {"w": bits(1, 1, 0, 0)})),
    "Churn": (Churn, (SOURCES,)),
    "ITOP": (ITOP, (SOURCES,)),
    "ParameterEfficiency": (ParameterEfficiency, (torch.zeros(2), torch.zeros(2), 100)),
    "HardnessNormalizedEfficiency": (
        HardnessNormalizedEfficiency,
        (torch.zeros(2), torch.zeros(2), 100),
    ),
    "GradientFlow": (GradientFlow, (pruned(),)),
    "FLOPs": (FLOPs, (pruned(), torch.zeros(2, 4))),
}


@pytest.mark.parametrize("name", MAKE)
def test_calling_updating_and_resetting_agree(name):
    make, given = MAKE[name]
    called, updated = make(), make()
    value = called(*given)
    updated.update(*given)
    assert value.ndim == 0
    assert value == called.compute() == updated.compute()
    updated.update(*given)
    updated.reset()
    updated.update(*given)
    assert updated.compute() == value


@pytest.mark.parametrize("name", MAKE)
def test_metrics_travel(name):
    make, given = MAKE[name]
    metric = make()
    value = metric(*given)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert other.compute() == value
        other.update(*given)


@pytest.mark.parametrize("name", MAKE)
def test_metrics_add_nothing_to_a_model(name):
    net = pruned()
    before = list(net.state_dict()), len(list(net.parameters())), len(candidates(net))
    net.metric = MAKE[name][0]()
    assert (list(net.state_dict()), len(list(net.parameters())), len(candidates(net))) == before


def test_every_metric_is_tried():
    found = {
        name
        for name in metrics.__all__
        if isinstance(getattr(metrics, name), type) and issubclass(getattr(metrics, name), Metric)
    }
    assert found == set(MAKE)


# ------------------------------------------------------------------------------ densities


def test_density_is_a_mean_over_updates():
    density = Density()
    assert density({"w": bits(1, 1, 0, 0)}) == 0.5
    assert density({"w": bits(0, 0, 0, 0)}) == 0
    assert density.compute() == 0.25
    assert Density()({}) == 1


def test_effective_density_of_convolutions_in_groups():
    net = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2, bias=False), nn.Conv2d(2, 1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))
        net[1].weight.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
    assert EffectiveDensity()(net) == 0
    net[1].weight.data.fill_(1.0)
    assert EffectiveDensity()(net) == 0.5


def test_effective_density_of_masks_in_order():
    first, second = torch.tensor([[1, 0], [0, 0]]) > 0, torch.tensor([[0, 1]]) > 0
    assert EffectiveDensity()({"a": first, "b": second}) == 0
    assert EffectiveDensity()({"a": first, "norm": bits(1, 1), "b": second}) == 4 / 8


# ------------------------------------------------------------------------------- storage


def test_delta_bridges_long_gaps_by_stored_zeros():
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[0, 1, 20]] = True  # distances 1, 1 and 19
    whole = CompressionRatio("delta", value_bits=8)
    whole.update({"w": mask})
    assert int(whole.stored) == 3 * 8 + 3 * 5  # 5 bits tell 19 distances apart
    short = CompressionRatio("delta", value_bits=8, max_gap=8)
    short.update({"w": mask})
    assert int(short.stored) == (3 + 2) * (8 + 3)  # two zeros, 8 apart, on the way
    exact = CompressionRatio("delta", value_bits=8, max_gap=19)
    exact.update({"w": mask})
    assert int(exact.stored) == int(whole.stored)


def test_the_first_distance_counts_from_before_the_first_weight():
    ratio = CompressionRatio("delta", value_bits=8)
    ratio.update({"w": bits(0, 0, 0, 1)})
    assert int(ratio.stored) == 8 + 2


@pytest.mark.parametrize("storage", ["bitmap", "coo", "delta", "csr"])
def test_dense_and_empty_layers(storage):
    dense, empty = CompressionRatio(storage), CompressionRatio(storage)
    assert dense({"w": torch.ones(4, 8, dtype=torch.bool)}) <= 1
    ratio = empty({"w": torch.zeros(4, 8, dtype=torch.bool)})
    assert ratio == (32 if storage == "bitmap" else math.inf)
    assert CompressionRatio(storage)({}) == 1
    assert CompressionRatio(storage)({"w": torch.ones(0, 3, dtype=torch.bool)}) == 1


def test_dense_weights_have_no_distances_to_tell():
    assert CompressionRatio("delta")({"w": torch.ones(9, dtype=torch.bool)}) == 1


def test_bits_of_one_and_of_nothing():
    assert index_bits("coo", weights=1, live=1, rows=1, columns=1) == 0
    assert index_bits("csr", weights=4, live=0, rows=2, columns=2) == 0
    assert index_bits("coo", weights=1025, live=2, rows=1, columns=1025) == 2 * 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage": "zip"}, r"storage='zip'\): must be one of bitmap, coo, delta, csr"),
        ({"value_bits": 0}, r"value_bits=0\): must be a positive number of bits"),
        ({"value_bits": 1.5}, r"value_bits=1\.5\): must be a positive number of bits"),
        ({"storage": "delta", "max_gap": 0}, r"max_gap=0\): must be a positive distance"),
        ({"storage": "csr", "max_gap": 8}, r"only delta storage has gaps"),
    ],
)
def test_arguments_of_compression(arguments, message):
    with pytest.raises(ValueError, match=message):
        CompressionRatio(**arguments)


# ----------------------------------------------------------------------------- efficiency


def test_parameters_are_all_that_is_not_pruned():
    net = pruned(zeros=2)  # 16 weights less 2, biases 2 + 4, normalisation 2 + 2
    preds, target = torch.eye(4), torch.tensor([0, 1, 2, 0])
    assert ParameterEfficiency()(preds, target, net) == pytest.approx(75 / 24e-6)
    assert ParameterEfficiency()(preds, target, live_masks(net)) == pytest.approx(75 / 14e-6)


def test_efficiency_over_batches():
    target = torch.tensor([0, 1, 2])
    metric = ParameterEfficiency()
    assert metric(target, target, 1_000_000) == 100
    assert metric(target[:1] + 1, target[:1], 1_000_000) == 0
    assert metric.compute() == 75
    hard = HardnessNormalizedEfficiency()
    hard.update(target, target, 2_000_000)
    assert float(hard.compute()) == pytest.approx(math.exp((50_000 - 30_908) / 5704.7) / 2)


def test_efficiency_at_a_known_accuracy():
    net = pruned(zeros=2)
    assert float(ParameterEfficiency().at(0.75, net)) == pytest.approx(75 / 24e-6)
    assert float(ParameterEfficiency().at(0.75, masks_of(net, **live_masks(net)))) == pytest.approx(
        75 / 14e-6
    )
    hard = float(HardnessNormalizedEfficiency().at(0.761, 25_600_000))
    assert hard == pytest.approx(0.1366, abs=5e-5)
    assert HardnessNormalizedEfficiency().at(0.5, 0) == math.inf
    with pytest.raises(ValueError, match=r"ParameterEfficiency\.at\(accuracy=76\.1\): must lie in"):
        ParameterEfficiency().at(76.1, net)


# ---------------------------------------------------------------------------------- FLOPs


def test_flops_by_hand():
    net = pruned(zeros=2)  # 6 of 8 weights are live in the first layer, 8 of 8 in the second
    net[1].train()
    inputs, before = torch.randn(5, 4), copy.deepcopy(net.state_dict())
    assert FLOPs()(net, inputs) == 2 * 6 + 2 * 8
    assert FLOPs(relative=True)(net, (inputs,)) == 28 / 32
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    flops = FLOPs()
    flops.update(net, inputs)
    flops.update(pruned(zeros=0), inputs)
    assert flops.compute() == (28 + 32) / 2


def test_flops_of_pictures_and_of_tied_weights():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    net[0].weight.data[:2] = 0
    assert FLOPs()(net, torch.randn(6, 1, 6, 6)) == 0.75 * 2 * 9 * 8 * 16 + 2 * 128 * 4
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    first.weight.data[0] = 0
    assert FLOPs()(nn.Sequential(first, second), torch.ones(2, 3)) == 2 * 2 * 6


def test_flops_that_are_not_known():
    net = nn.Sequential(nn.Linear(2, 2))
    net.append(nn.Module())
    net[1].idle = nn.Linear(2, 2)
    net[1].forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"no countable operation read 1\.idle\.weight"):
        FLOPs()(net, torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="the model is compiled"):
        FLOPs()(torch.compile(pruned(), backend="eager"), torch.ones(1, 4))
    with pytest.raises(ValueError, match="samples along its first dimension"):
        FLOPs()(pruned(), torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"relative=1\): must be True or False"):
        FLOPs(relative=1)


def test_shapes_of_predictions():
    with pytest.raises(ValueError, match=r"preds of shape \(2,\), target of shape \(3,\)"):
        ParameterEfficiency()(torch.zeros(2), torch.zeros(3), 1)
    with pytest.raises(ValueError, match="needs"):
        ParameterEfficiency()(torch.zeros(2, 3, 4), torch.zeros(2, 4), 1)


# ------------------------------------------------------------------------ masks over time


def test_similarity_is_one_of_a_mask_with_itself():
    a = {"w": bits(1, 0, 1), "v": bits(0, 0)}
    assert MaskSimilarity("jaccard")(a, a) == 1
    assert MaskSimilarity("overlap")(a, a) == 1
    assert MaskSimilarity("hamming")(a, a) == 0
    empty = {"w": bits(0, 0)}
    assert MaskSimilarity("jaccard")(empty, empty) == 1


def test_random_masks_are_as_similar_as_expected():
    torch.manual_seed(0)
    p, q = 0.2, 0.5
    a, b = torch.rand(400_000) < p, torch.rand(400_000) < q
    found = float(MaskSimilarity("jaccard")({"w": a}, {"w": b}))
    assert found == pytest.approx(expected_jaccard(p, q), rel=0.01)


def test_expected_similarity_by_hand():
    assert expected_jaccard(0.2, 0.5) == pytest.approx(0.1 / 0.6)
    assert expected_jaccard(1.0, 0.3) == pytest.approx(0.3)
    assert expected_jaccard(0.0, 0.3) == 0
    assert expected_jaccard(0.0, 0.0) == 1
    with pytest.raises(ValueError, match=r"expected_jaccard\(q=1\.5\): must lie in \[0, 1\]"):
        expected_jaccard(0.5, 1.5)


COURSE = [{"w": bits(1, 1, 0, 0)}, {"w": bits(1, 0, 1, 0)}, {"w": bits(0, 0, 1, 1)}]


@pytest.mark.parametrize(
    ("to", "found"),
    [("first", [1, 0.5, 0]), ("last", [1, 0.5, 0.5]), ({"w": bits(0, 0, 1, 1)}, [0, 0.5, 1])],
)
def test_similarity_over_time(to, found):
    metric = MaskSimilarity("overlap", to=to)
    assert [float(metric(masks)) for masks in COURSE] == found
    counted = found[1:] if isinstance(to, str) else found  # the first update only looks
    assert float(metric.compute()) == pytest.approx(sum(counted) / len(counted))
    metric.reset()
    assert metric(COURSE[2]) == {"first": 0, "last": 1}.get(str(to), 1)


def test_what_is_compared_with_does_not_change():
    mask = bits(1, 1, 0, 0)
    for metric in (MaskSimilarity("hamming"), MaskSimilarity("hamming", to={"w": mask})):
        assert metric({"w": mask}) == 0
    mask.logical_not_()
    assert metric({"w": mask}) == 1


@pytest.mark.parametrize("make", [MaskSimilarity, Churn, ITOP])
def test_what_is_remembered_can_be_saved(make, tmp_path):
    metric, other = make(), make()
    metric({"w": bits(1, 1, 0, 0)})
    torch.save(metric.past(), tmp_path / "past.pt")
    other.recall(torch.load(tmp_path / "past.pt", weights_only=True))
    now = {"w": bits(1, 0, 1, 0)}
    found = {MaskSimilarity: 1 / 3, Churn: 0.5, ITOP: 0.75}[make]
    assert float(other(now)) == float(metric(now)) == pytest.approx(found)
    other.recall({})
    assert other.past() == {}


def test_masks_of_other_weights():
    message = "masks of different weights: b, c; compare the same model"
    with pytest.raises(ValueError, match=message):
        MaskSimilarity()({"a": bits(1), "b": bits(1)}, {"a": bits(1), "c": bits(1)})
    for metric in (Churn(), ITOP()):
        metric.update({"a": bits(1, 0)})
        with pytest.raises(ValueError, match="masks of different weights: a"):
            metric.update({"a": bits(1)})
    with pytest.raises(ValueError, match=r"MaskSimilarity\(kind='dice'\)"):
        MaskSimilarity("dice")
    with pytest.raises(
        ValueError, match=r"MaskSimilarity\(to='start'\): must be \"first\", \"last\""
    ):
        MaskSimilarity(to="start")


def test_churn_goes_on_over_a_reset():
    churn = Churn()
    assert churn({"w": bits(1, 1, 1, 1)}) == 0
    assert churn({"w": bits(1, 1, 1, 0)}) == 0.25
    assert churn.compute() == 0.25
    churn.reset()
    assert churn({"w": bits(1, 0, 0, 1)}) == pytest.approx(2 / 3)
    assert churn.compute() == pytest.approx(2 / 3)
    assert churn({"w": bits(1, 0, 0, 1)}) == 0
    assert churn.compute() == pytest.approx(2 / 5)


def test_masks_that_change_in_place_are_seen_to_change():
    mask = bits(1, 1, 0, 0)
    churn, itop = Churn(), ITOP()
    for metric in (churn, itop):
        metric.update({"w": mask})
    mask.logical_not_()
    assert churn({"w": mask}) == 1
    assert itop({"w": mask}) == 1


def test_itop_never_falls_and_begins_anew():
    itop = ITOP()
    rates = [float(itop({"w": bits(*(k == n for k in range(4)))})) for n in (0, 0, 1, 3, 0)]
    assert rates == [0.25, 0.25, 0.5, 0.75, 0.75]
    itop.reset()
    assert itop({"w": bits(1, 0, 0, 0)}) == 0.25


# ------------------------------------------------------------------------------ gradients


def test_gradient_flow_by_hand():
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[0.0, 1.0]]))
        net[1].weight.fill_(2.0)
    net(torch.tensor([[3.0, 4.0]])).sum().backward()
    # Gradients: 2 * (3, 4), of which the second is live; and 4.
    assert float(GradientFlow()(net)) == pytest.approx(math.hypot(8, 4))
    assert float(GradientFlow(live=False)(net)) == pytest.approx(math.sqrt(36 + 64 + 16))
    net[1].weight.grad = None
    assert float(GradientFlow()(masks_of(net))) == pytest.approx(10)  # every weight is live there


def test_gradient_norms_by_layer():
    net = pruned(zeros=3)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    found = {name: float(norm) for name, norm in gradient_norms(net).items()}
    assert found == pytest.approx({"0.weight": 2 * 5**0.5, "3.weight": 2 * 8**0.5})
    every = gradient_norms(net, live=False, among=[net[0].weight])
    assert {name: float(norm) for name, norm in every.items()} == pytest.approx(
        {"0.weight": 2 * 8**0.5}
    )
    assert float(GradientFlow()(gradient_norms(net))) == float(GradientFlow()(net))


def test_gradient_flow_is_a_mean_over_updates():
    net = nn.Linear(1, 1, bias=False)
    flow = GradientFlow()
    for slope in (1.0, 3.0):
        net.weight.grad = torch.full((1, 1), slope)
        flow.update(net)
    assert flow.compute() == 2


def test_what_is_not_finite_off_the_mask_is_not_seen():
    net = pruned()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net[0].weight.grad.view(-1)[0] = math.nan
    assert float(GradientFlow()(net)) == pytest.approx(math.sqrt(14))
    assert GradientFlow(live=False)(net).isnan()
    with pytest.raises(TypeError, match=r"live=1\): must be True or False"):
        GradientFlow(live=1)
