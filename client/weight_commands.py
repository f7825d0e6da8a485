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
    typer.Option("--module", metavar="NAME", help="Only this module; repeat the option for several."),
]


@app.command()
def push(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", show_default=False)],
    url: Annotated[str, typer.Argument(metavar="URL", envvar="SAFELIGHT_URL", show_default=False)],
    module: Modules = None,
    version: Annotated[str | None, typer.Option(help="The version of the new weights; by default counted up.")] = None,
    mode: Annotated[
        Literal["wait", "abort", "in_place"],
        typer.Option(help="Running requests finish first, are aborted, or continue with the new weights."),
    ] = "wait",
    verify: Annotated[bool, typer.Option(help="Compare the server's tensors with the files afterwards.")] = True,
    incomplete: Annotated[
        bool, typer.Option("--partial", help="DIR need not have every tensor of its modules.")
    ] = False,
    api_key: ApiKey = None,
) -> None:
    """Write safetensors weights into the model of the server at URL; all of them or none.

    DIR is the directory of a pipeline or of one module. For one module's DIR, or a FILE, --module names the module.
    """
    paths = module_paths(path, module or ())
    warnings.simplefilter("ignore", OffPolicy)  # the server's adapters are logged too
    with (
        Client(url, api_key=api_key) as client,
        PushView(standard_error(), paths) as view,
        client.weights.begin(
            version, list(paths), mode, verify=verify, require_complete=path.is_dir() and not incomplete
        ) as begun,
    ):
        for name, place in paths.items():
            begun.update(place, target_module=name, on_progress=partial(view.show, name))
    assert begun.result is not None, "a command runs outside a process group, so it sends"
    written = ", ".join(f"{name} {count}" for name, count in begun.result.updated.items())
    _print(f"{begun.result.weight_version}  {written} tensors  {begun.result.elapsed_s:.2f} s")


@app.command()
def checksum(
    path: Annotated[Path, typer.Argument(metavar="DIR|FILE", show_default=False)],
    module: Modules = None,
    detail: Annotated[bool, typer.Option("--detail", help="Print every tensor's digest, dtype and shape too.")] = False,
    like: Annotated[
        str | None, typer.Option(metavar="URL", help="Cast tensors to the dtypes of the server at URL first.")
    ] = None,
    api_key: ApiKey = None,
) -> None:
    """Print the SHA-256 of each module's weights, equal to that of a server that loaded them.

    A server casts weights to its --dtype; --like casts as the server at URL does.
    """
    with standard_error().status("reading"):
        stored = None if like is None else _of_server(like, list(module_paths(path, module or ())), api_key)
        found = files.checksum(path, module or (), detail=detail, like=stored)
    _report_casts(found)
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

    A file, or one module's directory, is compared with that module of the other side. Files compared with a server are
    first cast to its dtypes. The exit status is 0 if all tensors are equal, 1 if some differ, and 2 if A and B cannot
    be compared.
    """
    try:
        with standard_error().status("reading"):
            wanted = module or _own_name(a) or _own_name(b)
            left, right = _both(a, b, wanted, api_key)
    except (SafelightError, OSError) as error:
        complain(error)
        raise typer.Exit(2) from None
    _report_casts(left)
    _report_casts(right)
    differences = list(_differences(left, right))
    for line in differences:
        _print(line)
    raise typer.Exit(1 if differences else 0)


def _is_address(source: str) -> bool:
    return "://" in source


def _own_name(source: str) -> list[str]:
    name = None if _is_address(source) else own_name(Path(source))
    return [] if name is None else [name]


def _both(
    a: str, b: str, modules: Sequence[str], api_key: str | None
) -> tuple[dict[str, ModuleChecksum], dict[str, ModuleChecksum]]:
    """Checksums of ``a`` and ``b``; if one is a server, the other's files are cast to its dtypes."""
    for source in (a, b):
        if not _is_address(source) and not Path(source).exists():
            raise InvalidRequest(
                f"{source} does not exist: give a directory, a file, or a server's address with http://."
            )
    servers = {source: _of_server(source, modules, api_key) for source in (a, b) if _is_address(source)}
    like = next(iter(servers.values()), None)
    left, right = (
        servers[source] if source in servers else files.checksum(Path(source), modules, detail=True, like=like)
        for source in (a, b)
    )
    return left, right


def _of_server(url: str, modules: Sequence[str], api_key: str | None) -> dict[str, ModuleChecksum]:
    with Client(url, api_key=api_key) as client:
        return client.weights.checksum(modules or None, detail=True)


def _report_casts(found: dict[str, ModuleChecksum]) -> None:
    """Print the casts on standard error; the results are on standard output."""
    for name, module in found.items():
        for (given, held), count in module.cast.items():
            line = f"{name}: {count} tensors of {_short(given)} as {_short(held)}, as the server stores them"
            standard_error().print(line, markup=False, highlight=False, soft_wrap=True)


def _differences(a: dict[str, ModuleChecksum], b: dict[str, ModuleChecksum]) -> Iterator[str]:
    """Yield a line for every tensor that differs, and for every module that one side lacks."""
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
    return f"{_short(tensor.dtype)} {list(tensor.shape)}"


def _short(dtype: str) -> str:
    return dtype.removeprefix("torch.")


def _print(line: str) -> None:
    Console(soft_wrap=True, highlight=False, markup=False).print(line)
