"""Reports: what is sparse and by how much, as tables of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_sparsity.connectivity import Wiring, dead_outputs, effective_density
from lightning_sparsity.core.masks import Masks
from lightning_sparsity.core.parameter import SparseParameter
from lightning_sparsity.core.shards import whole
from lightning_sparsity.core.storage import Storage
from lightning_sparsity.flops import Flops
from lightning_sparsity.structures import Rows, Unstructured


@dataclass(frozen=True)
class Course:
    """What training did to one mask.

    Args:
        start: Live weights before the first step.
        ever_live: Weights that were live at any time.
        dropped: Weights dropped in all updates together; one dropped twice counts twice.
    """

    start: int
    ever_live: int
    dropped: int


def allocation_table(masks: Masks, model: nn.Module | None = None) -> str:
    """How many weights of each layer are live.

    Args:
        masks: The sparse parameters.
        model: Their model; if given, a last line says what is left dense.

    Returns:
        The table, several lines without a newline at the end. A column counts the rows
        without a live weight, if there are any that a structure does not ask for.
    """
    whole_units = any(not isinstance(kept.structure, Unstructured) for kept in masks)
    header = ["sparse parameter", "shape", "density", "live", "weights"]
    rows = [
        [kept.name, _shape(kept), _density(kept.live, kept.numel), *_counts(kept.live, kept.numel)]
        for kept in masks
    ]
    rows.append(["total", "", _density(masks.live, masks.numel), *_counts(masks.live, masks.numel)])
    _add_dead_rows(header, rows, masks)
    if whole_units:
        header.append("live units")
        for row, kept in zip(rows, masks, strict=False):
            row.append(_units(kept))
        rows[-1].append("")
    lines = [table(header, rows)] if len(masks) else []
    if model is not None:
        lines.append(_dense_line(masks, model))
    return "\n".join(lines)


def final_table(masks: Masks, courses: Mapping[str, Course], flops: Flops | None = None) -> str:
    """How the masks ended and what happened to them on the way.

    Args:
        masks: The sparse parameters.
        courses: What training did to each, by name.
        flops: Adds a column of forward FLOPs per sample at the final density; "?" where
            they are not known.

    Returns:
        The table, several lines without a newline at the end, with dead rows as in
        :func:`allocation_table`.
    """
    header = ["sparse parameter", "density at start", "at end", "live", "ever live", "dropped"]
    rows = []
    for kept in masks:
        course = courses[kept.name]
        rows.append([kept.name, *_course(course, kept.live, kept.numel)])
    all_of_it = Course(
        start=sum(course.start for course in courses.values()),
        ever_live=sum(course.ever_live for course in courses.values()),
        dropped=sum(course.dropped for course in courses.values()),
    )
    rows.append(["total", *_course(all_of_it, masks.live, masks.numel)])
    _add_dead_rows(header, rows, masks)
    if flops is not None:
        header.append("FLOPs")
        at_end = {kept.name: kept.density for kept in masks}
        for row, kept in zip(rows, masks, strict=False):
            dense = flops.layers.get(kept.name)
            row.append("?" if dense is None else quantity(dense * kept.density))
        total = sum(f * at_end[name] for name, f in flops.layers.items())
        rows[-1].append("?" if len(flops.layers) < len(masks) else quantity(total))
    return table(header, rows)


def storage_table(masks: Masks, storage: Storage) -> str:
    """How each sparse weight is kept, what was measured, and why the others stay dense.

    Args:
        masks: The sparse parameters.
        storage: What was decided.

    Returns:
        The table, several lines without a newline at the end. Times are of the layer's forward
        and backward pass; memory is that of the weight, its indices and its mask.
    """
    header = [
        "sparse parameter",
        "density",
        "storage",
        "dense ms",
        "compressed ms",
        "memory",
        "why",
    ]
    rows = []
    for kept in masks:
        choice = storage.choices.get(kept.name)
        times = (None, None) if choice is None else (choice.dense_ms, choice.compressed_ms)
        learning = "its mask is learned" if kept.effective is not None else ""
        why = storage.reasons.get(kept.name, learning)
        reads = 0 if kept.compressed is None else kept.compressed.reads
        rows.append(
            [
                kept.name,
                f"{kept.density:.4f}",
                "dense" if kept.compressed is None else f"csr, {kept.compressed.kernels}",
                *("" if ms is None else f"{ms:.3g}" for ms in times),
                f"{_memory(kept):.0%}",
                why or (f"read densely {reads} times" if reads else ""),
            ]
        )
    numel = sum(kept.numel * kept.parameter.element_size() for kept in masks)
    together = sum(_memory(kept) * kept.numel * kept.parameter.element_size() for kept in masks)
    share = f"{together / numel:.0%}" if numel else ""
    rows.append(["total", f"{masks.density:.4f}", "", "", "", share, ""])
    return table(header, rows)


def _memory(kept: SparseParameter) -> float:
    """Bytes of a weight, its indices and its mask, over those of the dense weight."""
    dense = kept.numel * kept.parameter.element_size()
    where = kept.numel if kept.compressed is None else kept.compressed.pattern.nbytes
    return (kept.parameter.nbytes + where) / dense


def connectivity_line(wired: Mapping[str, Wiring]) -> str:
    """How much of the live weights lies on a path, and what is dead.

    Args:
        wired: Of the sparse layers, by name.

    Returns:
        One line.
    """
    live, effective, neurons, dead = (
        sum(getattr(layer, key) for layer in wired.values())
        for key in ("live", "effective", "neurons", "dead_neurons")
    )
    return (
        f"Effective density: {effective_density(wired):.4f}; {effective:,} of {live:,} live "
        "weights lie on a path from input to output. "
        f"Dead neurons: {dead:,} of {neurons:,}."
    )


def flops_table(masks: Masks, flops: Flops) -> str:
    """Forward FLOPs per sample of each layer, dense and at its density.

    Args:
        masks: The sparse parameters.
        flops: What was counted; "?" where it is not known.

    Returns:
        The table, several lines without a newline at the end; empty if nothing is known.
    """
    if not flops.layers:
        return ""
    rows = []
    for kept in masks:
        dense = flops.layers.get(kept.name)
        now = None if dense is None else dense * kept.density
        told = ["?" if value is None else quantity(value) for value in (dense, now)]
        rows.append([kept.name, told[0], _density(kept.live, kept.numel), told[1]])
    return table(["sparse parameter", "FLOPs dense", "density", "FLOPs now"], rows) + "\n"


def flops_line(flops: Flops, densities: Mapping[str, float]) -> str:
    """Forward FLOPs per sample, dense and at these densities."""
    if flops.unknown:
        return f"FLOPs are not known: {flops.unknown}."
    now = flops.inference(densities)
    return (
        f"Forward FLOPs per sample: {quantity(flops.dense)} dense, {quantity(now)} at these "
        f"densities ({_ratio(now, flops.dense)})."
    )


def training_flops_line(spent: float, flops: Flops) -> str:
    """Training FLOPs per sample.

    Args:
        spent: Mean over the training.
        flops: Of the model.
    """
    dense = 3 * flops.dense
    return (
        f"Training FLOPs per sample: {quantity(dense)} dense, {quantity(spent)} in the mean of "
        f"this training ({_ratio(spent, dense)})."
    )


def time_line(seconds: float, batches: int, zeros: bool = True) -> str:
    """Measured time per batch.

    Args:
        seconds: The median.
        batches: How many batches were measured.
        zeros: Whether the model computed with weights that are zero.
    """
    time = quantity(seconds, "s")
    line = f"Measured: {time} per batch, median of {batches}, data loading included."
    if zeros:
        line += (
            "\nWeights are stored densely and zeros computed too: FLOPs saved are no time saved."
        )
    return line


def memory_line(masks: Masks) -> str:
    """Bytes of the sparse parameters: dense, as they are stored, and as few as could be."""
    dense = sum(kept.numel * kept.parameter.element_size() for kept in masks)
    stored = sum(map(stored_bytes, masks))
    least = sum(kept.live * kept.parameter.element_size() + -(-kept.numel // 8) for kept in masks)
    now, before, could_be = (quantity(size, "B") for size in (stored, dense, least))
    return (
        f"Memory of these parameters: {before} dense; {now} now, with masks and what applies them "
        f"at memory speed; live values and a bitmap alone would be {could_be}."
    )


def stored_bytes(kept: SparseParameter) -> int:
    """Bytes that a sparse parameter takes now: weight, mask or indices, tensors of the method."""
    tensors = [kept.parameter, *kept.slots.values()]
    if kept.compressed is None:
        tensors += [kept.mask] if kept.is_dense else [kept.mask, kept.gate]
    where = 0 if kept.compressed is None else kept.compressed.pattern.nbytes
    return where + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def quantity(value: float, unit: str = "") -> str:
    """A number with three digits, a metric prefix and its unit.

    Example:
        >>> [quantity(532_480), quantity(8.2e9), quantity(15), quantity(0.00193, "s")]
        ['532 k', '8.20 G', '15.0', '1.93 ms']
    """
    prefixes = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "µ": 1e-6}
    fits = (p for p, size in prefixes.items() if value >= 0.9995 * size)
    prefix = next(fits, "µ") if value else ""
    return f"{_three_digits(value / prefixes[prefix])} {prefix}{unit}".strip()


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3g}x"


def _density(live: int, numel: int) -> str:
    return f"{live / numel:.4f}" if numel else "1.0000"


def _counts(*counts: int) -> list[str]:
    return [f"{count:,}" for count in counts]


def _shape(kept: SparseParameter) -> str:
    return " x ".join(map(str, kept.shape))


def _units(kept: SparseParameter) -> str:
    units = kept.structure.live(whole(kept.mask), kept.layout)
    return f"{int(units.count_nonzero()):,} of {units.numel():,} {kept.structure!r}"


def _add_dead_rows(header: list[str], rows: list[list[str]], masks: Masks) -> None:
    """Add the column that counts them, if there are any."""
    dead = [_dead_rows(kept) for kept in masks]
    if any(dead):
        header.append("dead rows")
        for row, cell in zip(rows, [*dead, ""], strict=True):
            row.append(cell)


def _dead_rows(kept: SparseParameter) -> str:
    if kept.mask.ndim < 2 or isinstance(kept.structure, Rows):
        return ""
    dead = dead_outputs(whole(kept.mask), kept.layout)
    count = int(dead.count_nonzero())
    return f"{count:,} of {len(dead):,}" if count else ""


def _course(course: Course, live: int, numel: int) -> list[str]:
    return [
        _density(course.start, numel),
        _density(live, numel),
        f"{live:,}",
        f"{course.ever_live / numel:.1%}" if numel else "100.0%",
        f"{course.dropped:,}",
    ]


def _dense_line(masks: Masks, model: nn.Module) -> str:
    sparse = {id(kept.parameter) for kept in masks}
    sizes = [p.numel() for p in model.parameters() if id(p) not in sparse]
    if not len(masks):
        return f"No parameter is sparse: all {len(sizes)} are dense ({sum(sizes):,} weights)."
    return f"Dense: the other {len(sizes)} parameters ({sum(sizes):,} weights)."


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, the first to the left; a rule above the last row."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))
    lines = [_row(header, widths), rule, *(_row(row, widths) for row in rows)]
    lines.insert(-1, rule)
    return "\n".join(lines)


def _row(cells: Iterable[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])
