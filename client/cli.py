"""The command line ``safelight``. It starts without importing torch: the server does the computing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from .. import __version__
from ..process import programs
from ..process.programs import become
from ..protocol.errors import InvalidRequest, SafelightError
from ..protocol.output_formats import FORMATS
from . import options, weight_commands
from .endpoint import DEFAULT_TIMEOUT_S, DEFAULT_URL
from .errors import Unreachable
from .options import ApiKey, Url, takes_fields
from .private_server import PrivateServer
from .results import SUFFIXES, Generation, Output, Result
from .sync_client import Client
from .terminal import GenerationView, complain, server_table, standard_error

T = TypeVar("T")

READY_S = 1800.0
"""Seconds that a server may take to become ready: a large model may be read from a slow disk."""

_PASSED_ON = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Typer's settings of commands that exec another program, which parses the arguments and prints its own help."""

app = typer.Typer(
    name="safelight",
    help="Serve diffusion models, and generate with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(weight_commands.app)


def main() -> None:
    """Run the command; print an error as one sentence on standard error and exit with status 1."""
    try:
        app()
    except (SafelightError, OSError) as error:
        complain(error)
        sys.exit(1)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"safelight {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command(
    context_settings=_PASSED_ON,
    help="Serve a model; `safelight serve --help` lists the server's own options.",
    options_metavar="[MODEL] [OPTIONS]",
)
def serve(context: typer.Context) -> None:
    become(programs.SERVER, context.args)


@app.command(
    context_settings=_PASSED_ON,
    help="Compare a model's components with diffusers' own; `safelight verify --help` lists the options.",
    options_metavar="MODEL [OPTIONS]",
)
def verify(context: typer.Context) -> None:
    become(programs.VERIFICATION, context.args)


@app.command(help="Generate from PROMPT with a running server or, if none runs, with a private one.")
@takes_fields
def generate(
    prompt: options.Prompts,
    output: options.OutputFile = Path("out"),
    url: Url = None,
    api_key: ApiKey = None,
    model: options.Model = None,
    seed: options.Seeds = None,
    n: options.Count = 1,
    image: options.Images = None,
    lora: options.Adapters = None,
    extra: options.Extras = None,
    preview: options.Preview = False,
    preview_every: options.PreviewEvery = None,
    timeout: options.Timeout = DEFAULT_TIMEOUT_S,
    **settings: Any,
) -> None:
    notes = standard_error()
    own: dict[str, Any] = {
        "seed": _one_or_all(seed),
        "n": n,
        "image": _one_or_all(image),
        "lora": [_adapter(text) for text in lora] if lora else None,
        "output_format": _format_of(output),
        "preview_every": preview_every or (options.PREVIEW_EVERY if preview and notes.is_terminal else None),
        "extra": dict(_extra_argument(text) for text in extra or ()),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with _ready_client(notes, url, api_key, timeout, model) as client:
        generation = _draw(client, notes, prompt, own | settings)
    _save(generation, output)


@app.command(help="Show what a server serves, how it batches, and how busy it is.")
def info(
    url: Url = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    with Client(url or DEFAULT_URL, api_key=api_key) as client:
        found = client.info()
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        Console().print(server_table(client.base_url, found))


def _one_or_all(values: list[T] | None) -> T | list[T] | None:
    return values[0] if values is not None and len(values) == 1 else values or None


def _adapter(text: str) -> dict[str, Any]:
    """Split ``name=scale``; without a scale, the server's default counts."""
    name, equals, scale = text.rpartition("=")
    try:
        return {"name": name, "scale": float(scale)} if equals else {"name": text}
    except ValueError:
        raise InvalidRequest(f"--lora takes NAME or NAME=SCALE with a number as the scale, not {text!r}.") from None


def _format_of(output: Path) -> str | None:
    """The format of the suffix; ``None`` (the server's choice) without one."""
    if output.suffix and output.suffix.lower() not in SUFFIXES:
        raise InvalidRequest(f"{output} cannot be written: use a name that ends in one of {', '.join(SUFFIXES)}.")
    return SUFFIXES.get(output.suffix.lower())


def _extra_argument(text: str) -> tuple[str, Any]:
    """Split ``name=value``; a value that is not valid JSON is a string."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise InvalidRequest(f"--extra takes NAME=JSON, not {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


@contextmanager
def _ready_client(
    notes: Console, url: str | None, api_key: str | None, timeout: float, model: str | None
) -> Iterator[Client]:
    """A client of the running server or, if ``url`` is ``None`` and none answers, of a private one for ``model``."""
    with Client(url or DEFAULT_URL, api_key=api_key, timeout=timeout) as client:
        try:
            client.health()
        except Unreachable:
            if url is not None:
                raise
        else:
            with notes.status("waiting for the server") as status:
                client.wait_until_ready(READY_S, lambda health: status.update(health.reason))
            _check_model(client, model)
            yield client
            return
    with _private_client(notes, api_key, timeout, model) as client:
        yield client


@contextmanager
def _private_client(notes: Console, api_key: str | None, timeout: float, model: str | None) -> Iterator[Client]:
    with PrivateServer(model) as server:
        with notes.status("starting a server for this picture") as status:
            client = Client(server.url, api_key=api_key, timeout=timeout)
            server.wait_until_ready(client, READY_S, lambda health: status.update(health.reason))
        with client:
            yield client


def _check_model(client: Client, wanted: str | None) -> None:
    if wanted is None:
        return
    served = client.model_info()
    if wanted not in (served["model"], served["path"]) and Path(wanted).absolute() != Path(served["path"]).absolute():
        raise InvalidRequest(
            f"The server at {client.base_url} serves {served['model']}, not {wanted}: leave out --model, "
            f"or start another one with `safelight serve {wanted} --port …` and name it with --url."
        )


def _draw(client: Client, notes: Console, prompts: list[str], request: dict[str, Any]) -> Generation:
    with GenerationView(notes, len(prompts) * request["n"]) as view:
        for event in client.stream(prompts[0] if len(prompts) == 1 else prompts, **request):
            if isinstance(event, Result):
                return event.generation
            view.show(event)
    raise AssertionError("a stream ends with a result or an error")


def _save(generation: Generation, output: Path) -> None:
    """Write every output, and print its path, size, seed and time."""
    out = Console(soft_wrap=True, highlight=False)
    for index, made in enumerate(generation.outputs):
        path = _numbered(output, made, index if len(generation.outputs) > 1 else None)
        made.save(path)
        out.print(
            f"{path}  {made.width}x{made.height}  seed {made.seed}  {generation.timings.total_s:.2f} s", markup=False
        )


def _numbered(output: Path, made: Output, index: int | None) -> Path:
    suffix = output.suffix or FORMATS[made.format].suffixes[0]
    number = "" if index is None else f"-{index}"
    return output.with_name(f"{output.stem}{number}{suffix}")
