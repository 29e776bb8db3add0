"""Lottery tickets, one training per round, each by a Trainer of its own.

:func:`run_imp` is the driver of iterative magnitude pruning: it trains, prunes, sends back and
trains again, and keeps everything in a folder, so that it goes on where it was stopped.
:class:`~lightning_sparsity.LotteryTicket` does the same inside one ``fit``.
"""

from lightning_sparsity.lottery.driver import run_imp
from lightning_sparsity.lottery.ticket import Round, Ticket

__all__ = ["Round", "Ticket", "run_imp"]
