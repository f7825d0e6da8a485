"""The commands about weights: ``safelight push``, ``checksum`` and ``diff``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from ..protocol.errors import InvalidRequest, SafelightError
from . import checksum as files
from .adapter_warning import OffPolicy
from .checksum import ModuleChecksum, TensorChecksum
from .module_files import module_paths, own_name
from .options import ApiKey
from .sync_client import Client
from .terminal import PushView, complain, standard_error

app = typer.Typer()

Modules = Annotated[
    list[str] | None,
    typer.Option("--module", metavar="NAME", help="Only this module; may be given several times."),
]


@app.command()
def push(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", show_default=False)],
    url: Annotated[str, typer.Argument(metavar="URL", envvar="SAFELIGHT_URL", show_default=False)],
    module: Modules = None,
    version: Annotated[str | None, typer.Option(help="What the new weights are called; counted up by default.")] = None,
    mode: Annotated[
        Literal["wait", "abort", "in_place"],
        typer.Option(help="What becomes of requests that run: they end first, are ended, or go on."),
    ] = "wait",
    verify: Annotated[bool, typer.Option(help="Compare what the server then holds with the files.")] = True,
    api_key: ApiKey = None,
) -> None:
    """Write safetensors weights into the model that the server at URL serves; all of them or none.

    DIR is a pipeline's directory, or one module's own; then, and for a FILE, --module says which module it is for.
    """
    paths = module_paths(path, module or ())
    warnings.simplefilter("ignore", OffPolicy)  # it is logged too
    with (
        Client(url, api_key=api_key) as client,
        PushView(standard_error(), paths) as view,
        client.weights.begin(version, list(paths), mode, verify=verify) as begun,
    ):
        for name, place in paths.items():
            begun.update(place, target_module=name, on_progress=partial(view.show, name))
    assert begun.result is not None, "a command is no rank of a group"
    written = ", ".join(f"{name} {count}" for name, count in begun.result.updated.items())
    _print(f"{begun.result.weight_version}  {written} tensors  {begun.result.elapsed_s:.2f} s")


@app.command()
def checksum(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", show_default=False)],
    module: Modules = None,
    detail: Annotated[bool, typer.Option("--detail", help="Of every tensor too, with its dtype and shape.")] = False,
) -> None:
    """Print the SHA-256 of each module's weights, the same that a server answers which has loaded them."""
    with standard_error().status("reading"):
        found = files.checksum(path, module or (), detail=detail)
    for name, digests in found.items():
        _print(f"{digests.sha256}  {name}")
        for tensor, digest in digests.tensors.items():
            _print(f"{digest.sha256}  {name}.{tensor}  {_kind(digest)}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False)],
    module: Modules = None,
    api_key: ApiKey = None,
) -> None:
    """Name the tensors that differ between A and B: servers (http://…), directories or files.

    A directory of one module, or a file, is compared with that module of the other side. The exit status is 0 when all
    are equal, 1 when some differ, and 2 when they cannot be compared.
    """
    try:
        with standard_error().status("reading"):
            wanted = module or _own_name(a) or _own_name(b)
            left, right = (_of(source, wanted, api_key) for source in (a, b))
    except (SafelightError, OSError) as error:
        complain(error)
        raise typer.Exit(2) from None
    differences = list(_differences(left, right))
    for line in differences:
        _print(line)
    raise typer.Exit(1 if differences else 0)


def _is_address(source: str) -> bool:
    return "://" in source


def _own_name(source: str) -> list[str]:
    name = None if _is_address(source) else own_name(Path(source))
    return [] if name is None else [name]


def _of(source: str, modules: Sequence[str], api_key: str | None) -> dict[str, ModuleChecksum]:
    if not _is_address(source):
        if not Path(source).exists():
            raise InvalidRequest(f"{source} is no directory, no file, and no address, which has http:// before it.")
        return files.checksum(Path(source), modules, detail=True)
    with Client(source, api_key=api_key) as client:
        return client.weights.checksum(modules or None, detail=True)


def _differences(a: dict[str, ModuleChecksum], b: dict[str, ModuleChecksum]) -> Iterator[str]:
    """A line for every tensor that is not the same in ``a`` and ``b``, and for every module that one lacks."""
    for module in sorted({*a, *b}):
        if module not in a or module not in b:
            yield f"{module}  only in {'A' if module in a else 'B'}"
            continue
        left, right = a[module].tensors, b[module].tensors
        for name in sorted({*left, *right}):
            if name not in left or name not in right:
                yield f"{module}.{name}  only in {'A' if name in left else 'B'}"
            elif _kind(left[name]) != _kind(right[name]):
                yield f"{module}.{name}  {_kind(left[name])} in A, {_kind(right[name])} in B"
            elif left[name].sha256 != right[name].sha256:
                yield f"{module}.{name}  differs"


def _kind(tensor: TensorChecksum) -> str:
    return f"{tensor.dtype.removeprefix('torch.')} {list(tensor.shape)}"


def _print(line: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(line)
