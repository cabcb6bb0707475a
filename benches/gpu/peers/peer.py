"""What a peer is, how it is checked against float64, and how it is timed."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from reference import distance, reference
from shapes import Shape
from timing import cold_copies, graph_time

# What a 16-bit implementation may differ from float64, ‖out − reference‖ / ‖reference‖.
TOLERANCE = 3e-3


class UnsupportedShapeError(Exception):
    """The peer does not serve this shape."""


@dataclass
class Prepared:
    """Calls of a peer over several caches of the same shape.

    Attributes:
        calls: one for each cache; each returns the peer's output.
        q: queries, [batch, heads, q_len, head_dim].
        dense: K and V of the first cache as the peer must see them, [batch, kv_heads, tokens, head_dim].
        order: the peer's output as [batch, heads, q_len, head_dim].
    """

    calls: list[Callable[[], torch.Tensor]]
    q: torch.Tensor
    dense: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    order: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda out: out)


class DenseMemory:
    """Random fp16 elements for the caches of one shape, from which each peer takes what it needs.

    Attributes:
        shape: the shape.
        caches: float16 [copies, elements]; half of each, as fp8, still are together more than the L2 cache.
        q: queries, float16 [batch, heads, q_len, head_dim].
    """

    def __init__(self, shape: Shape, device="cuda"):
        self.shape = shape
        copies = cold_copies(shape.elements) if device == "cuda" else 1
        self.caches = torch.empty(copies, shape.elements, device=device, dtype=torch.float16)
        for cache in self.caches:
            cache.normal_()
        self.q = torch.randn(
            shape.batch, shape.heads, shape.q_len, shape.head_dim, device=device, dtype=torch.float16
        )

    def planes(self, copy):
        """K and V of one cache, [batch, kv_heads, tokens, head_dim] each."""
        s = self.shape
        return self.caches[copy].view(2, s.batch, s.kv_heads, s.tokens, s.head_dim)


class Peer:
    """Another implementation of decode attention.

    Attributes:
        name: how tables call it.
        holds: what its cache holds: "fp16", "fp8", "k4v2".
    """

    name: str
    holds: str = "fp16"

    def prepare(self, memory: DenseMemory) -> Prepared:
        """Make the calls for a shape.

        Raises:
            ImportError: the library is not installed.
            UnsupportedShapeError: it does not serve this shape.
        """
        raise NotImplementedError


def error(prepared: Prepared) -> float:
    """Distance of a peer's first output from float64 over its norm; NaN counts as infinity."""
    return distance(prepared.order(prepared.calls[0]()), reference(prepared.q, *prepared.dense()))


class Peers:
    """Times peers, each of which is first checked on a small shape of the same kind.

    Args:
        peers: the peers.
        report: takes what is missing.
    """

    def __init__(self, peers: list[Peer], report):
        self._peers = peers
        self._report = report
        self._checked: dict[tuple, bool] = {}

    def times(self, shape: Shape, stream, replays, skip=()) -> dict[str, dict]:
        """Median µs of every peer that serves the shape, by name, with what its cache holds."""
        found = {}
        memory = DenseMemory(shape)
        torch.cuda.synchronize()
        for peer in self._peers:
            if peer.name in skip:
                continue
            try:
                if not self._right(peer, shape):
                    continue
                with torch.cuda.stream(stream):
                    prepared = peer.prepare(memory)
                found[peer.name] = {
                    "holds": peer.holds,
                    "us": graph_time(prepared.calls, stream, replays=replays),
                }
            except Exception as problem:
                self._report.miss(peer.name, f"{shape}: {type(problem).__name__}: {problem}")
                if "\n" in str(problem).strip():
                    print(str(problem)[-2000:], flush=True)  # a compiler says why at the end
            prepared = None
            torch.cuda.empty_cache()
        return found

    def _right(self, peer, shape):
        """Whether the peer computes the right thing for these heads, head dim and query tokens."""
        small = Shape(shape.heads, shape.kv_heads, shape.head_dim, 2, 1024, shape.q_len)
        key = peer.name, small
        if key not in self._checked:
            # What breaks once is not tried again: compilers take their time to fail.
            self._checked[key] = False
            found = error(peer.prepare(DenseMemory(small)))
            torch.cuda.synchronize()
            self._checked[key] = found <= TOLERANCE
            if found > TOLERANCE:
                self._report.miss(peer.name, f"{small}: error {found:.1e} against float64")
            else:
                print(f"checked: {peer.name}, {small}: error {found:.1e} against float64", flush=True)
        return self._checked[key]


def fastest(times: dict[str, dict], holds: str = "fp16"):
    """Name and µs of the fastest peer of one kind; (None, None) if there is none."""
    found = [(entry["us"], name) for name, entry in times.items() if entry["holds"] == holds]
    us, name = min(found, default=(None, None))
    return name, us
