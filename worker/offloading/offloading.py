"""``--offload``: components rest in host memory, and at most one is on the device.

The host's copy is the truth: before every operation, all tensors are there, so that layouts, updates, undo logs and
digests find them as they find those of a model on a CPU. Nothing writes to the device's copies, which are dropped.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...protocol.errors import StartFailed
from ...protocol.forward_options import ForwardOptions
from ...protocol.replicas import Offloaded
from ..forward.batch import Forward
from ..internals.blocks import NoBlocks, repeated_blocks
from ..pipelines.components import DENOISERS
from .block_stream import BlockStream
from .host_copy import HostCopy
from .overlay import become_offloaded
from .pinned_memory import PinnedMemory, aligned

log = logging.getLogger(__name__)


def check_offload(options: ForwardOptions, device: torch.device) -> None:
    """Raise ``StartFailed`` where there is no other memory to offload to, or weights have to stay in their places."""
    kind = options.offload
    if kind != "off" and options.compile == "on":
        raise StartFailed("--compile on needs weights that stay where they are; leave --offload or --compile out.")
    if kind != "off" and device.type != "cuda":
        raise StartFailed(
            f"--offload {kind} moves weights between host memory and a GPU, and the model runs on {device}, where they "
            "are in host memory anyway; leave it out."
        )


class OffloadedPart:
    """A component in host memory: its blocks, which come to the device one by one, and the rest, which comes whole."""

    def __init__(
        self,
        component: nn.Module,
        blocks: Sequence[nn.Module],
        device: torch.device,
        stay: set[int],
        memory: PinnedMemory,
    ) -> None:
        self._device = device
        self._buffer: torch.Tensor | None = None
        sizes = [sum(tensor.nbytes for tensor in _tensors(block)) for block in blocks]
        if 2 * max(sizes, default=0) >= sum(sizes):
            blocks = []  # two of them are all of them
        shared = stay | _in_several(blocks)
        copies = [HostCopy([one for one in _tensors(block) if id(one) not in shared], memory) for block in blocks]
        streamed = {id(tensor) for block in blocks for tensor in _tensors(block)} - shared
        self._rest = HostCopy([one for one in _tensors(component) if id(one) not in streamed | stay], memory)
        self._blocks = BlockStream(blocks, copies, device) if blocks else None
        self.sizes = Offloaded(
            host_bytes=self._rest.nbytes + sum(copy.nbytes for copy in copies),
            device_bytes=self._rest.nbytes + (0 if self._blocks is None else self._blocks.buffer_bytes),
            streamed_blocks=len(blocks),
        )
        become_offloaded(component, device)

    def fetch(self) -> None:
        if self._buffer is None:
            self._buffer = torch.empty(self._rest.nbytes, dtype=torch.uint8, device=self._device)
            self._rest.copy_to(self._buffer)
        self._rest.use(self._buffer)  # a request that writes to components leaves them as they were before it

    def rest(self) -> None:
        self._rest.rest()
        self._buffer = None
        if self._blocks is not None:
            self._blocks.free()


class Offloading:
    """A stage that brings a forward's component to the device, in the place of the one that was there."""

    name = "offload"

    def __init__(self, components: Mapping[str, nn.Module], device: torch.device, *, by_block: bool) -> None:
        uses = Counter(id(tensor) for component in components.values() for tensor in _tensors(component))
        stay = {tensor for tensor, number in uses.items() if number > 1}
        every = {id(tensor): tensor for component in components.values() for tensor in _tensors(component)}
        self.shared = [tensor for key, tensor in every.items() if key in stay]
        """The tensors that several components share, which stay on the device."""
        self._device = device
        self._present: str | None = None
        blocks = {name: _blocks(name, component) if by_block else [] for name, component in components.items()}
        memory = PinnedMemory(_bytes(components.values(), stay))
        try:
            self.parts = {
                name: OffloadedPart(component, blocks[name], device, stay, memory)
                for name, component in components.items()
            }
        except OSError as error:
            raise StartFailed(f"--offload: there is too little page-locked host memory ({error}).") from error
        for tensor in self.shared:
            tensor.data = tensor.data.to(device)
        for name, sizes in self.sizes.items():
            log.info(
                "%s rests on the host with %.1f MB, and takes %.1f MB of %s in its forwards%s",
                *(name, sizes.host_bytes / 1e6, sizes.device_bytes / 1e6, device),
                f", two of its {sizes.streamed_blocks} blocks at a time" if sizes.streamed_blocks else "",
            )
        log.info("--offload takes %.1f MB of page-locked host memory", memory.nbytes / 1e6)

    @property
    def sizes(self) -> dict[str, Offloaded]:
        return {name: part.sizes for name, part in self.parts.items()}

    def __call__(self, forward: Forward, proceed: Callable[[], list[Any]]) -> list[Any]:
        with self.present(forward.component.partition(".")[0]):
            return proceed()

    @contextmanager
    def present(self, name: str) -> Iterator[None]:
        """Within this context, and until another one is needed, the component ``name`` is on the device."""
        if name in self.parts:
            if self._present not in (None, name):
                self.rest()
            self.parts[name].fetch()
            self._present = name
        yield

    def rest(self) -> None:
        """Have all tensors in host memory, which may then be written to.

        Also those of components that are not present: a request that restores what it found may have found them there.
        """
        if self._present is not None:
            torch.cuda.synchronize(self._device)  # copies that were begun still read from there
        for part in self.parts.values():
            part.rest()
        self._present = None


def _blocks(name: str, component: nn.Module) -> list[nn.Module]:
    """The repeated blocks in the order of the component; none in one that has none, such as a VAE.

    Raises ``StartFailed`` for a denoiser without blocks, as nothing would be streamed.
    """
    try:
        return [block for found in repeated_blocks(component) for block in found.modules.values()]
    except NoBlocks as reason:
        if name in DENOISERS:
            raise StartFailed(f"--offload block is impossible for {name}: {reason}; use component.") from reason
        return []


def _in_several(blocks: Sequence[nn.Module]) -> set[int]:
    """The tensors that several blocks share."""
    uses = Counter(id(tensor) for block in blocks for tensor in _tensors(block))
    return {tensor for tensor, number in uses.items() if number > 1}


def _bytes(components: Iterable[nn.Module], stay: set[int]) -> int:
    """Bytes of the tensors that rest on the host."""
    tensors = (tensor for component in components for tensor in _tensors(component))
    return sum(aligned(tensor.nbytes) for tensor in tensors if id(tensor) not in stay)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    """The module's parameters and buffers, each once."""
    return list({id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}.values())
