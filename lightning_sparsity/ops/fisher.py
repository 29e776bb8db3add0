r"""Fisher blocks: curvature estimated from gradients, and what removing weights costs under it.

The weights are cut into blocks of consecutive ones, and the curvature of a block is
:math:`F = \lambda I + \frac{1}{N} \sum_i g_i g_i^\top`. A change :math:`\delta` of its weights
changes the loss by :math:`\bar g^\top \delta + \frac12 \delta^\top F \delta`, with the mean
gradient :math:`\bar g`, or 0 where it is taken to vanish.

Blocks are batched: weights, gradients and removals are ``(blocks, size)``, curvatures and
their inverses ``(blocks, size, size)``. The last block is filled up with weights that are
zero and never have a gradient, which changes nothing for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_blocks(values: Tensor, size: int) -> Tensor:
    """Cut a vector into rows of ``size``, the last one filled up with zeros.

    Args:
        values: ``(n,)``.
        size: Length of a block, at least 1.

    Returns:
        ``(ceil(n / size), size)``.

    Example:
        >>> to_blocks(torch.tensor([1, 2, 3]), 2)
        tensor([[1, 2],
                [3, 0]])
    """
    return torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)


@torch.no_grad()
def add_outer(sums: Tensor, rows: Tensor) -> Tensor:
    r"""Add the outer product of every row with itself: :math:`S + g g^\top`, a new tensor.

    Args:
        sums: ``(blocks, size, size)``.
        rows: ``(blocks, size)``.
    """
    return torch.addcmul(sums, rows.unsqueeze(2), rows.unsqueeze(1))


@torch.no_grad()
def inverse_blocks(sums: Tensor, count: Tensor | int, damping: float) -> Tensor:
    r""":math:`(\lambda I + S / N)^{-1}` of every block, in float64.

    By a Cholesky factorisation. The recurrence of WoodFisher (Singh and Alistarh, 2020),
    which starts at :math:`I / \lambda` and adds one gradient at a time by the
    Sherman-Morrison formula, gives the same matrix.

    Args:
        sums: Sums of outer products of gradients, ``(blocks, size, size)``.
        count: :math:`N`, the number of gradients; 0: the curvature is the damping alone.
        damping: :math:`\lambda`, above 0.

    Returns:
        ``(blocks, size, size)``, float64.

    Example:
        >>> inverse_blocks(torch.tensor([[[6.0]], [[0.0]]]), 2, damping=1.0)
        tensor([[[0.2500]],
        <BLANKLINE>
                [[1.0000]]], dtype=torch.float64)
    """
    fisher = sums.double() / torch.as_tensor(count, device=sums.device).clamp(min=1)
    fisher.diagonal(dim1=1, dim2=2).add_(damping)
    factor, failed = torch.linalg.cholesky_ex(fisher)
    inverse = torch.cholesky_inverse(factor)
    lost = failed > 0
    if lost.any():  # sums rounded to float32 may fall short of a damping that is far smaller
        values, vectors = torch.linalg.eigh(fisher[lost])
        inverse[lost] = (vectors / values.clamp(min=damping).unsqueeze(1)) @ vectors.mT
    return inverse


@torch.no_grad()
def newton_step(weight: Tensor, inverse: Tensor, gradient: Tensor) -> Tensor:
    r"""The weights where the loss is predicted to be least: :math:`w - F^{-1} \bar g`.

    Args:
        weight: ``(blocks, size)``.
        inverse: From :func:`inverse_blocks`.
        gradient: Mean gradient :math:`\bar g`, ``(blocks, size)``.

    Returns:
        ``(blocks, size)``, float64.
    """
    return weight.double() - _apply(inverse, gradient.double())


@torch.no_grad()
def obs_saliency(weight: Tensor, inverse: Tensor) -> Tensor:
    r"""What removing one weight costs if the others of its block make up for it.

    :math:`w_q^2 / (2 [F^{-1}]_{qq})` (Hassibi and Stork, 1993), which takes the gradient to
    be zero. Where it is not, the same after a :func:`newton_step` is the predicted change of
    the loss, up to :math:`-\frac12 \bar g^\top F^{-1} \bar g` over all blocks, which no choice
    of a weight changes (WoodTaylor; Singh and Alistarh, 2020).

    Args:
        weight: ``(blocks, size)``.
        inverse: From :func:`inverse_blocks`.

    Returns:
        ``(blocks, size)``, float64, at least 0.
    """
    return weight.double().square() / (2 * inverse.diagonal(dim1=1, dim2=2))


@torch.no_grad()
def survivors_update(
    weight: Tensor, removed: Tensor, inverse: Tensor, joint: bool = False
) -> Tensor:
    r"""The change of the weights of each block that makes up for those removed.

    For the removed weights :math:`Q`, the sum of the changes that each alone would ask for is
    :math:`-\sum_{q \in Q} \frac{w_q}{[F^{-1}]_{qq}} F^{-1} e_q`; the best for all of them
    together is :math:`-F^{-1}_{\cdot Q} (F^{-1}_{QQ})^{-1} w_Q`.

    Args:
        weight: ``(blocks, size)``.
        removed: Which weights go, ``(blocks, size)`` bool.
        inverse: From :func:`inverse_blocks`.
        joint: The best change for all that are removed together, instead of the sum.

    Returns:
        ``(blocks, size)``, float64; exactly minus the weight where one is removed.

    Example:
        >>> weight, inverse = torch.tensor([[1.0, 2.0]]), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> survivors_update(weight, torch.tensor([[True, False]]), inverse.double())
        tensor([[-1.0000, -0.5000]], dtype=torch.float64)
    """
    weight = weight.double()
    lost = torch.where(removed, weight, 0.0)
    if joint:
        both = removed.unsqueeze(2) & removed.unsqueeze(1)
        among = torch.where(both, inverse, torch.diag_embed((~removed).double()))
        scale = torch.linalg.solve(among, lost.unsqueeze(2)).squeeze(2)
    else:
        scale = lost / inverse.diagonal(dim1=1, dim2=2)
    return torch.where(removed, -weight, -_apply(inverse, scale))


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors.unsqueeze(2)).squeeze(2)
