"""The bodies of the post-training routes, field by field."""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from fastapi import Request
from msgspec import Meta

from ..protocol.errors import InvalidRequest, Malformed
from ..protocol.operations import Barrier
from ..protocol.tensor_sources import CudaTensor, Int64
from .bounded import MAX_VALUES, parse, read_body
from .schemas import near

B = TypeVar("B")

_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)  # as msgspec says it

_NULL = b"null"

TENSORS = 400_000
"""Values of a body that says several things of every tensor of a model."""
DEFAULT_GROUP = "weight_update_group"


class Alphabet(msgspec.Struct, frozen=True):
    """What a text from a client may consist of.

    Not a ``Meta.pattern``: msgspec 0.22 frees one twice that is in a union with a list (``double free or corruption``).
    """

    pattern: re.Pattern[str]
    words: str


WORD = Alphabet(
    re.compile(r"\w[\w .:+/@=,#~()-]*"),
    "letters, digits and any of _ . : + / @ = , # ~ ( ) - and space, a letter first",
)
VERSION = Alphabet(re.compile("[!-~]+( [!-~]+)*"), "visible ASCII characters, with single spaces between them")
ADDRESS = Alphabet(re.compile("[A-Za-z0-9._:%-]+"), "the characters of a host name or an address")
PRINTABLE = Alphabet(
    re.compile("[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]+"),
    "characters that can be printed",
)

Name = Annotated[str, Meta(min_length=1, max_length=1000), WORD]
Path = Annotated[str, Meta(min_length=1, max_length=1000), PRINTABLE]
TensorName = Annotated[str, Meta(min_length=1, max_length=1000), PRINTABLE]
Address = Annotated[str, Meta(min_length=1, max_length=255), ADDRESS]
Version = Annotated[str, Meta(min_length=1, max_length=200), VERSION]
Modules = Annotated[list[Name], Meta(min_length=1)]
Alpha = Annotated[float, Meta(gt=0, le=1e6)]
Rank = Annotated[int, Meta(ge=1, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


class FromDisk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model_path: Path
    load_format: None = None
    target_modules: Modules | None = None
    weight_version: Version | None = None
    flush_cache: bool = True
    mode: Barrier = "wait"
    update_id: Name | None = None
    require_complete: bool | None = None


class Shared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either ``path``, a safetensors file in the server's shared-memory directory, which stays the sender's to remove,
    or ``cuda_ipc``, handles as torch makes them: a list for each rank of each replica, bytes in base64."""

    path: Path | None = None
    cuda_ipc: list[list[CudaTensor]] | None = None


class FromTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either ``serialized_named_tensors`` or ``shared``."""

    serialized_named_tensors: list[str] | None = None
    load_format: Literal["flattened_bucket"] | None = None
    shared: Shared | None = None
    target_modules: Modules | None = None
    target_module: Name | None = None
    payload_gpu_uuids: list[str] | None = None
    weight_version: Version | None = None
    flush_cache: bool = True
    weight_update_mode: Literal["lora_merge"] | None = None
    lora_alpha: Alpha | None = None
    lora_rank: Rank | None = None
    lora_complete: bool = False
    mode: Barrier = "wait"
    update_id: Name | None = None


class FromBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What stands in the query beside a safetensors body."""

    target_module: Name = "transformer"
    weight_version: Version | None = None
    flush_cache: bool = True
    weight_update_mode: Literal["lora_merge"] | None = None
    lora_alpha: Alpha | None = None
    lora_rank: Rank | None = None
    lora_complete: bool = False
    mode: Barrier = "wait"
    update_id: Name | None = None


class Begin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    weight_version: Version | None = None
    target_modules: Modules | None = None
    mode: Barrier = "wait"
    timeout_s: Seconds | None = None


class Commit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    update_id: Name
    require_complete: bool = False
    weight_version: Version | None = None


class Abort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Either ``update_id``, or ``any`` for whichever update is begun."""

    update_id: Name | None = None
    any: bool = False


class InitGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    master_address: Address
    master_port: Annotated[int, Meta(ge=1, le=65535)]
    rank_offset: Annotated[int, Meta(ge=1, le=1_000_000)]
    world_size: Annotated[int, Meta(ge=2, le=1_000_000)]
    group_name: Name = DEFAULT_GROUP
    backend: Literal["gloo", "nccl"] = "nccl"
    timeout_s: Seconds | None = None


class FromDistributed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    names: list[TensorName]
    dtypes: list[str]
    shapes: list[list[Int64]]
    group_name: Name = DEFAULT_GROUP
    target_modules: Modules | None = None
    load_format: None = None
    weight_version: Version | None = None
    flush_cache: bool = True
    weight_update_mode: Literal["lora_merge"] | None = None
    lora_alpha: Alpha | None = None
    lora_rank: Rank | None = None
    lora_complete: bool = False
    mode: Barrier = "wait"
    update_id: Name | None = None


UpdateBody = FromDisk | FromTensor | FromBody | FromDistributed
LoraBody = FromTensor | FromBody | FromDistributed


class _OfGroup(msgspec.Struct, frozen=True):
    group_name: str = DEFAULT_GROUP


class DestroyGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    group_name: Name = DEFAULT_GROUP


class Checker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    target_module: Name = "transformer"
    expected_named_tensors_sha256: dict[str, str] | None = None
    expected_transformer_sha256: dict[str, str] | list[dict[str, str]] | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Of all maps together. Raises ``InvalidRequest`` where two of them differ."""
        given = self.expected_named_tensors_sha256 or self.expected_transformer_sha256 or {}
        found: dict[str, str] = {}
        for name, digest in (pair for one in (given if isinstance(given, list) else [given]) for pair in one.items()):
            if found.setdefault(name, digest).lower() != digest.lower():
                raise InvalidRequest(
                    f"{name[:100]!r} is expected to have two digests; the full tensor has one on every rank.",
                    field="expected_transformer_sha256",
                )
        return found


class Checksum(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    module_names: list[Name] | None = None
    detail: bool = False


class Occupation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``tags`` are those of :class:`Sleep`, or what other servers call their caches. Everything that is put away is
    kept, whether ``cpu_backup_tags`` name it or not."""

    tags: list[Name] | None = None
    cpu_backup_tags: list[Name] | None = None


class PauseGeneration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """To ``retract`` is what other servers call it when requests stop where they are and go on later."""

    mode: Barrier | Literal["retract"] = "wait"

    @property
    def barrier(self) -> Barrier:
        return "in_place" if self.mode == "retract" else self.mode


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``rid`` and ``abort_all`` are other names of ``request_id`` and ``all``."""

    request_id: Name | None = None
    all: bool | None = None
    rid: str | None = None
    abort_all: bool | None = None

    @property
    def every(self) -> bool:
        return bool(self.all or self.abort_all)

    @property
    def name(self) -> str | None:
        return self.request_id or self.rid or None


class WeightVersion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    new_version: Version
    abort_all_requests: bool = False


class WeightsChecker(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    action: Literal["snapshot", "compare", "reset_tensors"]
    allow_quant_error: bool | None = None


class PostProcess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    restore_weights_before_load: bool | None = None
    post_process_quantization: bool | None = None
    post_load_weights: bool | None = None


class Nothing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


async def read(request: Request, kind: type[B], max_values: int = MAX_VALUES) -> B:
    """The body as ``kind``; an empty one has every default, and so has a field that is null.

    Raises ``Malformed`` and ``BodyTooLarge``.
    """
    return await decode(await read_body(request), kind, max_values)


async def decode(body: bytearray, kind: type[B], max_values: int = MAX_VALUES) -> B:
    """As :func:`read`, of a body that was received."""
    return await parse(body, functools.partial(_decode, kind=kind), max_values)


async def read_any(request: Request, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The fields of a body that is read again as something else. Raises as :func:`read` does."""
    return await parse(await read_body(request), _decode_any, max_values)


def _decode_any(body: bytearray) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body or b"{}", type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"The body is not a JSON object: {error}.") from None


def _decode(body: bytearray, kind: type[B]) -> B:
    try:
        return _checked(msgspec.json.decode(_without_nulls(body) or b"{}", type=kind))
    except msgspec.ValidationError as error:
        raise _malformed(error, kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"The body is no JSON: {error}.") from None


def _without_nulls(body: bytearray) -> bytes | bytearray:
    """``body`` without fields that are null, which a client has left out: trainers write whole objects."""
    if _NULL not in body:
        return body
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return msgspec.json.encode({name: value for name, value in fields.items() if bytes(value) != _NULL})


def group_of(body: bytearray) -> str | None:
    """The group that a body is about which may be wrong otherwise; ``None`` where it does not tell."""
    try:
        return msgspec.json.decode(_without_nulls(body), type=_OfGroup).group_name
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def from_query(request: Request, kind: type[B]) -> B:
    """The query's parameters as ``kind``. Raises ``Malformed``."""
    fields: dict[str, Any] = dict(request.query_params)
    try:
        return _checked(msgspec.convert(fields, kind, strict=False))
    except msgspec.ValidationError as error:
        raise _malformed(error, kind) from None


def _malformed(error: msgspec.ValidationError, kind: type[Any]) -> Malformed:
    what, _, where = str(error).partition(" - at `$")
    if not where and (unknown := _UNKNOWN.fullmatch(what)) is not None:
        name = unknown[1][:100]
        known = [field.encode_name for field in msgspec.structs.fields(kind)]
        return Malformed(f"There is no field {name!r}; {near(name, known)}", field=name)
    field = where.strip("`.").split("[")[0].split(".")[0] or None
    return Malformed(f"{what}{f' ({field})' if field else ''}.", field=field)


def _checked(body: B) -> B:
    """``body``, whose texts consist of what their types say. Raises ``Malformed``."""
    for field, alphabet in _alphabets_of(type(body)).items():
        value = getattr(body, field)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and not alphabet.pattern.fullmatch(text):
                raise Malformed(f"{field} must consist of {alphabet.words}; {text[:100]!r} does not.", field=field)
    return body


def _alphabets_of(kind: type[Any]) -> dict[str, Alphabet]:
    hints = get_type_hints(kind, include_extras=True)
    found = {field: _alphabet_in(hint) for field, hint in hints.items()}
    return {field: alphabet for field, alphabet in found.items() if alphabet is not None}


def _alphabet_in(hint: Any) -> Alphabet | None:
    """That of the text in ``hint``, which may be in a union or a list."""
    if isinstance(hint, Alphabet):
        return hint
    inner = [*get_args(hint), *(hint.__metadata__ if get_origin(hint) is Annotated else ())]
    return next((found for part in inner if (found := _alphabet_in(part)) is not None), None)
