r"""Connectivity: which live weights lie on a path from input to output, and what is dead.

Layers are read as links between units: the neurons of a linear layer, the channels of a
convolution, which are linked if any weight of the kernel between them is live. A layer reads
the one before it in a sequence if their widths match: as many inputs as outputs, or the
inputs of a linear layer a multiple of the channels of a convolution, which were flattened. Any
other layer takes its inputs from outside, and what stands before it gives its outputs there;
outside everything is alive.

Positions within a channel are not told apart: what a kernel with few live weights never
touches of a picture counts as reached. A dead unit can still emit a constant, from a bias or a
normalisation; weights that carry nothing else do not count as effective here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_sparsity.core.filters import candidates, linear_and_conv
from lightning_sparsity.core.layer import Layer
from lightning_sparsity.core.stand_in import dense_weight
from lightning_sparsity.structures import Layout

_PLAIN = Layout()


class CollapseError(RuntimeError):
    """Nothing passes through a layer any more."""


class Masked(Protocol):
    """What is read of a layer: a ``Layer`` or a ``SparseParameter``, say."""

    @property
    def name(self) -> str:
        """Plain parameter name."""
        ...

    @property
    def mask(self) -> Tensor:
        """Shape of the weight, bool, True = live."""
        ...

    @property
    def layout(self) -> Layout:
        """Where outputs and inputs lie."""
        ...


@dataclass(frozen=True)
class Wiring:
    """How one layer is wired.

    Args:
        weights: Its weights, live or not.
        live: Live weights.
        effective: Live weights on a path from input to output.
        neurons: Its output units.
        dead_neurons: Those without a live weight, or that the next layer does not read.
    """

    weights: int
    live: int
    effective: int
    neurons: int
    dead_neurons: int


def dead_outputs(mask: Tensor, layout: Layout = _PLAIN) -> Tensor:
    """Output units without a live weight: rows, filters.

    Args:
        mask: Shape of the weight, bool.
        layout: Where its outputs and inputs lie.

    Returns:
        ``(outputs,)`` bool.

    Example:
        >>> dead_outputs(torch.tensor([[True, False], [False, False]]))
        tensor([False,  True])
    """
    return ~_links(mask, layout).any(2).reshape(-1)


def dead_inputs(mask: Tensor, layout: Layout = _PLAIN) -> Tensor:
    """Input units that no live weight reads: columns, input channels.

    Args:
        mask: Shape of the weight, bool.
        layout: Where its outputs and inputs lie.

    Returns:
        ``(inputs,)`` bool.

    Example:
        >>> dead_inputs(torch.tensor([[True, False], [False, False]]))
        tensor([False,  True])
    """
    return ~_links(mask, layout).any(1).reshape(-1)


def wiring(layers: Iterable[Masked | None]) -> dict[str, Wiring]:
    """How layers are wired that follow each other.

    Args:
        layers: In the order in which the input passes them, each with 2 dimensions or more;
            None: something unknown lies between two layers.

    Returns:
        Their wiring, by name.

    Example:
        >>> first = torch.tensor([[True, False], [False, False], [True, True]])
        >>> second = torch.tensor([[True, True, False]])
        >>> found = wiring([Layer("fc1", first, first), Layer("fc2", second, second)])
        >>> found["fc1"]  # neuron 1 has no weight, neuron 2 is not read
        Wiring(weights=6, live=3, effective=1, neurons=3, dead_neurons=2)
        >>> found["fc2"]
        Wiring(weights=3, live=2, effective=1, neurons=1, dead_neurons=0)
    """
    return {name: found for chain in _chains(layers) for name, found in _wiring(chain).items()}


def effective_density(found: Mapping[str, Wiring]) -> float:
    """Weights on a path from input to output / all weights; 1 if there are none."""
    weights = sum(layer.weights for layer in found.values())
    return sum(layer.effective for layer in found.values()) / weights if weights else 1.0


def layers_of(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> list[Layer | None]:
    """The linear and convolutional layers of a model, cut where no chain is to be seen.

    The graph of a model is not known, only the order of its modules. Layers that follow each
    other there count as a chain if the same module holds them, inside any ``nn.Sequential``,
    and nothing with a matrix of its own stands between: an embedding, a recurrent layer, a
    weight that is used at several places. A skip connection or parallel branches inside one
    module are not seen: there the chain is a guess.

    Args:
        model: The model.
        masks: Of its weights, by plain name; those that are not in it are dense. None:
            weights other than zero are live.

    Returns:
        The layers in order; None where the chain is cut.
    """
    pool = {id(c.parameter): c for c in candidates(model)}
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[Layer | None] = []
    last: str | None = None
    for name, parameter in model.named_parameters(remove_duplicate=False):
        candidate = pool[id(parameter)]
        weight = dense_weight(candidate.module, candidate.name.rpartition(".")[2])
        if weight.ndim < 2:
            continue  # works on every unit alone
        tied = len(candidate.aliases) > 1
        if not linear_and_conv(candidate) or tied or not weight.numel():
            last = None
            continue
        home = _home(name, modules)
        if found and home != last:
            found.append(None)
        last = home
        if masks is None:
            mask = weight != 0
        else:
            dense = torch.ones((), dtype=torch.bool, device=weight.device).expand_as(weight)
            mask = masks.get(candidate.name, dense)
        found.append(Layer(candidate.name, weight, mask, layout=candidate.layout))
    return found


def _home(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The module that calls the layer of a parameter: what holds it, but no ``Sequential``."""
    place = name.rpartition(".")[0].rpartition(".")[0]
    while place and isinstance(modules[place], nn.Sequential):
        place = place.rpartition(".")[0]
    return place


def _links(mask: Tensor, layout: Layout) -> Tensor:
    """Which units are linked: ``(groups, out, in)`` bool."""
    return layout.canonical(mask).any(-1)


def _chains(layers: Iterable[Masked | None]) -> list[list[Masked]]:
    """Cut a sequence where a layer does not read the one before."""
    chains: list[list[Masked]] = []
    last: Masked | None = None
    for layer in layers:
        if layer is not None:
            if last is None or not _reads(layer, last):
                chains.append([])
            chains[-1].append(layer)
        last = layer
    return chains


def _reads(layer: Masked, before: Masked) -> bool:
    groups, _, inputs, _ = layer.layout.canonical(layer.mask).shape
    groups_before, outputs, _, _ = before.layout.canonical(before.mask).shape
    wide, given = groups * inputs, groups_before * outputs
    flattened = layer.mask.ndim == 2 and before.mask.ndim > 2
    return wide == given or (flattened and given > 0 and wide > 0 and wide % given == 0)


def _wiring(chain: Sequence[Masked]) -> dict[str, Wiring]:
    links = [_links(layer.mask, layer.layout) for layer in chain]
    # Forward: inputs that anything reaches. Backward: outputs that anything needs.
    reached = [torch.ones_like(links[0][:, 0])]
    for before, after in zip(links, links[1:], strict=False):
        outputs = (before & reached[-1][:, None]).any(2).reshape(-1)
        groups, _, inputs = after.shape
        spread = outputs.repeat_interleave(groups * inputs // len(outputs))
        reached.append(spread.reshape(groups, inputs))
    needed = [torch.ones_like(links[-1][:, :, 0])]
    for before, after in zip(links[-2::-1], links[:0:-1], strict=True):
        needed.insert(0, _onto((after & needed[0][:, :, None]).any(1), before))
    read = [_onto(after.any(1), before) for before, after in zip(links, links[1:], strict=False)]
    read.append(needed[-1])
    found = {}
    for layer, linked, to, of, used in zip(chain, links, reached, needed, read, strict=True):
        carries = to[:, None, :, None] & of[:, :, None, None]
        counts = torch.stack(
            [
                layer.mask.count_nonzero(),
                (layer.layout.canonical(layer.mask) & carries).count_nonzero(),
                (~(linked.any(2) & used)).count_nonzero(),
            ]
        )
        live, effective, dead = counts.tolist()
        found[layer.name] = Wiring(layer.mask.numel(), live, effective, of.numel(), dead)
    return found


def _onto(inputs: Tensor, before: Tensor) -> Tensor:
    """Inputs of a layer as the outputs, ``(groups, out)``, that the layer before gives."""
    groups, outputs, _ = before.shape
    return inputs.reshape(groups, outputs, -1).any(-1)
