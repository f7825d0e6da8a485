"""Encode-only requests: a pipeline's call up to its first denoising, and what its ``encode_prompt`` returned."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ...protocol.errors import InvalidRequest
from ...protocol.generation import EncodingResult
from ..crossing.call import Call
from ..crossing.chain import Proceed
from ..crossing.interceptors import is_of_denoiser

METHOD = "encode_prompt"


class ReachedDenoiser(BaseException):
    """The prompt is encoded. Not an ``Exception``, so that no pipeline's ``except Exception`` catches it."""


def stop_at_denoiser(call: Call, proceed: Proceed) -> Any:
    """An interceptor that ends the pipeline's call at the denoiser's first one."""
    if is_of_denoiser(call):
        raise ReachedDenoiser
    (answer,) = proceed(call)
    return answer


def encode(pipeline: DiffusionPipeline, arguments: dict[str, Any], returns: EncodingResult) -> dict[str, torch.Tensor]:
    """Call ``pipeline``, a fork whose calls pass :func:`stop_at_denoiser`, and return the embeddings, if asked for."""
    kept = Embeddings(pipeline) if returns == "embeddings" else None
    with suppress(ReachedDenoiser):
        pipeline(**arguments)
    return {} if kept is None else kept.tensors


def values(embeddings: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """All floating-point values of ``embeddings``, which must be finite."""
    floats = [tensor.to(device).flatten() for tensor in embeddings.values() if tensor.is_floating_point()]
    return torch.cat(floats) if floats else torch.empty(0)


class Embeddings:
    """Keeps what ``encode_prompt`` returns to the pipeline's own ``__call__``."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        """Watch ``pipeline``, a fork. Raises ``InvalidRequest`` if its class has no ``encode_prompt``."""
        cls = type(pipeline)
        if not hasattr(cls, METHOD):
            raise InvalidRequest(
                f"{cls.__name__} has no {METHOD}, so there are no embeddings to return; ask for return = cache.",
                field="return",
            )
        self.tensors: dict[str, torch.Tensor] = {}
        self._names = returned_names(cls)
        self._encode_prompt = getattr(pipeline, METHOD)
        vars(pipeline)[METHOD] = self._encode

    def _encode(self, *args: Any, **kwargs: Any) -> Any:
        returned = self._encode_prompt(*args, **kwargs)
        values = returned if isinstance(returned, tuple) else (returned,)
        names = self._names if len(self._names) == len(values) else [f"output_{n}" for n in range(len(values))]
        for name, value in zip(names, values, strict=True):
            for place, leaf in _tensors(value).items():
                self.tensors[self._free(name + place)] = leaf.detach()
        return returned

    def _free(self, name: str) -> str:
        """A name that no earlier call has: pipelines that call twice encode the negative prompt second."""
        while name in self.tensors:
            name = f"negative_{name}"
        return name


def returned_names(cls: type[DiffusionPipeline]) -> list[str]:
    """The variables that ``encode_prompt`` returns, by its source: ``prompt_embeds``, ``pooled_prompt_embeds``, …

    Of several return statements the last one counts; of an expression, the variable that comes first in it. Empty if a
    value has none.
    """
    method = ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, METHOD)))).body[0]
    returned = [node.value for node in _own_nodes(method) if isinstance(node, ast.Return) and node.value is not None]
    last = max(returned, key=_place, default=ast.Tuple([]))
    values = last.elts if isinstance(last, ast.Tuple) else [last]
    variables = {node.arg for node in ast.walk(method) if isinstance(node, ast.arg)} - {"self"}
    variables |= {node.id for node in _names(method) if isinstance(node.ctx, ast.Store)}
    found = [[node.id for node in _names(value) if node.id in variables] for value in values]
    return [names[0] for names in found] if all(found) else []


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of ``function`` without those of functions within it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            yield node
            yield from _own_nodes(node)


def _names(node: ast.AST) -> list[ast.Name]:
    """The names within ``node``, in the order of the source."""
    return sorted((one for one in ast.walk(node) if isinstance(one, ast.Name)), key=_place)


def _place(node: ast.expr) -> tuple[int, int]:
    return (node.lineno, node.col_offset)


def _tensors(value: Any) -> dict[str, torch.Tensor]:
    """The tensors in a returned value, by a suffix for its name: empty, or a list's index."""
    if isinstance(value, list | tuple):
        return {f".{index}": one for index, one in enumerate(value) if isinstance(one, torch.Tensor)}
    return {"": value} if isinstance(value, torch.Tensor) else {}
