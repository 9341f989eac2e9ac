"""Operators that replace tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .dispatch import NAMESPACE

__all__ = ["in_place_op"]

_LIBRARIES: dict[str, torch.library.Library] = {}


class _Ended(torch.autograd.Function):
    """The first `count` tensors as they are, as if they came from the others; nothing goes back."""

    @staticmethod
    def forward(ctx, name, count, *tensors):
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *cotangents):
        raise NotImplementedError(
            f"{ctx.name} replaces its state and has no gradient; call it under torch.no_grad(), or the operator of "
            "whole sequences, which has one."
        )


def in_place_op(name: str, mutates_args: Iterable[str]) -> Callable[[Callable], Callable]:
    """As `torch.library.custom_op`, for a function of positional arguments that has no gradient.

    In every call `custom_op` makes the list of the schema's arguments anew for each of them, to count up the versions
    of what is replaced. With 29 arguments the host needs more for that than for two launches; here places are known.

    Args:
        name: of the operator, without the namespace.
        mutates_args: names of the tensors that are replaced.

    Returns:
        A decorator for a function that returns a tensor or several; what it returns is called by position and has
        `register_fake`. A backward pass through the outputs raises NotImplementedError.
    """

    def register(function: Callable) -> Callable:
        # A module that is loaded again defines its operators again; nobody else holds on to the library of the first.
        _LIBRARIES.pop(name, None)
        library = _LIBRARIES[name] = torch.library.Library(NAMESPACE, "FRAGMENT")
        replaced = tuple(mutates_args)
        places = [list(inspect.signature(function).parameters).index(argument) for argument in replaced]
        library.define(name + torch.library.infer_schema(function, mutates_args=replaced))

        def counted(*args):
            result = function(*args)
            for place in places:
                if args[place] is not None and not args[place].is_inference():
                    increment_version(args[place])
            return result

        library.impl(name, counted, "CompositeExplicitAutograd")
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default

        def call(*args):
            result = operator(*args)
            if not torch.is_grad_enabled():
                return result
            leaves = [t for t in args if isinstance(t, Tensor) and t.requires_grad]
            if not leaves:
                return result
            if isinstance(result, Tensor):
                return _Ended.apply(name, 1, result, *leaves)[0]
            return _Ended.apply(name, len(result), *result, *leaves)

        call.register_fake = lambda fake: torch.library.register_fake(
            f"{NAMESPACE}::{name}", fake, lib=_LIBRARIES[name]
        )
        return call

    return register
