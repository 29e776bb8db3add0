"""Sparse training for PyTorch Lightning: one callback per method.

Example::

    from lightning.pytorch import Trainer
    from lightning_sparsity import DensityMonitor, RigL

    Trainer(callbacks=[RigL(density=0.1), DensityMonitor()])
"""

from lightning_sparsity.callbacks.base import MaskCallback
from lightning_sparsity.callbacks.dynamic.acdc import ACDC
from lightning_sparsity.callbacks.dynamic.cht import CHT
from lightning_sparsity.callbacks.dynamic.deep_r import DeepR
from lightning_sparsity.callbacks.dynamic.dsr import DSR
from lightning_sparsity.callbacks.dynamic.granet import GraNet
from lightning_sparsity.callbacks.dynamic.gse import GSE
from lightning_sparsity.callbacks.dynamic.mest import MEST
from lightning_sparsity.callbacks.dynamic.nest import NeST
from lightning_sparsity.callbacks.dynamic.redr import (
    RedrGradient,
    RedrGradientGlobal,
    RedrLoss,
    RedrRandom,
)
from lightning_sparsity.callbacks.dynamic.redr_second_order import RedrWoodfisher, RedrWoodtaylor
from lightning_sparsity.callbacks.dynamic.rigl import RigL
from lightning_sparsity.callbacks.dynamic.set import SET
from lightning_sparsity.callbacks.dynamic.snfs import SNFS
from lightning_sparsity.callbacks.dynamic.srigl import SRigL
from lightning_sparsity.callbacks.gradual.dsd import DSD
from lightning_sparsity.callbacks.gradual.gmp import GMP
from lightning_sparsity.callbacks.gradual.gsm import GSM
from lightning_sparsity.callbacks.gradual.iht import IHT
from lightning_sparsity.callbacks.gradual.lottery_ticket import LotteryTicket
from lightning_sparsity.callbacks.gradual.magnitude import Magnitude
from lightning_sparsity.callbacks.initial.force import FORCE, IterSNIP
from lightning_sparsity.callbacks.initial.grasp import GraSP
from lightning_sparsity.callbacks.initial.neural_tangent_transfer import NeuralTangentTransfer
from lightning_sparsity.callbacks.initial.prospr import ProsPr
from lightning_sparsity.callbacks.initial.snip import SNIP
from lightning_sparsity.callbacks.initial.snip_it import SNAPit, SNIPit
from lightning_sparsity.callbacks.initial.static import StaticSparse
from lightning_sparsity.callbacks.initial.synflow import SynFlow
from lightning_sparsity.callbacks.learned.auto_prune import AutoPrune
from lightning_sparsity.callbacks.learned.continuous_sparsification import ContinuousSparsification
from lightning_sparsity.callbacks.learned.dnw import DNW
from lightning_sparsity.callbacks.learned.dpf import DPF
from lightning_sparsity.callbacks.learned.dynamic_thresholds import DynamicThresholds
from lightning_sparsity.callbacks.learned.edge_popup import EdgePopup
from lightning_sparsity.callbacks.learned.espn import ESPNFinetune, ESPNRewind
from lightning_sparsity.callbacks.learned.l0 import L0
from lightning_sparsity.callbacks.learned.movement import MovementPruning, SoftMovementPruning
from lightning_sparsity.callbacks.learned.optg import OptG
from lightning_sparsity.callbacks.learned.powerpropagation import Powerpropagation
from lightning_sparsity.callbacks.learned.soft_threshold import STR
from lightning_sparsity.callbacks.learned.sr_ste import SRSTE
from lightning_sparsity.callbacks.learned.supermask import Supermask
from lightning_sparsity.callbacks.learned.top_kast import TopKAST
from lightning_sparsity.callbacks.learned.variational_dropout import VariationalDropout
from lightning_sparsity.callbacks.learned_mask import LearnedMask
from lightning_sparsity.callbacks.sparse_compute import SparseCompute
from lightning_sparsity.core.filters import first_layer, last_layer, linear_and_conv
from lightning_sparsity.core.window import epochs
from lightning_sparsity.distributions import (
    epsilon,
    er,
    erk,
    erk_power,
    fan_in,
    global_by,
    keep_dense,
    lamp,
    per_layer,
    smart_ratio,
    smart_ratio_with,
    uniform,
    uniform_plus,
)
from lightning_sparsity.export import compress
from lightning_sparsity.monitors import DensityMonitor
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
    step,
)
from lightning_sparsity.structures import NM, Block, Columns, Rows, Unstructured

__version__ = "0.1.0"

__all__ = [
    "ACDC",
    "AutoPrune",
    "Block",
    "CHT",
    "Columns",
    "ContinuousSparsification",
    "DNW",
    "DPF",
    "DSD",
    "DSR",
    "DeepR",
    "DensityMonitor",
    "DynamicThresholds",
    "ESPNFinetune",
    "ESPNRewind",
    "EdgePopup",
    "FORCE",
    "GMP",
    "GSE",
    "GSM",
    "GraNet",
    "GraSP",
    "IHT",
    "IterSNIP",
    "L0",
    "LearnedMask",
    "LotteryTicket",
    "MEST",
    "Magnitude",
    "MaskCallback",
    "MovementPruning",
    "NM",
    "NeST",
    "NeuralTangentTransfer",
    "OptG",
    "Powerpropagation",
    "ProsPr",
    "RedrGradient",
    "RedrGradientGlobal",
    "RedrLoss",
    "RedrRandom",
    "RedrWoodfisher",
    "RedrWoodtaylor",
    "RigL",
    "Rows",
    "SET",
    "SNAPit",
    "SNFS",
    "SNIP",
    "SNIPit",
    "SRSTE",
    "SRigL",
    "STR",
    "SoftMovementPruning",
    "SparseCompute",
    "StaticSparse",
    "Supermask",
    "SynFlow",
    "TopKAST",
    "Unstructured",
    "VariationalDropout",
    "compress",
    "constant",
    "cosine",
    "cubic",
    "cyclic",
    "epochs",
    "epsilon",
    "er",
    "erk",
    "erk_power",
    "exponential",
    "fan_in",
    "first_layer",
    "geometric",
    "global_by",
    "inverse_power",
    "keep_dense",
    "lamp",
    "last_layer",
    "linear",
    "linear_and_conv",
    "per_layer",
    "sigmoid",
    "smart_ratio",
    "smart_ratio_with",
    "step",
    "uniform",
    "uniform_plus",
]
