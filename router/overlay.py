"""A method run over other globals: functions of torch that it calls by name are ours, and nothing else changes."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch

Function = Callable[..., Any]


class _Overlay:
    """A module, but for some of its attributes."""

    def __init__(self, module: types.ModuleType, own: Mapping[str, Any]) -> None:
        self.__dict__.update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def rebound(method: Function, replacements: Mapping[Function, Function]) -> Function | None:
    """Return ``method`` as it is, but that it finds ``replacements`` where its code names functions of torch.

    Names are those of the method's own module: ``torch.f``, ``torch.nn.functional.f``, ``F.f`` or ``f`` alone. What is
    called in another way (a tensor's method, a helper, behind a decorator) is not replaced. None for what is no method
    in Python. The module's globals are those of the moment.
    """
    function = getattr(method, "__func__", None)
    if not isinstance(function, types.FunctionType):
        return None
    functional = _Overlay(torch.nn.functional, _found(torch.nn.functional, replacements))
    nn = _Overlay(torch.nn, {"functional": functional})
    overlays: dict[int, Any] = {
        id(torch): _Overlay(torch, {**_found(torch, replacements), "nn": nn}),
        id(torch.nn): nn,
        id(torch.nn.functional): functional,
        **{id(original): ours for original, ours in replacements.items()},
    }
    names = {name: overlays.get(id(value), value) for name, value in function.__globals__.items()}
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return types.MethodType(copy, method.__self__)  # type: ignore[attr-defined]


def _found(module: types.ModuleType, replacements: Mapping[Function, Function]) -> dict[str, Function]:
    """Return the replacements of what ``module`` holds, by name."""
    return {
        original.__name__: ours
        for original, ours in replacements.items()
        if vars(module).get(original.__name__) is original
    }
