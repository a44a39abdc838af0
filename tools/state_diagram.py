"""The engine's life as a picture, drawn from the table of transitions."""

from collections import defaultdict
from math import hypot

from services.provisioner.domain.engine import EngineStatus as S
from services.provisioner.domain.operation import OperationKind
from services.provisioner.domain.transitions import OBSERVED, TRANSITIONS

# Where each status stands; None is no engine.
_PLACES: dict[S | None, tuple[int, int]] = {
    None: (80, 60),
    S.PROVISIONING: (450, 60),
    S.RUNNING: (290, 320),
    S.SLEEPING: (610, 320),
    S.STOPPED: (880, 320),
    S.FAILED: (450, 590),
    S.DESTROYING: (80, 480),
}
_WIDTH, _HEIGHT = 120, 44
# How far an arrow bows out, of its length.
_BOW = 0.1

Edge = tuple[S | None, S | None]


def edges() -> dict[Edge, list[str]]:
    """What leads from one status to another."""
    found: defaultdict[Edge, list[str]] = defaultdict(list)

    def add(source: S | None, target: S | None, label: str) -> None:
        if source is not target and label not in found[source, target]:
            found[source, target].append(label)

    for kind, transition in TRANSITIONS.items():
        name = kind.replace("_", " ")
        # Every status leads there; one arrow says it.
        sources = {S.RUNNING} if kind is OperationKind.DESTROY else transition.sources or {None}
        for source in sorted(sources, key=str):
            add(source, transition.during, "destroy (from every status)" if kind is OperationKind.DESTROY else name)
        stays = transition.during in sources
        add(transition.during, transition.success, name if stays else "done")
        add(transition.during, transition.failure, f"{name} fails")
    for (source, target), label in OBSERVED.items():
        add(source, target, label)
    return dict(found)


def svg() -> str:
    """The picture, with every arrow labelled by the operations that it stands for."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 630" font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">',
        '<path d="M0 0 10 5 0 10z" fill="#456"/></marker></defs>',
        '<rect width="960" height="630" fill="white"/>',
    ]
    for (source, target), labels in edges().items():
        parts += _arrow(_PLACES[source], _PLACES[target], labels)
    for status, (x, y) in _PLACES.items():
        left, top = x - _WIDTH // 2, y - _HEIGHT // 2
        dash = ' stroke-dasharray="5 4"' if status is None else ""
        parts.append(
            f'<rect x="{left}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" rx="10" fill="#eef4fb"'
            f' stroke="#456"{dash}/>'
        )
        parts.append(
            f'<text x="{x}" y="{y + 5}" text-anchor="middle" font-weight="bold">{status or "no engine"}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _arrow(start: tuple[int, int], end: tuple[int, int], labels: list[str]) -> list[str]:
    (x1, y1), (x2, y2) = start, end
    length = hypot(x2 - x1, y2 - y1)
    # To its own right, so that there and back do not lie on each other.
    normal = (-(y2 - y1) / length, (x2 - x1) / length)
    bow = 2 * _BOW * length
    middle = ((x1 + x2) / 2 + normal[0] * bow, (y1 + y2) / 2 + normal[1] * bow)
    tail, tip = _border(start, middle), _border(end, middle)
    curve = f"M{tail[0]:.0f} {tail[1]:.0f}Q{middle[0]:.0f} {middle[1]:.0f} {tip[0]:.0f} {tip[1]:.0f}"
    lines = [f'<path d="{curve}" fill="none" stroke="#456" marker-end="url(#tip)"/>']
    x = (tail[0] + 2 * middle[0] + tip[0]) / 4
    y = (tail[1] + 2 * middle[1] + tip[1]) / 4 - 7 * (len(labels) - 1)
    for index, label in enumerate(labels):
        lines.append(
            f'<text x="{x:.0f}" y="{y + 15 * index + 4:.0f}" text-anchor="middle" stroke="white" stroke-width="4"'
            f' paint-order="stroke" fill="#234">{label}</text>'
        )
    return lines


def _border(center: tuple[float, float], towards: tuple[float, float]) -> tuple[float, float]:
    """Where a line from a box's centre leaves the box."""
    dx, dy = towards[0] - center[0], towards[1] - center[1]
    scale = min(_WIDTH / 2 / abs(dx) if dx else 9e9, _HEIGHT / 2 / abs(dy) if dy else 9e9)
    return center[0] + dx * scale, center[1] + dy * scale
