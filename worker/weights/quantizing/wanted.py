"""The option ``--quantize``: a scheme for the denoisers, or one for each named component."""

from __future__ import annotations

from collections.abc import Iterable

from ....protocol.errors import StartFailed
from ...pipelines.components import DENOISERS
from .schemes import SCHEMES, Scheme


def wanted_schemes(option: str, components: Iterable[str]) -> dict[str, Scheme]:
    """The scheme of each component that is quantized. Raises ``StartFailed`` for unknown names."""
    known = list(components)
    if option in SCHEMES:
        return {name: SCHEMES[option] for name in known if name in DENOISERS}
    found: dict[str, Scheme] = {}
    for part in filter(None, option.split(",")):
        name, given, scheme = part.partition("=")
        if not given or scheme not in SCHEMES:
            raise StartFailed(
                f"--quantize {option}: {part!r} is neither a scheme nor `component=scheme`; schemes are "
                f"{', '.join(SCHEMES)}, as in `int8` or `transformer=int8,text_encoder_2=fp8`."
            )
        if name not in known:
            raise StartFailed(
                f"--quantize {option}: the model has no component {name!r} with weights; it has {', '.join(known)}."
            )
        found[name] = SCHEMES[scheme]
    return found
