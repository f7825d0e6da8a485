"""``safelight push``, ``checksum`` and ``diff``, run as programs against real servers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from safelight.client import Client
from safelight.tests.live import LiveServer

from .tensors import Tensors, digest, plus
from .test_cli import Run, safelight

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def changed(own: Tensors, tmp_path: Path) -> Path:
    """A pipeline's directory in which only the transformer lies, two of its tensors not as they were."""
    folder = tmp_path / "changed" / "transformer"
    folder.mkdir(parents=True)
    first, second, *_ = own
    save_file({**own, first: own[first] + 1, second: own[second] - 1}, folder / FILE)
    return folder.parent


def failed_with_a_sentence(run: Run, status: int) -> bool:
    """True if a command failed with ``status`` and one line that says why."""
    return run.returncode == status and run.stdout == "" and len(run.stderr.splitlines()) == 1


def test_the_checksum_of_a_directory_is_the_server_s(trained: Client, flux: Path) -> None:
    run = safelight("checksum", flux)
    assert run.returncode == 0, run.stderr
    assert dict(reversed(line.split("  ")) for line in run.stdout.splitlines()) == trained.weights.checksum()


def test_the_details_of_a_file_are_the_server_s(trained: Client, flux: Path) -> None:
    run = safelight("checksum", flux / "vae" / FILE, "--module", "vae", "--detail")
    assert run.returncode == 0, run.stderr
    reported = trained.weights.checksum(["vae"], detail=True)["vae"]
    tensors = [f"{t.sha256}  vae.{name}  float32 {list(t.shape)}" for name, t in sorted(reported.tensors.items())]
    assert run.stdout.splitlines() == [f"{reported.sha256}  vae", *tensors]


def test_a_checksum_needs_no_torch(flux: Path) -> None:
    program = (
        "import sys\nfrom safelight.client.cli import main\n"
        "try: main()\nexcept SystemExit: print(sorted(set(sys.modules) & {'torch', 'diffusers', 'numpy'}))"
    )
    run = subprocess.run([sys.executable, "-c", program, "checksum", str(flux)], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_a_missing_checksum_is_reported_in_a_sentence(flux: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    for arguments in ([tmp_path], [tmp_path / "none"], [tmp_path / "broken.safetensors"], [flux, "--module", "unet"]):
        run = safelight("checksum", *arguments)
        assert failed_with_a_sentence(run, 1), run


def test_a_pushed_directory_serves(trained: Client, changed: Path) -> None:
    before = trained.weights.checksum()
    run = safelight("push", changed, trained.base_url, "--version", "pushed")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("pushed  transformer 66 tensors  ")
    assert run.stderr == "", "what is shown on a terminal alone"
    assert trained.weights.version() == "pushed"
    after = safelight("checksum", changed).stdout.split()[0]
    assert trained.weights.checksum() == {**before, "transformer": after}


def test_a_pushed_file_is_for_the_module_that_is_named(trained: Client, own: Tensors, tmp_path: Path) -> None:
    new = plus(own, 0.1)
    save_file(new, tmp_path / "step-100.safetensors")
    refused = safelight("push", tmp_path / "step-100.safetensors", trained.base_url)
    assert failed_with_a_sentence(refused, 1), refused
    assert "step-100" in refused.stderr
    run = safelight("push", tmp_path / "step-100.safetensors", trained.base_url, "--module", "transformer")
    assert run.returncode == 0, run.stderr
    assert trained.weights.checksum()["transformer"] == digest(new)


def test_weights_that_cannot_be_pushed_are_reported_in_a_sentence(trained: Client, flux: Path, tmp_path: Path) -> None:
    for path, url in ((tmp_path, trained.base_url), (flux, "http://127.0.0.1:9")):
        run = safelight("push", path, url)
        assert failed_with_a_sentence(run, 1), run


def test_a_push_that_fails_in_its_second_module_changes_nothing(trained: Client, changed: Path, own: Tensors) -> None:
    before = trained.weights.checksum()
    (changed / "vae").mkdir()
    name, *_ = own
    save_file({name: own[name]}, changed / "vae" / FILE)
    run = safelight("push", changed, trained.base_url)
    assert failed_with_a_sentence(run, 1), run
    assert name in run.stderr
    assert (trained.weights.checksum(), trained.weights.version()) == (before, "restored")


def test_equal_weights_do_not_differ(trained: Client, flux: Path) -> None:
    for a, b in ((flux, trained.base_url), (trained.base_url, flux / "vae"), (trained.base_url, trained.base_url)):
        run = safelight("diff", a, b)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", ""), run


def test_the_tensors_that_differ_are_named(trained: Client, flux: Path, changed: Path, own: Tensors) -> None:
    first, second, third, *_ = own
    lines = [f"transformer.{name}  differs" for name in sorted([first, second])]
    for a, b in ((changed, trained.base_url), (flux, changed / "transformer")):
        run = safelight("diff", a, b, "--module", "transformer")
        assert (run.returncode, run.stdout.splitlines()) == (1, lines), run
    save_file({name: tensor for name, tensor in own.items() if name != third}, changed / "transformer" / FILE)
    run = safelight("diff", flux / "transformer", changed)
    assert (run.returncode, run.stdout) == (1, f"transformer.{third}  only in A\n"), run
    run = safelight("diff", changed, flux)
    others = [f"{name}  only in B" for name in ("text_encoder", "text_encoder_2", "vae")]
    assert run.stdout.splitlines() == [*others[:2], f"transformer.{third}  only in B", others[2]]


def test_two_servers_differ_in_dtype(trained: Client, half_server: LiveServer, own: Tensors) -> None:
    run = safelight("diff", trained.base_url, half_server.url, "--module", "transformer")
    assert run.returncode == 1, run.stderr
    assert len(run.stdout.splitlines()) == len(own)
    name = min(own)
    shape = list(own[name].shape)
    assert run.stdout.splitlines()[0] == f"transformer.{name}  float32 {shape} in A, bfloat16 {shape} in B"


def test_files_are_equal_to_a_server_that_cast_them(half_server: LiveServer, flux: Path, changed: Path) -> None:
    said = "transformer: 66 tensors of float32 as bfloat16, as the server stores them"
    for a, b in ((flux, half_server.url), (half_server.url, flux)):
        run = safelight("diff", a, b)
        assert (run.returncode, run.stdout) == (0, ""), run
        assert said in run.stderr.splitlines()
    run = safelight("diff", changed, half_server.url, "--module", "transformer")
    assert run.returncode == 1, run
    assert len(run.stdout.splitlines()) == 2, "the two that were changed"
    run = safelight("checksum", flux, "--like", half_server.url)
    with Client(half_server.url) as client:
        assert dict(reversed(line.split("  ")) for line in run.stdout.splitlines()) == client.weights.checksum()
    assert said in run.stderr.splitlines()


def test_half_a_directory_is_pushed_only_on_request(trained: Client, changed: Path, own: Tensors) -> None:
    before = trained.weights.checksum()
    first, *_ = own
    save_file({first: own[first] + 2}, changed / "transformer" / FILE)
    run = safelight("push", changed, trained.base_url)
    assert failed_with_a_sentence(run, 1), run
    assert trained.weights.checksum() == before
    run = safelight("push", changed, trained.base_url, "--partial")
    assert run.returncode == 0, run.stderr
    assert trained.weights.checksum()["transformer"] == digest({**own, first: own[first] + 2})


def test_weights_that_cannot_be_compared_do_not_count_as_different(flux: Path, tmp_path: Path) -> None:
    for a, b in ((flux, tmp_path / "none"), (flux, tmp_path), (flux, "http://127.0.0.1:9")):
        run = safelight("diff", a, b)
        assert failed_with_a_sentence(run, 2), run
    run = safelight("diff", flux, flux, "--module", "unet")
    assert failed_with_a_sentence(run, 2), run
