"""Calls are built and checked before they are sent."""

from __future__ import annotations

import base64
import inspect
import json
import ssl
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from safelight.client import AsyncClient, Client, InvalidRequest
from safelight.client.calls import GRACE_S, HEALTH, generate
from safelight.client.endpoint import DEFAULT_TIMEOUT_S, Endpoint
from safelight.client.rollout_calls import rollout

from .played_server import png


def test_only_what_was_given_is_sent() -> None:
    assert generate("a red circle").body == {"prompt": "a red circle"}


def test_steps_is_sent_under_its_long_name() -> None:
    assert generate("a", steps=4).body == {"prompt": "a", "num_inference_steps": 4}


def test_two_names_for_the_steps_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="give one of them"):
        generate("a", steps=4, num_inference_steps=5)


def test_zero_and_false_are_values_and_not_left_out() -> None:
    assert generate("a", seed=0, deterministic=False).body == {"prompt": "a", "seed": 0, "deterministic": False}


def test_unnamed_arguments_go_to_the_pipeline() -> None:
    body = generate("a", extra={"eta": 0.5}, max_sequence_length=64).body
    assert body == {"prompt": "a", "extra": {"eta": 0.5, "max_sequence_length": 64}}


def test_sequences_are_sent_as_lists() -> None:
    assert generate(("a", "b"), seed=range(2)).body == {"prompt": ["a", "b"], "seed": [0, 1]}


@pytest.mark.parametrize("type_", [np.float64, np.float32])
def test_arrays_and_other_iterables_are_sent_as_lists(type_: type) -> None:
    call = rollout("a", sigmas=np.array([1, 0.5], type_), sde_steps=np.arange(2))  # type: ignore[arg-type]
    sent = json.loads(call.content)  # type: ignore[arg-type]
    assert (sent["sigmas"], sent["rollout_sde_step_indices"]) == ([1.0, 0.5], [0, 1])
    prompts = {"a": 1}.keys()
    assert generate(prompts, seed=(seed for seed in range(2))).body == {"prompt": ["a"], "seed": [0, 1]}  # type: ignore[arg-type]


def test_streaming_keeps_the_rest_of_the_request() -> None:
    assert generate("a", n=2).streaming().body == {"prompt": "a", "n": 2, "stream": True}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), object(), b"ab"])
def test_a_value_that_json_does_not_have_is_refused_before_it_is_sent(value: object) -> None:
    with pytest.raises(InvalidRequest, match="JSON"):
        _ = generate("a", something=value).content


def test_pictures_are_sent_as_base64_whatever_they_came_as(tmp_path: Path) -> None:
    data = png()
    path = tmp_path / "in.png"
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    body = generate("a", image=[data, path, encoded]).body
    assert body is not None
    assert body["image"] == [encoded] * 3
    pillow = generate("a", image=Image.new("RGB", (2, 2))).body
    assert pillow is not None
    assert base64.b64decode(pillow["image"]).startswith(b"\x89PNG")


def test_the_client_waits_longer_than_a_request_may_take() -> None:
    assert generate("a", timeout_s=5000).read_timeout(DEFAULT_TIMEOUT_S) == 5000 + GRACE_S
    assert generate("a", timeout_s=1).read_timeout(DEFAULT_TIMEOUT_S) == DEFAULT_TIMEOUT_S
    assert generate("a", timeout_s=1).read_timeout(None) is None
    assert HEALTH.read_timeout(2.0) == 2.0


@pytest.mark.parametrize("owner", [Client, AsyncClient])
def test_both_clients_show_the_arguments_of_a_request(owner: type) -> None:
    for method in (owner.generate, owner.stream):  # type: ignore[attr-defined]
        names = list(inspect.signature(method).parameters)
        assert names == ["self", *inspect.signature(generate).parameters]


@pytest.mark.parametrize("owner", [Client, AsyncClient])
def test_each_method_of_a_client_is_shown_by_its_own_name(owner: type) -> None:
    methods = [(n, f) for n, f in inspect.getmembers(owner, inspect.isfunction) if not n.startswith("_")]
    assert len(methods) > 15
    for name, function in methods:
        shown = function.__name__, function.__code__.co_name, function.__code__.co_qualname, function.__qualname__
        assert (*shown, function.__module__) == (name, name, *[f"{owner.__name__}.{name}"] * 2, owner.__module__)
        assert inspect.iscoroutinefunction(function) == (owner is AsyncClient and name != "stream")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("127.0.0.1:30000", "http://127.0.0.1:30000"),
        ("http://host:1/", "http://host:1"),
        ("https://host/safelight/", "https://host/safelight"),
    ],
)
def test_an_address_becomes_a_url(given: str, url: str) -> None:
    assert Endpoint(given).base_url == url


def test_a_path_before_the_routes_is_kept() -> None:
    with Client("https://host/prefix") as client:
        request = client._endpoint.request(client._http, HEALTH)
    assert str(request.url) == "https://host/prefix/health"


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://localhost:1", "http://[::1]:1"])
def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.invalid:3128")
    assert Endpoint(url).settings()["trust_env"] is False
    assert Endpoint("http://gpu-1:30000").settings()["trust_env"] is True


def test_certificates_are_read_only_where_a_request_may_need_them() -> None:
    plain, tls = (Endpoint(f"{scheme}://127.0.0.1:1").settings()["verify"] for scheme in ("http", "https"))
    assert (plain.get_ca_certs(), plain.verify_mode, plain.check_hostname) == ([], ssl.CERT_REQUIRED, True)
    assert tls.get_ca_certs()


def test_the_key_does_not_show_in_a_traceback() -> None:
    assert "secret" not in repr(Endpoint(api_key="secret"))
