"""``torch.Generator("cuda")`` of a played device; its numbers are the CPU's."""

from __future__ import annotations

from typing import Any

import torch

_Generator = torch.Generator
_of_devices: set[int] = set()
"""Generators of devices by address, as an operator receives another Python object of the same generator."""


class PlayedGenerator(_Generator):
    _index = 0

    def __new__(cls, device: Any = "cuda") -> PlayedGenerator:
        made: PlayedGenerator = super().__new__(cls, "cpu")
        made._index = torch.device(device).index or 0
        _of_devices.add(made._cdata)
        return made

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self._index)


class _AnyGenerator(type(_Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _Generator)

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return PlayedGenerator(device) if torch.device(device).type == "cuda" else _Generator(device)


def is_of_cpu(value: Any) -> bool:
    return isinstance(value, _Generator) and value._cdata not in _of_devices


def install_generators() -> None:
    torch.Generator = _AnyGenerator("Generator", (), {})  # type: ignore[misc, assignment]
