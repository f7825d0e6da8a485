"""Start a server on the embedded model, generate one picture, and let the judge read it.

python examples/demo.py "a large red heart in the center on a white background"
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from safelight.client import Client, Generation, Progress, Result, SafelightError
from safelight.client.private_server import PrivateServer
from safelight.shapes import Scene, Verdict, caption, judge

START_S = 600.0


def main() -> int:
    arguments = _arguments()
    try:
        with PrivateServer("shapes", port=arguments.port) as server:
            say("starting a server on the embedded model")
            with Client(server.url) as client:
                server.wait_until_ready(client, START_S, lambda health: None)
                started = time.perf_counter()
                generation = draw(client, arguments.prompt, arguments.seed)
                seconds = time.perf_counter() - started
            path = save(generation, arguments.prompt, arguments.folder)
            tell(generation, arguments.prompt, path, seconds)
    except (SafelightError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    say("the server has stopped")
    return 0


def draw(client: Client, prompt: str, seed: int | None) -> Generation:
    """One picture, with its progress on the terminal."""
    for event in client.stream(prompt, seed=seed):
        match event:
            case Progress(step=step, steps=steps) if sys.stdout.isatty():
                print(f"\r· drawing, step {step} of {steps}", end="\n" if step == steps else "", flush=True)
            case Result(generation=generation):
                return generation
    raise AssertionError("a stream ends with its result or an error")


def save(generation: Generation, prompt: str, folder: Path) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:80] or "picture"
    folder.mkdir(parents=True, exist_ok=True)
    return generation.outputs[0].save(folder / f"{name}.png")


def tell(generation: Generation, prompt: str, path: Path, seconds: float) -> None:
    output = generation.outputs[0]
    print(f"prompt   {prompt}")
    print(f"picture  {path} ({output.width}x{output.height}, seed {output.seed})")
    print(f"time     {seconds:.2f} s for {generation.steps} steps")
    print(f"judge    {in_words(judge(output.image))}")


def in_words(verdict: Verdict) -> str:
    """The judge's verdict: a caption if it read every attribute, else the attributes that it read."""
    seen = (verdict.colour, verdict.shape, verdict.size, verdict.position, verdict.background)
    if not verdict.clear:
        return f"is sure of {', '.join(word for word in seen if word) or 'nothing'} only"
    return f"sees {caption(Scene(*(word or '' for word in seen)))}"


def say(text: str) -> None:
    print(f"· {text}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="what to show")
    parser.add_argument("--seed", type=int, help="chosen when not given")
    parser.add_argument("--port", type=int, default=0, help="for the server; a free one when not given")
    parser.add_argument("--folder", type=Path, default=Path("outputs"), help="where the picture goes")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
