r"""Link prediction on the bipartite graph of a layer: which missing links fit its topology.

A weight that lives is a link between an output and an input unit. Units of one side are
*similar* if they share neighbours. A missing link is likely if paths of three links join its
ends, and the more so the less the units on these paths are tied to anything else (the
Cannistraci-Hebb theory of network automata).
"""

from __future__ import annotations

import torch
from torch import Tensor


def ch3_l3n(mask: Tensor) -> Tensor:
    r"""CH3-L3n: one term for every unit next to an end that has neighbours of the other end.

    .. math:: s(u, v) = \sum_{z \in N(v),\, c_{uz} > 0} \frac{1}{1 + e_u(z)}
              + \sum_{z \in N(u),\, c_{vz} > 0} \frac{1}{1 + e_v(z)}, \qquad
              e_u(z) = \max(k_z - c_{uz} - 1, 0)

    :math:`k_z` is the number of links of unit :math:`z`, :math:`c_{uz}` the number of
    neighbours that two units of one side share. Two dense products per side.

    Args:
        mask: ``(out, in)`` bool.

    Returns:
        ``(out, in)`` float64, 0 on links that exist.

    Example:
        >>> ch3_l3n(torch.tensor([[True, True, False], [False, True, True]]))
        tensor([[0., 0., 2.],
                [2., 0., 0.]], dtype=torch.float64)
    """
    return _l3n(mask, multiply=False)


def ch2_l3n(mask: Tensor) -> Tensor:
    r"""CH2-L3n: as :func:`ch3_l3n`, with every term times :math:`1 + c`.

    Example:
        >>> ch2_l3n(torch.tensor([[True, True, False], [False, True, True]]))
        tensor([[0., 0., 4.],
                [4., 0., 0.]], dtype=torch.float64)
    """
    return _l3n(mask, multiply=True)


def ch3_l3p(mask: Tensor) -> Tensor:
    r"""CH3-L3p: one term for every path of three links.

    .. math:: s(u, v) = \sum_{u - z_1 - z_2 - v} \frac{1}{\sqrt{(1 + e(z_1)) (1 + e(z_2))}}

    :math:`e(z)` counts the links of :math:`z` that lead neither to :math:`u`, :math:`v` nor to
    another unit on such a path. In a bipartite graph :math:`z_1 \in N(u)` lies on a path with
    just those neighbours that it shares with :math:`v`, so that :math:`1 + e(z_1)` is the
    number of its links less those shared; the sum is then exact in dense products, one for
    every unit of the smaller side. Their cost is the layer's links times its weights: meant
    for small layers.

    Args:
        mask: ``(out, in)`` bool.

    Returns:
        ``(out, in)`` float64, 0 on links that exist.

    Example:
        >>> ch3_l3p(torch.tensor([[True, True, False], [False, True, True]]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]], dtype=torch.float64)
    """
    _check(mask)
    if mask.shape[0] > mask.shape[1]:
        return ch3_l3p(mask.T).T.contiguous()
    links = mask.double()
    row = (links.sum(1, keepdim=True) - links @ links.T).clamp(min=1).rsqrt()  # of z2 towards u
    column = (links.sum(0)[:, None] - links.T @ links).clamp(min=1).rsqrt()  # of z1 towards v
    scores = torch.zeros_like(links)
    for unit, neighbours in enumerate(mask):
        paths = links[:, neighbours] @ column[neighbours]
        scores[unit] = (links * row[:, unit, None] * paths).sum(0)
    return scores.masked_fill_(mask, 0)


def _l3n(mask: Tensor, multiply: bool) -> Tensor:
    _check(mask)
    links = mask.double()
    outputs = _affinity(links, multiply) @ links
    inputs = _affinity(links.T, multiply) @ links.T
    return (outputs + inputs.T).masked_fill_(mask, 0)


def _affinity(links: Tensor, multiply: bool) -> Tensor:
    """What row unit z adds for row unit u, at ``[u, z]``; 0 if they share no neighbour."""
    shared = links @ links.T
    outside = (links.sum(1) - shared).clamp(min=1)
    terms = (shared + 1) / outside if multiply else 1 / outside
    return terms * (shared > 0)


def _check(mask: Tensor) -> None:
    if mask.ndim != 2:
        raise ValueError(f"mask of shape {tuple(mask.shape)}: (out, in) is needed.")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}; torch.bool is needed.")
