"""A mesh as a picture: which device holds which part of the batch, of a weight, of the table.

All is read from the rules and the sizes of the mesh, so no device is needed.
"""

import itertools
import math
from collections import defaultdict
from typing import NamedTuple

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxgen.errors import UserError
from jaxgen.sharding import Axes, Rules, logical_to_mesh, zigzag

# One a device. Dark text is readable on each; devices 1, 2 and 4 apart are easy to tell apart.
COLOURS = (
    "#85c7ec", "#ffb83d", "#93d3a2", "#f48f85", "#c6aceb", "#5fc9c0", "#8ba6ff", "#cbdb5c",
    "#f7a8d0", "#d8b894", "#a9bccb", "#e5d26b", "#b78fd0", "#79dd8f", "#e39a5b", "#9fd8ff",
)  # fmt: skip
INK, FAINT, ACCENT, PAPER, EVERYWHERE = "#1f2933", "#5f6c7b", "#0b5cad", "#ffffff", "#e1e5ea"
WIDTH, MARGIN, COLUMN, COLUMN_GAP, ROW = 900, 26, 264, 28, 246
BOX = 160  # The height of a drawn array.
Length = int | float
AnyMesh = Mesh | AbstractMesh


class Panel(NamedTuple):
    """An array of matrices, drawn side by side. Dimensions are (name, logical axis)."""

    columns: int
    title: str
    outer: tuple[str, str | None]
    down: tuple[str, str]
    across: tuple[str, str]
    first: str | None = None
    """The logical axis of one more dimension, of which only the first place is drawn."""


def draw_mesh(mesh: AnyMesh, rules: Rules | None = None, *, experts: bool | None = None) -> str:
    """Returns an SVG, 900 wide, of what each device of a mesh holds.

    A piece has the colour and the number of its device, stripes if several hold the same, and is
    grey if all do. A device's number is its place in the mesh. Positions are in the text's order;
    a pipeline has as many microbatches as stages.

    Args:
        mesh: of at most 16 devices, which need not exist.
        rules: logical axis -> mesh axes; the default ones if None.
        experts: whether the model has experts; None for where `expert` splits something.

    Raises:
        UserError: the mesh is larger.
    """
    if mesh.size > len(COLOURS):
        raise UserError(f"a mesh of {mesh.size} devices is too large to draw; {len(COLOURS)} fit")
    rules = (rules or Rules()).on(mesh)
    experts = mesh.shape["expert"] > 1 if experts is None else experts
    one, rows, layers = ("", None), ("rows", "batch"), ("layers", "layers")
    embed, vocab, mlp = ("embed", "embed"), ("vocab", "vocab"), ("mlp", "mlp")
    # Where the MLP gives way to experts, what is left of a layer is its attention.
    kind, wide = ("Attention", ("heads", "heads")) if experts else ("MLP", mlp)
    batch = Panel(1, "Batch", one, rows, ("positions", "seq"))
    residual = Panel(1, "Residual stream", one, rows, ("positions", "act_seq"))
    table = Panel(1, "Embedding table", one, vocab, embed)
    one_layer = Panel(1, f"{kind} weight, first layer", one, embed, wide)
    all_layers = Panel(2, f"{kind} weight, all layers", layers, embed, wide)
    panels = [batch, residual, table, one_layer, all_layers]
    if rules.shards("layers", mesh) > 1:
        # The stages share the stream, and the first layer is only one's.
        residual = residual._replace(columns=2, outer=("microbatches", "layers"))
        panels = [batch, residual, table, all_layers]
    if experts:
        each, hidden = ("experts", "expert"), ("embed", "expert_embed")
        panels += [Panel(3, "Expert weight, first layer", each, hidden, mlp, "layers")]
    name = " ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "one device"
    body, shared = [_text(MARGIN, 34, name, 'font-size="19" font-weight="700"')], set()
    column, top = 0, _devices(mesh, body)
    for panel in panels:
        if column == 3:
            column, top = 0, top + ROW
        _draw(panel, mesh, rules, MARGIN + column * (COLUMN + COLUMN_GAP), top, body, shared)
        column += panel.columns
    key = f"{_split('a dimension', 'the mesh axes that split it')}; striped: the same on several"
    body.append(_text(MARGIN, top + 236, f"{key} devices; grey: on all", f'fill="{FAINT}"'))
    height = top + 254
    size = f'width="{WIDTH}" height="{height}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {size} '
    return "\n".join(
        [
            f'{start}role="img" font-family="system-ui, sans-serif" font-size="12" fill="{INK}">',
            f"<title>What each device holds: {name}</title>",
            f'<rect {size} rx="10" fill="{PAPER}"/>',
            *map(_stripes, sorted(shared)),
            *body,
            "</svg>\n",
        ]
    )


def holders(
    mesh: AnyMesh, spec: PartitionSpec, cuts: tuple[int, ...]
) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Returns which devices hold each piece of an array that is split by `spec`.

    Args:
        mesh: only its sizes count.
        spec: one entry a dimension.
        cuts: equal pieces along each dimension, a multiple of its shards.
    """
    held = defaultdict(list)
    for device, place in enumerate(_places(mesh)):
        mine = []
        for axes, cut in zip(spec, cuts, strict=True):
            shard, shards = 0, 1
            for axis in logical_to_mesh(axes):
                shard, shards = shard * mesh.shape[axis] + place[axis], shards * mesh.shape[axis]
            mine.append(range(shard * cut // shards, (shard + 1) * cut // shards))
        for piece in itertools.product(*mine):
            held[piece].append(device)
    return {piece: tuple(devices) for piece, devices in held.items()}


def _draw(
    panel: Panel, mesh: AnyMesh, rules: Rules, x: Length, y: Length, body: list[str], shared: set
):
    """Draws one array: which mesh axes split it, its pieces, and how many there are."""
    dims = panel.outer, panel.down, panel.across
    spec = rules(panel.first, *(logical for _, logical in dims))
    firsts, outer, tall, wide = (
        math.prod(mesh.shape[axis] for axis in logical_to_mesh(axes)) for axes in spec
    )
    # Eight or more, for many; microbatches are by default as many as stages.
    outer *= -(-8 // outer) if panel.outer[0] in ("layers", "experts") else 1
    shards = rules.shards("seq", mesh) if panel.across[0] == "positions" else 1
    wide = wide if shards == 1 else math.lcm(wide, 2 * shards)
    held, places = holders(mesh, spec, (firsts, outer, tall, wide)), zigzag(wide, shards)

    body.append(_text(x, y, panel.title, 'font-size="15" font-weight="600"'))
    x, y = x + 18, y + 28
    label = _split(panel.across[0], spec[3])
    if outer > 1:
        label = f"{_split(panel.outer[0], spec[1])} side by side, each: {label}"
    turned = f'text-anchor="end" transform="rotate(-90 {x - 8} {y})"'
    body += [_text(x, y - 8, label), _text(x - 8, y, _split(panel.down[0], spec[2]), turned)]
    pitch = (panel.columns * (COLUMN + COLUMN_GAP) - COLUMN_GAP - 10) / outer
    width, height, groups = (pitch - 8) / wide, BOX / tall, set()
    for matrix, row, column in itertools.product(range(outer), range(tall), range(wide)):
        groups.add(devices := held[0, matrix, row, column])
        left = x + matrix * pitch + int(places[column]) * width
        _piece(left, y + row * height, width, height, devices, mesh.size, body)
    shared |= {devices for devices in groups if 1 < len(devices) < mesh.size}

    num = len(next(iter(groups)))
    who = "one device" if num == 1 else f"{'all ' if num == mesh.size else ''}{num} devices"
    parts = f"{len(groups)} parts, each" if len(groups) > 1 else "whole"
    order = "" if shards == 1 else ", zigzag"
    body.append(_text(x, y + BOX + 18, f"{parts} on {who}{order}", f'fill="{FAINT}"'))


def _piece(
    x: Length,
    y: Length,
    width: Length,
    height: Length,
    devices: tuple[int, ...],
    size: int,
    body: list[str],
):
    """Draws one piece, with the numbers of its devices if they fit."""
    everywhere = len(devices) == size > 1
    fill = EVERYWHERE if everywhere else f"url(#on-{'-'.join(map(str, devices))})"
    fill = COLOURS[devices[0]] if len(devices) == 1 else fill
    body.append(_rect(x, y, width, height, f'fill="{fill}" stroke="{PAPER}" stroke-width="1.5"'))
    label = f"all {size}" if everywhere else ",".join(map(str, devices))
    if devices == tuple(range(devices[0], devices[-1] + 1)) and 2 < len(devices) < size:
        label = f"{devices[0]}-{devices[-1]}"
    long = 7 * len(label) + 6
    if long > width + 5 or height < 14:
        return
    x, y = x + width / 2, y + height / 2
    if 1 < len(devices) < size:
        body.append(_rect(x - long / 2, y - 8, long, 16, f'rx="8" fill="{PAPER}" opacity="0.85"'))
    body.append(_text(x, y + 4, label, 'text-anchor="middle"'))


def _devices(mesh: AnyMesh, body: list[str]) -> int:
    """Draws every device with its place along the axes; returns where the panels begin."""
    axes = [axis for axis, n in mesh.shape.items() if n > 1]
    line = max(12 * len(axes) + 12, 36)
    for device, place in enumerate(_places(mesh)):
        x, y = MARGIN + device % 8 * (WIDTH - 2 * MARGIN) / 8, 50 + device // 8 * line
        body.append(_rect(x, y, 26, 26, f'rx="5" fill="{COLOURS[device]}"'))
        body.append(_text(x + 13, y + 18, str(device), 'text-anchor="middle" font-size="14"'))
        for i, axis in enumerate(axes):
            down = y + (17 if len(axes) == 1 else 10) + 12 * i
            body.append(_text(x + 33, down, f"{axis} {place[axis]}", f'fill="{FAINT}"'))
    return 80 + line * -(-mesh.size // 8)


def _places(mesh: AnyMesh) -> list[dict[str, int]]:
    every = itertools.product(*map(range, mesh.shape.values()))
    return [dict(zip(mesh.shape, at, strict=True)) for at in every]


def _split(name: str, axes: Axes) -> str:
    by = ", ".join(logical_to_mesh(axes))
    return f'{name} <tspan fill="{ACCENT}" font-weight="600">{by}</tspan>' if by else name


def _stripes(devices: tuple[int, ...]) -> str:
    name, bands = "-".join(map(str, devices)), enumerate(COLOURS[device] for device in devices)
    return (
        f'<pattern id="on-{name}" width="{6 * len(devices)}" height="8" '
        'patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        + "".join(_rect(6 * i, 0, 6, 8, f'fill="{colour}"') for i, colour in bands)
        + "</pattern>"
    )


def _rect(x: Length, y: Length, width: Length, height: Length, style: str) -> str:
    return f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" {style}/>'


def _text(x: Length, y: Length, text: str, style: str = "") -> str:
    return f'<text x="{x:.4g}" y="{y:.4g}" {style}>{text}</text>'
