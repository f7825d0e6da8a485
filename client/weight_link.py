"""What an update of weights asks of a server, call by call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..formats.digests import STORED_DTYPES
from ..protocol.errors import NotFound, SafelightError
from ..protocol.operations import Barrier
from . import calls, weight_calls
from .calls import Call
from .checksum import ModuleChecksum
from .endpoint import Endpoint
from .errors import TensorsDiffer, decode
from .results import WeightUpdate
from .weight_routes import Server, open_route
from .weight_sending import Load, Sending

Dtypes = dict[str, str]
"""What a server holds each tensor of a module as, named as in safetensors."""

_NAMED = 5


class _Checksums(msgspec.Struct):
    modules: dict[str, ModuleChecksum]


class WeightLink:
    """``fetch`` makes a call and returns the answer's body."""

    def __init__(self, endpoint: Endpoint, fetch: Callable[[Call], bytes]) -> None:
        self._endpoint = endpoint
        self._fetch = fetch
        self._dtypes: dict[tuple[Path, str], Dtypes] = {}

    def send(self, load: Load, fields: Mapping[str, Any], dtypes: Dtypes | None) -> tuple[bytes, dict[str, str]]:
        """The last answer, and the digests of what was sent; those are empty without ``dtypes``."""
        wanted = load.route
        if wanted is None and not self._endpoint.on_this_machine:
            wanted = "http"
        with open_route(self._server(), wanted) as route:
            sending = Sending(self._fetch, route, load, fields, dtypes)
            return sending.send(), sending.digests

    def begin(self, version: str | None, modules: Sequence[str], mode: Barrier, timeout_s: float) -> str:
        """Returns the update's id."""
        update_id: str = self.document(weight_calls.begin(version, modules, mode, timeout_s))["update_id"]
        return update_id

    def commit(self, update_id: str, require_complete: bool) -> WeightUpdate:
        return self.updated(self._fetch(weight_calls.commit(update_id, require_complete)))

    def abort(self, update_id: str, error: BaseException) -> None:
        """End an update that ``error`` broke; where that fails too, ``error`` says what becomes of it."""
        try:
            self._fetch(weight_calls.abort(update_id))
        except NotFound:
            pass  # it has ended
        except SafelightError as other:
            error.add_note(f"The update could not be aborted either, and ends when its time is over: {other.message}")

    def document(self, call: Call) -> dict[str, Any]:
        return self._endpoint.document(self._fetch(call))

    def update_from_disk(self, call: Call) -> WeightUpdate:
        return self.updated(self._fetch(call))

    def updated(self, reply: bytes) -> WeightUpdate:
        done: WeightUpdate = decode(reply, WeightUpdate, self._endpoint.base_url)
        return done

    def checksums(self, modules: Sequence[str] | None) -> dict[str, ModuleChecksum]:
        """Of those of ``modules`` that the server has, with every tensor."""
        reply = self._fetch(weight_calls.checksum(modules, detail=True))
        told: _Checksums = decode(reply, _Checksums, self._endpoint.base_url)
        return told.modules

    def dtypes(self, modules: Sequence[str]) -> dict[str, Dtypes]:
        """By module. A server is asked once for each, because it computes digests with them."""
        server = self._server().shared  # which no other server has, nor this one when it is started again
        unknown = [module for module in modules if (server, module) not in self._dtypes]
        for module, told in self.checksums(unknown).items() if unknown else ():
            known = {name: STORED_DTYPES[tensor.dtype] for name, tensor in told.tensors.items()}
            self._dtypes[server, module] = known | {other: known[name] for other, name in told.aliases.items()}
        return {module: self._dtypes.get((server, module), {}) for module in modules}

    def check(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Compare tensors, by module. Raises ``TensorsDiffer`` with the names of those that are not so."""
        for module, expected in digests.items():
            try:
                self._fetch(weight_calls.check(module, expected))
            except TensorsDiffer as differ:
                names = [*differ.missing, *differ.mismatched]
                shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
                message = f"{len(names)} of {len(expected)} tensors of {module} are not what was sent: {shown}."
                raise TensorsDiffer(message, differ.missing, differ.mismatched) from None

    def _server(self) -> Server:
        told = self.document(calls.SERVER_INFO)
        gpus = frozenset(gpu for model in told["models"] for gpu in model["gpus"])
        return Server(Path(told["shared_memory"]), gpus, told["config"]["tp"] * told["config"]["replicas"])
