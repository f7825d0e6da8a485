"""The parts of a weight update that take more than one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..formats.digests import STORED_DTYPES
from ..protocol.errors import NotFound, SafelightError
from . import calls, weight_calls
from .calls import Ask
from .endpoint import Endpoint
from .errors import TensorsDiffer
from .results import WeightUpdate
from .transports import Server, open_transport
from .weight_upload import Upload, UploadJob

Dtypes = dict[str, str]
"""The dtype of each tensor of a module on the server, named as in safetensors."""

_NAMED = 5
"""Names of differing tensors that an error lists."""


class WeightApi:
    def __init__(self, endpoint: Endpoint, ask: Ask) -> None:
        self._endpoint = endpoint
        self._ask = ask
        self._dtypes: dict[tuple[Path, str], Dtypes] = {}

    def send(
        self, job: UploadJob, fields: Mapping[str, Any], dtypes: Dtypes | None
    ) -> tuple[WeightUpdate, dict[str, str]]:
        """Return the last reply, and the digests of the tensors sent (empty without ``dtypes``)."""
        wanted = job.route
        if wanted is None and not self._endpoint.on_this_machine:
            wanted = "http"
        with open_transport(self._server(), wanted) as transport:
            upload = Upload(self._ask, transport, job, fields, dtypes)
            return upload.send(), upload.digests

    def abort(self, update_id: str, error: BaseException) -> None:
        """Abort an update after ``error``; if the abort fails too, add a note to ``error``."""
        try:
            self._ask(weight_calls.abort(update_id))
        except NotFound:
            pass  # the update has ended already
        except SafelightError as other:
            error.add_note(f"The abort of the update failed too; the server aborts it at its timeout: {other.message}")

    def dtypes(self, modules: Sequence[str]) -> dict[str, Dtypes]:
        """Dtypes by module. The server is asked once per module, because it computes digests for this reply."""
        server = self._server().shared  # unique to this run of the server
        unknown = [module for module in modules if (server, module) not in self._dtypes]
        checksums = self._ask(weight_calls.detailed_checksum(unknown)).modules if unknown else {}
        for module, checksum in checksums.items():
            known = {name: STORED_DTYPES[tensor.dtype] for name, tensor in checksum.tensors.items()}
            self._dtypes[server, module] = known | {alias: known[name] for alias, name in checksum.aliases.items()}
        return {module: self._dtypes.get((server, module), {}) for module in modules}

    def check(self, digests: Mapping[str, Mapping[str, str]]) -> None:
        """Compare digests by module and tensor name. Raises ``TensorsDiffer`` with the names of tensors that differ."""
        for module, expected in digests.items():
            try:
                self._ask(weight_calls.check(module, expected))
            except TensorsDiffer as differ:
                names = [*differ.missing, *differ.mismatched]
                shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
                message = f"{len(names)} of {len(expected)} tensors of {module} are not what was sent: {shown}."
                raise TensorsDiffer(message, differ.missing, differ.mismatched) from None

    def _server(self) -> Server:
        info = self._ask(calls.info())
        gpus = frozenset(gpu for model in info["models"] for gpu in model["gpus"])
        return Server(Path(info["shared_memory"]), gpus, info["world_size"])
