"""Filters: which parameters are sparse, under which names."""

import pytest
import torch
from torch import nn

from lightning_sparsity.core.filters import (
    Candidate,
    candidates,
    first_layer,
    last_layer,
    linear_and_conv,
    plain_name,
    select,
)
from lightning_sparsity.structures import Layout


class Net(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2, groups=2)
        )
        self.attn = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(3, 3))
        self.head = nn.Linear(8, 4)


LAYERS = ["stem.weight", "body.0.weight", "body.2.weight", "attn.out_proj.weight", "head.weight"]


@pytest.fixture
def net():
    return Net()


def chosen(module, include=linear_and_conv, exclude=()):
    return [c.name for c in select(candidates(module), include, exclude)]


# Candidates


def test_every_parameter_is_a_candidate_once(net):
    pool = candidates(net)
    named = dict(net.named_parameters())
    assert {c.name for c in pool} == set(named)
    assert len(pool) == len(named)
    assert all(c.parameter is named[c.name] for c in pool)
    assert all(any(p is c.parameter for p in c.module.parameters(False)) for c in pool)


def test_places_among_the_layers(net):
    pool = candidates(net)
    assert [c.name for c in sorted(pool, key=lambda c: c.index) if c.index >= 0] == LAYERS
    assert {c.index for c in pool if c.name not in LAYERS} == {-1}
    assert {c.total for c in pool} == {5}


def test_layouts(net):
    layouts = {c.name: c.layout for c in candidates(net)}
    assert layouts["stem.weight"] == Layout()
    assert layouts["body.0.weight"] == Layout(groups=4)
    assert layouts["body.2.weight"] == Layout(groups=2, transposed=True)
    assert layouts["head.weight"] == layouts["emb.weight"] == Layout()


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_convolutions_of_every_dimension(dim):
    plain = getattr(nn, f"Conv{dim}d")(4, 6, 3, groups=2)
    mirrored = getattr(nn, f"ConvTranspose{dim}d")(4, 6, 3, groups=2)
    pool = {c.name: c for c in candidates(nn.ModuleList([plain, mirrored]))}
    assert chosen(nn.ModuleList([plain, mirrored])) == ["0.weight", "1.weight"]
    assert pool["0.weight"].layout == Layout(2)
    assert pool["1.weight"].layout == Layout(2, transposed=True)


def test_an_instance_of_a_subclass_is_a_layer():
    class Mine(nn.Linear):
        pass

    assert chosen(nn.Sequential(Mine(2, 2))) == ["0.weight"]
    assert chosen(nn.Sequential(Mine(2, 2)), include=nn.Linear) == ["0.weight"]


# Names


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("net.0.weight", "net.0.weight"),
        ("_orig_mod.net.0.weight", "net.0.weight"),
        ("net._orig_mod.0.weight", "net.0.weight"),
        ("net.0._orig_mod.weight", "net.0.weight"),
        ("_orig_mod._orig_mod.weight", "weight"),
        ("a._orig_mod._checkpoint_wrapped_module.b._fsdp_wrapped_module.c", "a.b.c"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_mods.weight", "_orig_mods.weight"),
    ],
)
def test_plain_names(name, plain):
    assert plain_name(name) == plain


def test_compiled_modules_keep_their_plain_names():
    net = Net()
    plain = [c.name for c in candidates(net)]
    net.body = torch.compile(net.body, backend="eager")
    pool = candidates(net)
    assert [c.name for c in pool] == plain
    aliases = {c.name: c.aliases for c in pool}
    assert aliases["body.0.weight"] == ("body._orig_mod.0.weight",)
    assert set(sum(aliases.values(), ())) <= set(net.state_dict())
    assert chosen(net, "body.0") == ["body.0.weight"]
    assert chosen(net, "body.*") == ["body.0.weight", "body.2.weight"]
    whole = torch.compile(Net(), backend="eager")
    assert [c.name for c in candidates(whole)] == plain


# Include and exclude


def test_default(net):
    assert chosen(net) == LAYERS


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("head", ["head.weight"]),
        ("body", ["body.0.weight", "body.2.weight"]),
        ("body.0", ["body.0.weight"]),
        ("body*", ["body.0.weight", "body.2.weight"]),
        ("body.?", ["body.0.weight", "body.2.weight"]),
        ("body.[0-1].weight", ["body.0.weight"]),
        ("*", LAYERS),
        ("*.weight", LAYERS),
        ("attn", ["attn.out_proj.weight"]),
        ("emb.weight", ["emb.weight"]),
        ("emb", ["emb.weight"]),
        ("attn.in_proj_weight", ["attn.in_proj_weight"]),
        ("norm.weight", ["norm.weight"]),
        ("scale", ["scale"]),
        ("head.bias", ["head.bias"]),
        (nn.Linear, ["attn.out_proj.weight", "head.weight"]),
        (nn.Conv2d, ["stem.weight", "body.0.weight"]),
        (nn.Embedding, ["emb.weight"]),
        (first_layer, ["stem.weight"]),
        (last_layer, ["head.weight"]),
        (lambda c: c.parameter.ndim == 4 and c.index < 2, ["stem.weight", "body.0.weight"]),
        (
            lambda c: c.parameter.ndim == 1 and c.name.startswith("norm"),
            ["norm.weight", "norm.bias"],
        ),
        (["head", "stem"], ["stem.weight", "head.weight"]),
        (("head", nn.Conv2d, first_layer), ["stem.weight", "body.0.weight", "head.weight"]),
        ([["head"], [linear_and_conv]], LAYERS),
        (["head", "head.weight", "*"], LAYERS),
    ],
)
def test_include(net, include, expected):
    assert chosen(net, include) == expected


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("head", LAYERS[:-1]),
        ((), LAYERS),
        ([], LAYERS),
        ("body.*", ["stem.weight", "attn.out_proj.weight", "head.weight"]),
        (nn.Linear, LAYERS[:3]),
        (first_layer, LAYERS[1:]),
        ([first_layer, last_layer], LAYERS[1:-1]),
        ("emb.weight", LAYERS),
        (lambda c: c.parameter.ndim == 4, LAYERS[3:]),
    ],
)
def test_exclude(net, exclude, left):
    assert chosen(net, exclude=exclude) == left


def test_patterns_never_mean_embeddings_norms_or_biases(net):
    for pattern in ("*", "*.weight", "*e*"):
        assert set(chosen(net, pattern)) <= set(LAYERS)
    for pattern in ("emb*", "norm.*", "scal?", "*bias"):
        with pytest.raises(ValueError, match="patterns do not select"):
            chosen(net, pattern)
    assert chosen(net, ["emb.weight", "*"]) == ["emb.weight", *LAYERS]


def test_the_order_is_that_of_the_model(net):
    assert chosen(net, ["head", "stem", "body"]) == [
        "stem.weight",
        "body.0.weight",
        "body.2.weight",
        "head.weight",
    ]


# Frozen and tied weights


def test_frozen_weights_are_sparse_only_by_exact_name(net):
    net.stem.requires_grad_(False)
    for include in (linear_and_conv, "*", "*.weight", nn.Conv2d, lambda c: linear_and_conv(c)):
        assert "stem.weight" not in chosen(net, include)
    with pytest.raises(ValueError, match=r"include='stem\*'"):
        chosen(net, "stem*")
    assert chosen(net, "stem.weight") == chosen(net, "stem") == ["stem.weight"]
    assert chosen(net, ["stem", "head"]) == ["stem.weight", "head.weight"]


@pytest.mark.parametrize("exclude", ["stem", "stem.weight", "stem*", first_layer])
def test_frozen_weights_may_be_excluded(net, exclude):
    net.stem.requires_grad_(False)
    assert chosen(net, exclude=exclude) == LAYERS[1:]


def test_tied_weights_are_one_candidate():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    net = nn.Sequential(first, nn.ReLU(), second, nn.Linear(4, 2))
    pool = candidates(net)
    assert [c.name for c in pool] == ["0.weight", "0.bias", "2.bias", "3.weight", "3.bias"]
    assert pool[0].aliases == ("0.weight", "2.weight")
    assert [c.index for c in pool] == [0, -1, -1, 1, -1]
    assert pool[0].total == 2


def test_a_module_used_twice_is_one_candidate():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    (weight, _) = candidates(net)
    assert weight.name == "a.weight"
    assert weight.aliases == ("a.weight", "b.0.weight")
    assert set(weight.aliases) <= set(net.state_dict())


# What is wrong


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("name", ["heat", "head.weigth", "head.weight.0", "bod*.x", "Head", ""])
def test_a_name_without_a_match(net, argument, name):
    message = rf"{argument}='{name}' names no parameter.*stem.weight, .*head.weight"
    with pytest.raises(ValueError, match=message.replace("*.x", r"\*\.x")):
        chosen(net, **{argument: name})


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("selection", [nn.Conv3d, ["head", nn.Conv3d]])
def test_a_type_without_a_match(net, argument, selection):
    with pytest.raises(ValueError, match=rf"{argument}=.*Conv3d.*no parameter"):
        chosen(net, **{argument: selection})


def test_nothing_left(net):
    with pytest.raises(ValueError, match=r"include='head', exclude='head' leaves no parameter"):
        chosen(net, "head", "head")
    with pytest.raises(ValueError, match="weights are none"):
        chosen(nn.Sequential(nn.BatchNorm1d(3)))


@pytest.mark.parametrize("selection", [3, None, 2.5, object()])
@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_selections_of_other_kinds(net, argument, selection):
    with pytest.raises(TypeError, match=rf"{argument}=.* must be a parameter name or pattern"):
        chosen(net, **{argument: selection})


def test_long_lists_are_cut():
    net = nn.Sequential(*(nn.Linear(1, 1) for _ in range(20)))
    with pytest.raises(ValueError, match=r"7\.weight, \.\.\.\.$"):
        chosen(net, "x")


def test_callables_see_candidates(net):
    seen = []

    def spy(candidate):
        seen.append(candidate)
        return True

    assert len(chosen(net, spy)) == len(list(net.parameters()))
    assert all(isinstance(c, Candidate) for c in seen)
