"""The router seam: take the place of ``torch.topk`` inside a model's own router, and nothing else.

The router's code still scores, gathers, normalises and scales, so one seam serves softmax, sigmoid, biased and scaled
routers alike. Group-limited routers call ``topk`` for their groups first; those calls have another shape or another k
and pass through.

There are two ways to see what a router calls. A ``TorchFunctionMode`` sees every call of torch, wherever it is made,
and costs as much as a budget's own work in a layer. The router's code over names of ours (`overlay.py`) sees what its
forward calls by name, and costs little. Where an audit finds that it sees the same, it takes the mode's place.

Where a kernel does all that follows the logits, the seam ends the router's forward once it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from .overlay import rebound
from .routing import Routing

_TOPK: set[Callable[..., Any]] = {torch.topk, torch.Tensor.topk}
_AFFINITIES: set[Callable[..., Any]] = {
    torch.softmax,
    torch.sigmoid,
    torch.Tensor.softmax,
    torch.Tensor.sigmoid,
    torch.nn.functional.softmax,
    torch.nn.functional.sigmoid,
}
"""What makes affinities of a router's logits."""


class Selection(Protocol):
    """A policy: from the router's own choice for T rows to the K experts of each."""

    def __call__(self, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (values [T, K], indices [T, K]) in the router's place; the values are new tensors."""
        ...


class Replacement(Protocol):
    """All that follows a router's logits, in one step."""

    def __call__(self, logits: torch.Tensor, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the router's (logits or affinities [T, E], weights [T, K], indices [T, K]) for ``logits`` [T, E].

        ``args`` are the router's own.
        """
        ...


@dataclass(frozen=True, slots=True)
class Observed:
    """One run of a router."""

    logits: torch.Tensor
    """[T, E] what it first scores or selects by."""
    selects_logits: bool
    """Whether it selects by its logits, before any softmax or sigmoid."""
    routing: Routing
    """Its own choice, as a selection is told of it."""
    result: Any
    """What it returned."""


class _LogitsReached(Exception):  # noqa: N818
    """Ends a router's forward."""

    def __init__(self, logits: torch.Tensor, *, selects: bool) -> None:
        super().__init__()
        self.logits, self.selects = logits, selects


class _Calls:
    """What one run of a router has called so far, and what its selection makes of it."""

    __slots__ = ("affinities", "ends_at_logits", "hits", "in_groups", "num_experts", "routing", "selection", "top_k")

    def __init__(self, num_experts: int, top_k: int) -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.begin(None)

    def begin(self, selection: Selection | None) -> None:
        """Forget an earlier run; ``selection`` chooses in the next one."""
        self.selection = selection
        self.affinities: torch.Tensor | None = None
        self.routing: Routing | None = None
        self.hits = 0
        self.in_groups = False
        self.ends_at_logits = False

    def begins(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Take note of a watched call before it is made; raise `_LogitsReached` if the run is to end at its logits."""
        if self.ends_at_logits:
            numbers = args[0] if args else kwargs["input"]
            if numbers.dim() == 2 and numbers.shape[-1] == self.num_experts:
                raise _LogitsReached(numbers, selects=function in _TOPK)

    def scored(self, result: torch.Tensor) -> None:
        """Take note of a softmax or sigmoid."""
        if result.dim() == 2 and result.shape[-1] == self.num_experts:
            self.affinities = result

    def chosen(self, result: Any, args: Any, kwargs: Any) -> Any:
        """Return what a call of ``topk`` is to return, in place of its own ``result``."""
        scores = args[0] if args else kwargs["input"]
        k = args[1] if len(args) > 1 else kwargs["k"]
        if scores.dim() != 2 or scores.shape[-1] != self.num_experts or k != self.top_k:
            self.in_groups = True
            return result
        self.hits += 1
        values, ids = result
        if self.affinities is None:  # it selects logits, and weighs those it selected
            routing = Routing(scores, scores.softmax(-1), values, ids, in_groups=False)
        else:
            routing = Routing(scores, self.affinities, values, ids, self.in_groups)
        if self.selection is None:
            self.routing = routing
            return result
        return self.selection(routing)

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` of torch as a router is to find it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.begins(function, args, kwargs)
            result = function(*args, **kwargs)
            if function in _TOPK:
                return self.chosen(result, args, kwargs)
            self.scored(result)
            return result

        return watched


class _Mode(TorchFunctionMode):
    def __init__(self, calls: _Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _TOPK or func in _AFFINITIES:
            self.calls.begins(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _TOPK:
            return self.calls.chosen(result, args, kwargs)
        if func in _AFFINITIES:
            self.calls.scored(result)
        return result


class RouterSeam:
    """Stands around one router module's forward; free of cost while no selection is installed and not auditing.

    An audited call raises ``ValueError`` for a router that does not call ``topk`` over its experts exactly once, and
    finds out whether overlaid names see all of it.
    """

    def __init__(self, router: torch.nn.Module, num_experts: int, top_k: int) -> None:
        self.router, self.num_experts, self.top_k = router, num_experts, top_k
        self.selection: Selection | None = None
        self.replacement: Replacement | None = None
        """Takes the place of the selection, and of all else that follows the logits."""
        self.audit = False
        self.audited_args: tuple[Any, ...] | None = None
        """What an audited call was given, if by position alone."""
        self._calls = _Calls(num_experts, top_k)
        self._forward: Callable[..., Any] = router.forward
        self._overlaid: Callable[..., Any] | None = None
        router.forward = self._call

    @property
    def is_overlaid(self) -> bool:
        """Whether an audit found that the router can be steered by the names that its forward calls."""
        return self._overlaid is not None

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.audit:
            result = self._under_mode(None, *args, **kwargs)
            self._overlaid = self._audited(result, *args, **kwargs)
            self.audited_args = None if kwargs else args
        if self.replacement is not None:
            return self.replacement(self._logits(*args, **kwargs).logits, args)
        if self.selection is None:
            return self._forward(*args, **kwargs)
        if self._overlaid is None:
            return self._under_mode(self.selection, *args, **kwargs)
        self._calls.begin(self.selection)
        result = self._overlaid(*args, **kwargs)
        self._check_hits()
        return result

    def observe(self, *args: Any) -> Observed:
        """Run the router by itself; raise ``ValueError`` if it scores and selects nothing by logits."""
        found = self._logits(*args)
        result = self._under_mode(None, *args)
        routing, self._calls.routing = self._calls.routing, None
        assert routing is not None, "it has selected"
        return Observed(found.logits, found.selects, routing, result)

    def _logits(self, *args: Any, **kwargs: Any) -> _LogitsReached:
        self._calls.begin(None)
        self._calls.ends_at_logits = True
        try:
            if self._overlaid is None:
                with _Mode(self._calls):
                    self._forward(*args, **kwargs)
            else:
                self._overlaid(*args, **kwargs)
        except _LogitsReached as found:
            return found
        raise ValueError(f"model: its router makes nothing of logits over {self.num_experts} experts")

    def _under_mode(self, selection: Selection | None, *args: Any, **kwargs: Any) -> Any:
        self._calls.begin(selection)
        with _Mode(self._calls):
            result = self._forward(*args, **kwargs)
        self._check_hits()
        return result

    def _check_hits(self) -> None:
        if self._calls.hits != 1:
            raise ValueError(
                f"model: its router calls topk over {self.num_experts} experts {self._calls.hits} times, expected "
                "once; its expert selection cannot be steered"
            )

    def _audited(self, expected: Any, *args: Any, **kwargs: Any) -> Callable[..., Any] | None:
        """Return the router's forward over names of ours; None unless it sees and returns what it did in the mode."""
        seen = self._calls.routing
        overlaid = rebound(self._forward, {function: self._calls.watched(function) for function in _TOPK | _AFFINITIES})
        if overlaid is None:
            return None
        self._calls.begin(None)
        result = overlaid(*args, **kwargs)
        found, self._calls.routing = self._calls.routing, None
        if found is None or seen is None or self._calls.hits != 1 or found.in_groups != seen.in_groups:
            return None
        pairs = [(getattr(found, name), getattr(seen, name)) for name in ("scores", "affinities", "values", "ids")]
        return overlaid if _same(pairs) and _same(zip(result, expected, strict=True)) else None


def _same(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(one, other) for one, other in pairs)
