"""Distributions: how many units live in each layer.

A distribution maps ``(layers, total)`` to the live units of each layer. The counts add up
to ``total`` exactly, never exceed ``layer.live``, and leave at least one live unit in every
layer that has any. At the start all units are live; when pruning later, those of the mask
are what there is to keep. All counts are in units of the layer's structure: weights, if
unstructured.

Four do not give the requested total: :class:`epsilon` and :class:`per_layer`, from which
the total follows (:func:`fixes_total`), :func:`fan_in`, which rounds per neuron, and
:class:`keep_dense`, whose dense layers come on top.

To split units that are to grow, pass layers with inverted masks. No layer need grow then:
:class:`global_by` with ``min_per_layer=0`` and :func:`apportion` with ``floor=0`` do without
the one unit per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor

from lightning_sparsity.core.apportion import apportion, check_total, fill
from lightning_sparsity.core.layer import Distribution, Layer, Layers, Score, call_of
from lightning_sparsity.core.numbers import plain, settle
from lightning_sparsity.ops.selection import top_k_counts
from lightning_sparsity.scores import needs_gradient, without_gradient


@without_gradient
def uniform(layers: Layers, total: int) -> list[int]:
    """The same density in every layer.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> lenet = dense_layers({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)})
        >>> uniform(lenet, 26620)
        [23520, 3000, 100]
    """
    return _split([layer.size for layer in layers], layers, total)


@without_gradient
def uniform_plus(layers: Layers, total: int) -> list[int]:
    """Uniform, but gentle at both ends (Gale et al., 2019).

    The first layer stays dense if it is a convolution. All others have the same density,
    unless that leaves the last two-dimensional weight less than a fifth of its units: then
    it has a fifth, and the rest share what is left.

    Raises:
        ValueError: If ``total`` is less than the two ends need.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> net = dense_layers({"conv": (4, 1, 3, 3), "fc1": (20, 36), "fc2": (10, 20)})
        >>> uniform_plus(net, 96)
        [36, 20, 40]
    """
    ends = {0: layers[0].live} if layers and layers[0].weight.ndim > 2 else {}
    counts = _charge(ends, uniform, layers, total, "uniform_plus")
    last = max((i for i, layer in enumerate(layers) if layer.weight.ndim == 2), default=None)
    if last is None:
        return counts
    fifth = min(-(-layers[last].size // 5), layers[last].live)
    if counts[last] >= fifth:
        return counts
    return _charge({**ends, last: fifth}, uniform, layers, total, "uniform_plus")


@without_gradient
def er(layers: Layers, total: int) -> list[int]:
    r"""Erdős-Rényi: :math:`d_l \propto (n_{in} + n_{out}) / (n_{in} n_{out})`.

    The random graphs of SET (Mocanu et al., 2018), scaled to a total. :math:`n_{in}` and
    :math:`n_{out}` are channels; the kernel area is ignored. Layers that would exceed
    density 1 are dense and the others share what is left.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> net = dense_layers({"conv": (32, 16, 3, 3), "fc": (10, 64)})
        >>> er(net, 1000)
        [854, 146]
    """
    return _split([_er(layer) * layer.size for layer in layers], layers, total)


@without_gradient
def erk(layers: Layers, total: int) -> list[int]:
    r"""Erdős-Rényi-Kernel (Evci et al., 2020, Sec. 3, item 1).

    :math:`d_l \propto (n_{in} + n_{out} + k_h + k_w) / (n_{in} n_{out} k_h k_w)`. Layers
    that would exceed density 1 are dense and the others share what is left.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> lenet = dense_layers({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)})
        >>> erk(lenet, 26620)
        [18714, 6906, 1000]
    """
    return erk_power(1.0)(layers, total)


@dataclass(frozen=True)
class erk_power:
    """ERK with its ratio raised to a power (``erk_power_scale`` of google-research/rigl).

    Args:
        power: 1 is :func:`erk`, 0 is :func:`uniform`; at least 0.

    Raises:
        ValueError: If ``power`` is not a number of at least 0.
    """

    power: float
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        settle(self, "power")
        if not _is_number(self.power) or not 0 <= self.power < math.inf:
            raise ValueError(f"{self}: power must be a finite number >= 0; 1 is erk, 0 is uniform.")

    def __call__(self, layers: Layers, total: int) -> list[int]:
        """Live units per layer."""
        raw = [
            (sum(_dims(layer)) / math.prod(_dims(layer))) ** self.power * layer.size
            for layer in layers
        ]
        return _split(raw, layers, total)


@without_gradient
def smart_ratio(layers: Layers, total: int) -> list[int]:
    r"""Smart ratios (Su et al., 2020, arXiv:2009.11094): what convolutions keep falls with depth.

    Linear layers (weights of two dimensions) have density 0.3. Convolutions share the rest: the
    density of one that is layer :math:`l` of :math:`L`, linear ones included, is in proportion
    to :math:`(L - l + 1)^2 + (L - l + 1)`. See :class:`smart_ratio_with`.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> net = {"a": (8, 3, 3, 3), "b": (16, 8, 3, 3), "c": (16, 16, 3, 3), "fc": (10, 16)}
        >>> smart_ratio(dense_layers(net), 383)
        [45, 145, 145, 48]
    """
    return smart_ratio_with()(layers, total)


@dataclass(frozen=True)
class smart_ratio_with:
    """:func:`smart_ratio` with other settings.

    What convolutions cannot hold goes to the others in proportion, and when all are full to
    the linear layers; the authors' program hands it to the convolutions that follow, and rounds
    every layer down.

    Args:
        linear: Density of linear layers, in (0, 1].
        vgg: Divide the proportions by :math:`l^2`, as the authors do for VGG.

    Raises:
        ValueError: If ``linear`` lies outside (0, 1]; on a call, if ``total`` is too small for
            the linear layers.
    """

    linear: float = 0.3
    vgg: bool = False
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        settle(self, "linear")
        if not _is_number(self.linear) or not 0 < self.linear <= 1:
            raise ValueError(f"{self}: linear must be a density in (0, 1]; the authors' is 0.3.")
        _check_flag(self, "vgg", self.vgg)

    def __call__(self, layers: Layers, total: int) -> list[int]:
        """Live units per layer."""
        capacity = [layer.live for layer in layers]
        linear = [min(self.linear * n.size, n.live) if _is_linear(n) else 0.0 for n in layers]
        least = math.ceil(sum(linear)) + sum(n.live > 0 for n in layers if not _is_linear(n))
        if total < least:
            density = least / sum(layer.size for layer in layers)
            raise ValueError(
                f"{self}: {total} live units are too few, since linear layers keep {self.linear:g} "
                f"of theirs and each convolution one. The smallest density is {density:.4g}; ask "
                "for a higher one, lower linear, or choose another distribution, such as erk."
            )
        raw = [
            0.0 if _is_linear(layer) else self._share(place, len(layers)) * layer.size
            for place, layer in enumerate(layers, start=1)
        ]
        convolutions = fill(raw, capacity, total - sum(linear))
        ideal = [a + b for a, b in zip(linear, convolutions, strict=True)]
        more = _rest(ideal, capacity, total - sum(ideal))  # once all convolutions are full
        ideal = [a + b for a, b in zip(ideal, more, strict=True)]
        return apportion(ideal, capacity, total)

    def _share(self, place: int, depth: int) -> float:
        left = depth - place + 1
        return (left**2 + left) / (place**2 if self.vgg else 1)


@dataclass(frozen=True)
class epsilon:
    r"""SET's own sparsity control (Mocanu et al., 2018).

    Each layer gets the density
    :math:`\varepsilon (n_{in} + n_{out}) / (n_{in} n_{out})`, at most 1: some
    :math:`\varepsilon (n_{in} + n_{out})` links. The requested total is ignored.

    Args:
        value: :math:`\varepsilon`, above 0; 20 in the paper's CIFAR-10 network.

    Raises:
        ValueError: If ``value`` is not a number above 0.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> net = dense_layers({"fc1": (1000, 784), "fc2": (1000, 1000), "fc3": (10, 1000)})
        >>> epsilon(20)(net, 0)
        [35680, 40000, 10000]
    """

    value: float
    needs_gradient: ClassVar[bool] = False
    fixes_total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        settle(self, "value")
        if not _is_number(self.value) or not 0 < self.value < math.inf:
            raise ValueError(
                f"{self}: value must be a finite number above 0, such as epsilon(20); it is "
                "links per unit, not a density."
            )

    def __call__(self, layers: Layers, total: int) -> list[int]:
        """Live units per layer, whatever the ``total``."""
        wanted = [round(self.value * _er(layer) * layer.size) for layer in layers]
        return [min(max(1, n), layer.live) for n, layer in zip(wanted, layers, strict=True)]


@without_gradient
def fan_in(layers: Layers, total: int) -> list[int]:
    r"""The same number of links for every neuron: :math:`\max(1, round(d \cdot fan\_in))`.

    The initial counts of SRigL (Lasby et al., 2024), with :math:`d` = ``total`` over all
    weights. They add up to ``total`` only roughly: layers with few inputs get more.

    Raises:
        ValueError: If a layer's structure has units other than single weights.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> lenet = dense_layers({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)})
        >>> fan_in(lenet, 26620)
        [23400, 3000, 100]
    """
    density = total / max(sum(layer.size for layer in layers), 1)
    counts = []
    for layer in layers:
        if layer.size != math.prod(layer.shape):
            raise ValueError(
                f"fan_in: {layer.name} has the structure {layer.structure}, and links per neuron "
                "need single weights; use another distribution, such as uniform."
            )
        neurons = _dims(layer)[0]
        links = max(1, round(density * layer.size / neurons))
        counts.append(min(links * neurons, layer.live))
    return counts


fan_in.exact = False  # type: ignore[attr-defined]


@dataclass(frozen=True)
class global_by:
    """The ``total`` best live units of all layers together.

    Args:
        score: Ranks the weights; over a unit it is summed. Ties go to the earlier layer.
        min_per_layer: Live units that every layer keeps (all, if it has fewer); guards
            against layer collapse.

    Raises:
        TypeError: If ``score`` cannot be called.
        ValueError: If ``min_per_layer`` is not an integer of at least 0.

    Example:
        >>> import torch
        >>> from lightning_sparsity.core.layer import Layer
        >>> from lightning_sparsity.scores import magnitude
        >>> weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> small, large = (
        ...     Layer(name, weight, torch.ones(2, 2, dtype=torch.bool))
        ...     for name, weight in [("small", weights), ("large", 3 * weights)]
        ... )
        >>> global_by(magnitude)([small, large], 4)
        [1, 3]
        >>> global_by(magnitude, min_per_layer=0)([small, large], 3)
        [0, 3]
    """

    score: Score
    min_per_layer: int = 1

    def __post_init__(self) -> None:
        settle(self, "min_per_layer")
        if not _is_function(self.score):
            raise TypeError(f"{self}: score must be a function of a layer, such as magnitude.")
        if type(self.min_per_layer) is not int or self.min_per_layer < 0:
            raise ValueError(f"{self}: min_per_layer must be an integer >= 0; the default is 1.")

    def __repr__(self) -> str:
        return f"global_by({call_of(self.score)}, min_per_layer={self.min_per_layer!r})"

    @property
    def needs_gradient(self) -> bool:
        """Whether the score reads gradients."""
        return needs_gradient(self.score)

    def __call__(self, layers: Layers, total: int) -> list[int]:
        """Live units per layer."""
        floors = [min(self.min_per_layer, layer.live) for layer in layers]
        check_total(total, floors, [layer.live for layer in layers])
        ranked = [layer.ranked(self.score(layer), layer.units) for layer in layers]
        lifted: dict[int, int] = {}
        while True:
            free = [i for i in range(len(layers)) if i not in lifted]
            best = top_k_counts(
                [ranked[i][0] for i in free],
                total - sum(lifted.values()),
                [ranked[i][1] for i in free],
            )
            counts = lifted | dict(zip(free, best, strict=True))
            short = {i: floor for i, floor in enumerate(floors) if counts[i] < floor}
            if not short:
                return [counts[i] for i in range(len(layers))]
            lifted |= short


@dataclass(frozen=True)
class in_proportion:
    """Split a total in proportion to a measure of each layer; what overflows goes to others.

    Made to split units that are to grow or to drop: a layer may get nothing.

    Args:
        measure: A number of at least 0 for a layer, such as its size. For growth the layers
            have inverted masks: ``layer.live`` is the room they have.

    Raises:
        TypeError: If ``measure`` cannot be called.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> net = dense_layers({"fc1": (30, 10), "fc2": (10, 10)})
        >>> in_proportion(lambda layer: layer.size)(net, 3)
        [2, 1]
    """

    measure: Callable[[Layer], float]
    needs_gradient: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _is_function(self.measure):
            raise TypeError(f"{self}: measure must be a function of a layer.")

    def __repr__(self) -> str:
        return f"in_proportion({call_of(self.measure)})"

    def __call__(self, layers: Layers, total: int) -> list[int]:
        """Units per layer."""
        capacity = [layer.live for layer in layers]
        check_total(total, [0] * len(layers), capacity)
        ideal = fill([self.measure(layer) for layer in layers], capacity, total)
        left = total - sum(ideal)  # the layers with a measure are full
        ideal = [a + b for a, b in zip(ideal, _rest(ideal, capacity, left), strict=True)]
        return apportion(ideal, capacity, total, floor=0)


@without_gradient
def lamp_score(layer: Layer) -> Tensor:
    r"""Layer-adaptive magnitude (Lee et al., 2021).

    :math:`w_u^2 / \sum_{v:\, w_v^2 \ge w_u^2} w_v^2` over the live weights of the layer;
    0 for the others. Of weights with equal magnitude the first counts as the largest, so
    that exactly one weight per layer has score 1. Sums are in float64.

    Returns:
        Shape of the weight, float64.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 2.0, -2.0]])
        >>> lamp_score(Layer("fc.weight", weight, torch.ones_like(weight, dtype=torch.bool)))
        tensor([[0.1111, 1.0000, 0.5000]], dtype=torch.float64)
    """
    squares = (layer.weight.double() * layer.mask).square().reshape(-1)
    ranked, order = squares.sort(descending=True, stable=True)
    scores = ranked / ranked.cumsum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.empty_like(ranked).scatter_(0, order, scores).reshape(layer.shape)


@without_gradient
def lamp(layers: Layers, total: int) -> list[int]:
    """Counts by the LAMP score (Lee et al., 2021): ``global_by(lamp_score)``.

    The largest weight of every layer scores 1, so no layer dies.
    """
    return global_by(lamp_score)(layers, total)


@dataclass(frozen=True)
class per_layer:
    """A density for each layer, by name; the requested total is ignored.

    Args:
        densities: Pattern (as in a shell: ``*``, ``?``, ``[...]``) on the plain name of the
            weight or its module, such as ``net.0``, and the density in (0, 1] of the layers
            it matches; a mapping or pairs. The first pattern that matches a layer counts.

    Raises:
        TypeError: If a pattern is not a string.
        ValueError: If there is no pattern, or a density lies outside (0, 1]; on a call, if
            no pattern matches a layer, or a layer has too few live units.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> lenet = dense_layers({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)})
        >>> per_layer({"fc3": 1.0, "fc*": 0.1})(lenet, 0)
        [23520, 3000, 1000]
    """

    densities: Mapping[str, float] | Sequence[tuple[str, float]]
    needs_gradient: ClassVar[bool] = False
    fixes_total: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try:
            densities = {pattern: plain(value) for pattern, value in dict(self.densities).items()}
        except (TypeError, ValueError):
            raise TypeError(
                f"{self}: densities must be a mapping or pairs, such as {{'net.*': 0.1}}."
            ) from None
        _check_patterns(self, tuple(densities))
        for pattern, density in densities.items():
            if not _is_number(density) or not 0 < density <= 1:
                raise ValueError(
                    f"{self}: the density of {pattern!r} must be a number in (0, 1], not "
                    f"{density!r}; for 90% sparsity write 0.1."
                )
        object.__setattr__(self, "densities", tuple(densities.items()))

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, each of which should match a layer of the model."""
        return tuple(dict(self.densities))

    def __call__(self, layers: Layers, total: int) -> list[int]:
        """Live units per layer, whatever the ``total``."""
        densities = dict(self.densities)
        matches = _match(tuple(densities), layers)
        counts = []
        for layer, patterns in zip(layers, matches, strict=True):
            if not patterns:
                raise ValueError(
                    f"{self}: no pattern matches {layer.name}; add one, such as "
                    f"{layer.name!r}, or leave the layer out with exclude=."
                )
            wanted = max(1, round(densities[patterns[0]] * layer.size))
            if wanted > layer.live:
                raise ValueError(
                    f"{self}: {layer.name} should have {wanted} live units and has only "
                    f"{layer.live} left; lower the density of {patterns[0]!r}."
                )
            counts.append(wanted)
        return counts


@dataclass(frozen=True)
class keep_dense:
    """Leave some layers dense and split the rest by another distribution.

    Args:
        distribution: How the other layers are split.
        layers: Patterns on the plain parameter names of the layers that stay dense, such
            as ``("*.conv1.weight", "fc.weight")``.
        charge: False: the density asked for holds over the other layers, so that more
            units live than ``total`` (as in google-research/rigl). True: the dense layers
            are paid from ``total`` (as in sparsimony).

    Raises:
        TypeError: If ``distribution`` cannot be called, or a pattern is not a string.
        ValueError: If there is no pattern; on a call, if ``total`` does not pay for the
            dense layers.

    Example:
        >>> from lightning_sparsity.core.layer import dense_layers
        >>> lenet = dense_layers({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)})
        >>> keep_dense(uniform, ["fc3"])(lenet, 26620)
        [23520, 3000, 1000]
        >>> keep_dense(uniform, ["fc3"], charge=True)(lenet, 26620)
        [22722, 2898, 1000]
    """

    distribution: Distribution
    layers: Sequence[str]
    charge: bool = False
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _is_function(self.distribution):
            raise TypeError(f"{self}: distribution must be a distribution, such as erk.")
        if not isinstance(self.layers, Sequence):
            raise TypeError(f"{self}: layers must be patterns, such as ['fc.weight'].")
        patterns = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        _check_patterns(self, patterns)
        object.__setattr__(self, "layers", patterns)
        _check_flag(self, "charge", self.charge)

    def __repr__(self) -> str:
        return f"keep_dense({call_of(self.distribution)}, {self.layers!r}, charge={self.charge!r})"

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, each of which should match a layer of the model."""
        return (*self.layers, *getattr(self.distribution, "patterns", ()))

    @property
    def needs_gradient(self) -> bool:
        """Whether the other distribution reads gradients."""
        return needs_gradient(self.distribution)

    @property
    def fixes_total(self) -> bool:
        """Whether the other distribution sets the total itself."""
        return fixes_total(self.distribution)

    def __call__(self, layers: Layers, total: int) -> list[int]:
        """Live units per layer."""
        matches = _match(self.layers, layers)
        dense = {i: layers[i].live for i, patterns in enumerate(matches) if patterns}
        if self.charge:
            return _charge(dense, self.distribution, layers, total, str(self))
        size = sum(layer.size for layer in layers)
        others = size - sum(layers[i].size for i in dense)
        return _around(dense, self.distribution, layers, round(total * others / size))


def is_exact(distribution: Distribution) -> bool:
    """Whether the counts of a distribution must add up to the requested total.

    Example:
        >>> is_exact(erk), is_exact(fan_in)
        (True, False)
    """
    return bool(getattr(distribution, "exact", not fixes_total(distribution)))


def unmatched(distribution: Distribution, names: Sequence[str]) -> list[str]:
    """The patterns of a distribution that match none of the layers' names: typing errors.

    Example:
        >>> unmatched(per_layer({"fc1": 1.0, "fx*": 0.1}), ["fc1", "fc2"])
        ['fx*']
    """
    patterns = getattr(distribution, "patterns", ())
    return [p for p in patterns if not any(_fits(name, p) for name in names)]


def fixes_total(distribution: Distribution) -> bool:
    """Whether a distribution sets the total itself, so that no density is needed.

    Example:
        >>> fixes_total(epsilon(20)), fixes_total(erk)
        (True, False)
    """
    return bool(getattr(distribution, "fixes_total", False))


def _split(raw: Sequence[float], layers: Layers, total: int) -> list[int]:
    """Split ``total`` over the live units in proportion to ``raw``."""
    capacity = [layer.live for layer in layers]
    return apportion(fill(raw, capacity, total), capacity, total)


def _rest(taken: Sequence[float], capacity: Sequence[int], total: float) -> list[float]:
    room = [most - count for most, count in zip(capacity, taken, strict=True)]
    return fill(room, [math.ceil(value) for value in room], total)


def _around(
    given: Mapping[int, int], distribution: Distribution, layers: Layers, total: int
) -> list[int]:
    """The ``given`` counts, by position; ``total`` is split over the other layers."""
    rest = [i for i in range(len(layers)) if i not in given]
    others = distribution([layers[i] for i in rest], total)
    counts = {**given, **dict(zip(rest, others, strict=True))}
    return [counts[i] for i in range(len(layers))]


def _charge(
    given: Mapping[int, int], distribution: Distribution, layers: Layers, total: int, name: str
) -> list[int]:
    """As :func:`_around`, with the ``given`` counts paid from ``total``."""
    paid = sum(given.values())
    least = paid + sum(layer.live > 0 for i, layer in enumerate(layers) if i not in given)
    if given and total < least and not fixes_total(distribution):
        names = ", ".join(layers[i].name for i in given)
        density = least / sum(layer.size for layer in layers)
        raise ValueError(
            f"{name}: {total} live units are too few, since {names} take {paid} and every other "
            f"layer needs one. The largest sparsity is {1 - density:.4g} (density {density:.4g}); "
            "ask for a higher density or keep fewer layers dense."
        )
    return _around(given, distribution, layers, total - paid)


def _dims(layer: Layer) -> tuple[int, ...]:
    """Outputs, inputs (of one group) and kernel sides of a weight."""
    groups, outputs, inputs, _ = layer.layout.canonical(layer.weight).shape
    return groups * outputs, inputs, *layer.shape[2:]


def _is_linear(layer: Layer) -> bool:
    return layer.weight.ndim <= 2


def _er(layer: Layer) -> float:
    """The Erdős-Rényi ratio, from channels only."""
    outputs, inputs, *_ = _dims(layer)
    return (outputs + inputs) / (outputs * inputs)


def _match(patterns: Sequence[str], layers: Layers) -> list[list[str]]:
    """The patterns that match each layer, in order."""
    return [[p for p in patterns if _fits(layer.name, p)] for layer in layers]


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern matches a weight's name, or that of its module."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _check_patterns(distribution: object, patterns: tuple[str, ...]) -> None:
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{distribution}: patterns of layers must be strings, such as 'fc.weight'.")
    if not any(patterns):
        raise ValueError(
            f"{distribution}: needs at least one pattern of layers, such as 'fc.weight'."
        )


def _check_flag(distribution: object, name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{distribution}: {name} must be True or False.")


def _is_function(value: object) -> bool:
    return callable(value) and not isinstance(value, type)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
