"""Live servers of the tiny FLUX, adapters for it, and what diffusers with peft draws with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.protocol.config import Config
from safelight.protocol.generation import Generate, Sample
from safelight.tests.effort import chosen
from safelight.tests.live import LiveServer
from safelight.tests.tiny import save
from safelight.tests.updates.trainer import DRAWING, Trainer
from safelight.tests.worker.lora.agreement import Made, Peft, arguments, write_adapter
from safelight.worker.model.model import load_model

ADAPTERS = (Made("first", 4, 2.0, seed=1), Made("second", 16, 24.5, ("attn",), seed=2), Made("third", 1, 1.0, seed=3))

Serve = Callable[..., AbstractContextManager[Trainer]]
Uses = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Adapters:
    """The directories of :data:`ADAPTERS`, and :meth:`drawn`, the references."""

    checkpoint: Path
    folder: Path
    peft: Peft
    call: dict[str, object]

    def path(self, nickname: str) -> str:
        return str(self.folder / nickname)

    def drawn(self, *uses: tuple[str, float]) -> torch.Tensor:
        call = dict(self.call) | {"generator": torch.Generator("cpu").manual_seed(1)}
        with torch.no_grad():
            return self.peft.draw(call, uses)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    folder = tmp_path_factory.mktemp("adapters")
    checkpoint = save("flux", folder)
    model = load_model(Config(model=str(checkpoint), device="cpu"))
    made = [(one, write_adapter(one, model.pipeline.transformer, folder)) for one in ADAPTERS]
    fields = {name: value for name, value in DRAWING.items() if name in Generate.__struct_fields__}
    asked = Generate(request_id="reference", samples=[Sample("a red circle", 1)], **fields)
    return Adapters(checkpoint, folder, Peft(checkpoint, made), arguments(model, asked))


@pytest.fixture(scope="session")
def serve(adapters: Adapters) -> Serve:
    """A ready server with such flags, all of its replicas ready."""

    @contextmanager
    def serving(*flags: str, tp: int = 1, ulysses: int = 1) -> Iterator[Trainer]:
        roots = ["--weights-roots", str(adapters.folder.parent)]
        ranks = ["--tp", str(tp), "--ulysses", str(ulysses)]
        with LiveServer(adapters.checkpoint, ["--threads", "1", *ranks, *roots, *flags]) as server:
            server.wait_ready()
            trainer = Trainer(server, adapters.checkpoint, tp * ulysses)
            trainer.wait_all_ready()
            yield trainer

    return serving


@pytest.fixture(scope="session")
def alone(serve: Serve) -> Iterator[Trainer]:
    with serve() as trainer:
        yield trainer


@pytest.fixture(scope="session")
def divided(serve: Serve) -> Iterator[Trainer]:
    """Two replicas of two ranks each."""
    with serve("--replicas", "2", tp=2) as trainer:
        yield trainer


@pytest.fixture(scope="session")
def split(serve: Serve) -> Iterator[Trainer]:
    """One replica of two ranks that share tokens."""
    with serve(ulysses=2) as trainer:
        yield trainer


@pytest.fixture(params=chosen("alone", nightly=["divided", "split"]))
def server(request: pytest.FixtureRequest) -> Iterator[Trainer]:
    """One of the three; adapters that a test leaves are unloaded."""
    found: Trainer = request.getfixturevalue(request.param)
    yield found
    for adapter in listed(found)["loaded_adapters"]:
        found.done("/v1/unload_lora", {"lora_nickname": adapter["nickname"]})


def listed(trainer: Trainer) -> dict[str, Any]:
    import httpx

    answer = httpx.get(f"{trainer.server.url}/v1/list_loras", timeout=60)
    assert answer.status_code == 200, answer.text
    reported: dict[str, Any] = answer.json()
    return reported
