"""A failed download is one sentence, without a traceback, for every error of the libraries."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api

from safelight.protocol.errors import StartFailed
from safelight.worker.model.model import find_directory

Answers = dict[str, tuple[int, str | None]]
"""The status and the hub's error code for requests whose path holds a word; any other gets the repository's listing."""

PointAt = Callable[[str], None]

LISTING = {"id": "org/name", "siblings": [{"rfilename": "model_index.json"}], "sha": "0" * 40}


@pytest.fixture
def point_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PointAt:
    def point(endpoint: str) -> None:
        monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))

    return point


@pytest.fixture
def hub(point_at: PointAt) -> Iterator[Answers]:
    answers: Answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, code = next((answer for word, answer in answers.items() if word in self.path), (200, None))
            body = json.dumps(LISTING).encode() if status == 200 else b"{}"
            self.send_response(status)
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        point_at(f"http://127.0.0.1:{server.server_address[1]}")
        yield answers
        server.shutdown()


def refused(caplog: pytest.LogCaptureFixture, revision: str | None = None) -> str:
    with caplog.at_level(logging.WARNING), pytest.raises(StartFailed) as raised:
        find_directory("org/name", revision=revision)
    assert caplog.records == []
    assert raised.value.message.endswith(".")
    assert "\n" not in raised.value.message
    return raised.value.message


def test_a_hub_that_cannot_be_reached(point_at: PointAt, caplog: pytest.LogCaptureFixture) -> None:
    point_at("http://127.0.0.1:9")
    said = refused(caplog)
    assert "http://127.0.0.1:9 cannot be reached to fetch org/name" in said


def test_a_hub_that_is_out_of_order(hub: Answers, caplog: pytest.LogCaptureFixture) -> None:
    hub["api/models"] = (500, None)
    assert "cannot be reached" in refused(caplog)


def test_a_gated_repository(hub: Answers, caplog: pytest.LogCaptureFixture) -> None:
    hub["resolve"] = (403, "GatedRepo")
    said = refused(caplog)
    assert "is gated: accept its terms" in said
    assert "HF_TOKEN" in said


def test_a_repository_that_is_not_there_or_private(hub: Answers, caplog: pytest.LogCaptureFixture) -> None:
    hub["api/models"] = (401, "RepoNotFound")
    said = refused(caplog)
    assert "has no repository org/name, or it is private" in said
    assert "HF_TOKEN" in said


def test_a_revision_that_is_not_there(hub: Answers, caplog: pytest.LogCaptureFixture) -> None:
    hub["api/models"] = (404, "RevisionNotFound")
    assert "has no revision 'v9'" in refused(caplog, "v9")


def test_a_repository_that_is_not_a_pipeline(hub: Answers, caplog: pytest.LogCaptureFixture) -> None:
    hub["model_index.json"] = (404, "EntryNotFound")
    assert "no model_index.json" in refused(caplog)
