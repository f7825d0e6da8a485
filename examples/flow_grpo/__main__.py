"""`python -m safelight.examples.flow_grpo --out DIR`: teaches a server's model by the pictures that it draws.

A server draws groups of pictures of the same prompt; a judge scores them; the weights are moved towards what was better
than its group's mean (GRPO, https://arxiv.org/abs/2402.03300, for flows https://arxiv.org/abs/2505.05470), and pushed
to the server, which goes on with them. The same command goes on with a run that was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from safelight.client import Client, SafelightError
from safelight.client.private_server import PrivateServer
from safelight.client.rollouts import Rollout
from safelight.shapes import caption

from .plot import plot
from .policy import Policy
from .rewards import held_out, mark, training_scenes

PICTURE: dict[str, Any] = {"width": 128, "height": 128, "max_sequence_length": 16}
LATENTS = (64, 64)
"""Tokens and channels of a picture, as this pipeline packs them."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m safelight.examples.flow_grpo", description=__doc__)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder for the log, the curve and the checkpoint")
    parser.add_argument(
        "--server", metavar="URL", help="one whose embedded model is to learn; if not given, one is started"
    )
    parser.add_argument("--minutes", type=float, default=60, help="when to stop")
    parser.add_argument("--iterations", type=int, default=1_000_000, help="when to stop at the latest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", type=int, metavar="RANK", help="learn an adapter instead of all weights")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--prompts", type=int, default=12, help="groups of an iteration")
    parser.add_argument("--group", type=int, default=8, help="samples of a group")
    parser.add_argument("--updates", type=int, default=2, help="optimiser steps of an iteration")
    parser.add_argument("--batch", type=int, default=48, help="samples of a forward")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps")
    parser.add_argument("--noisy", type=int, default=3, help="how many of them are noisy, and learned from")
    parser.add_argument("--noisy-among", type=int, default=5, help="they are among so many first ones")
    parser.add_argument("--sampler", choices=("sde", "cps"), default="cps")
    parser.add_argument("--noise", type=float, default=0.8, help="noise level")
    parser.add_argument("--clip", type=float, default=5e-4, help="how far a probability ratio may go from 1")
    parser.add_argument("--warmup", type=int, default=5, help="iterations until the whole learning rate")
    parser.add_argument("--examine-every", type=int, default=20, help="iterations between examinations")
    parser.add_argument("--examined", type=int, default=200, help="held-out prompts of an examination")
    parser.add_argument("--threads", type=int, default=2, help="of this program and of the server it starts")
    options = parser.parse_args()
    if options.group < 2:
        parser.error("--group must be at least 2: a sample is compared with the others of its group")
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        with server(options) as client:
            Training(options, client).run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last iteration")
        return 130
    except (SafelightError, OSError, NotThisRun) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[Client]:
    """A client of the server that was named, or of one that runs in this context."""
    if options.server:
        with Client(options.server) as client:
            yield client
        return
    settings = ["--threads", str(options.threads), "--dtype", "float32", "--max-outputs", "4096", "--max-running", "96"]
    with PrivateServer("shapes", options=settings) as private, Client(private.url) as client:
        private.wait_until_ready(client, 600.0, lambda health: None)
        yield client


class Training:
    """The state of a run, which is that of its folder."""

    def __init__(self, options: argparse.Namespace, client: Client) -> None:
        self._options, self._client = options, client
        self._policy = Policy(options.lora)
        self._optimizer = torch.optim.AdamW(self._policy.parameters, lr=options.lr, betas=(0.9, 0.99), weight_decay=0)
        self._iteration = 0
        self._log = options.out / "log.jsonl"
        self._began = time.monotonic() - 60 * self._resume()

    def run(self) -> None:
        options, config = self._options, self._client.info()["config"]
        if config["dtype"] != "float32":
            raise NotThisRun(
                f"The server computes in {config['dtype']}; start it with --dtype float32, as is done here."
            )
        self._policy.push_start(self._client)
        if self._iteration:
            self._policy.push(self._client, f"step-{self._iteration}")
        else:
            self._tell({"iteration": 0, **self._examine()})
        while self._done() < 1:
            told = self._iterate()
            self._iteration += 1
            told = {"iteration": self._iteration} | told
            if self._done() >= 1 or self._iteration % options.examine_every == 0:
                told |= self._examine()
            self._tell(told)
            self._save()

    def _minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    def _done(self) -> float:
        """How much of the run has been done, from 0 to 1."""
        options = self._options
        return float(max(self._minutes() / options.minutes, self._iteration / options.iterations))

    def _iterate(self) -> dict[str, Any]:
        """Samples, rewards, optimiser steps, a push; returns what to log."""
        clock, options, number = Clock(), self._options, self._iteration
        generator = torch.Generator().manual_seed(1_000_003 * options.seed + number)
        scenes = training_scenes(options.prompts, generator)
        among = random.Random(f"{options.seed} {number}")
        steps = sorted(among.sample(range(options.noisy_among), options.noisy))
        noise = torch.randn(options.prompts, *LATENTS, generator=generator)  # a group differs by its steps' noise alone
        rollouts = self._client.rollout(
            [caption(scene) for scene in scenes],
            n=options.group,
            seed=torch.randint(2**48, (options.prompts * options.group,), generator=generator).tolist(),
            steps=options.steps,
            sampler=options.sampler,
            noise_level=options.noise,
            initial_noise=noise.repeat_interleave(options.group, 0),
            sde_steps=steps,
            return_steps=sorted({*steps, *(step + 1 for step in steps)}),
            environment=True,
            shared_memory=True,
            **PICTURE,
        )
        clock.lap("rollout_s")
        asked_for = [scene for scene in scenes for _ in range(options.group)]
        marks = [mark(rollout.output, scene) for rollout, scene in zip(rollouts, asked_for, strict=True)]
        rewards = torch.tensor([one.reward for one in marks])
        grouped = rewards.reshape(options.prompts, options.group)
        advantages = (grouped - grouped.mean(1, keepdim=True)).flatten() / (grouped.std(1).mean() + 1e-4)
        clock.lap("judge_s")
        learned = self._learn(rollouts, advantages, steps, generator)
        clock.lap("learn_s")
        version = f"step-{number + 1}"
        self._policy.push(self._client, version)
        clock.lap("push_s")
        versions = sorted({name for rollout in rollouts for name in rollout.weight_versions})
        told = {"reward": float(rewards.mean()), "drawn_with": versions, "pushed": version}
        return told | learned | clock.laps

    def _learn(
        self, rollouts: Sequence[Rollout], advantages: torch.Tensor, steps: Sequence[int], generator: torch.Generator
    ) -> dict[str, float]:
        """Clipped policy-gradient steps, each on its own share of the samples."""
        options, off, clipped, norms = self._options, [], [], []
        order = torch.randperm(len(rollouts), generator=generator)
        for parameters in self._optimizer.param_groups:
            parameters["lr"] = options.lr * self._rate()
        for chosen in order.chunk(options.updates):
            self._optimizer.zero_grad(set_to_none=True)
            for part in torch.split(chosen, options.batch):
                batch = [rollouts[index] for index in part.tolist()]
                old = torch.stack([rollout.log_probs[steps] for rollout in batch])
                new = self._policy.log_probs(batch, steps, options.sampler, options.noise)
                ratio = (new - old).exp()
                free = ratio * advantages[part, None]
                held = ratio.clamp(1 - options.clip, 1 + options.clip) * advantages[part, None]
                gain = torch.minimum(free, held)
                clipped.append((held < free).float())
                torch.autograd.backward(-gain.mean() * len(part) / len(chosen))
                off.append((ratio.detach() - 1).abs())
            norms.append(torch.nn.utils.clip_grad_norm_(self._policy.parameters, 1.0))
            self._optimizer.step()
        return {
            "first_ratio_off": float(off[0].max()),  # of samples that these very weights have drawn: near 0
            "clipped": float(torch.cat(clipped).mean()),
            "grad_norm": float(torch.stack(norms).mean()),
        }

    def _rate(self) -> float:
        """The learning rate's factor: a linear rise, and in the second half of the run a linear way down to 0."""
        rise = (self._iteration + 1) / max(1, self._options.warmup)
        return float(min(1.0, rise, 2 * max(0.0, 1 - self._done())))

    def _examine(self) -> dict[str, float]:
        """How many pictures of held-out prompts are right, drawn without noise."""
        scenes = held_out()[: self._options.examined]
        prompts = [caption(scene) for scene in scenes]
        pictures = self._client.rollout(
            prompts,
            steps=self._options.steps,
            sampler="ode",
            trajectory=False,
            seed=list(range(len(scenes))),
            shared_memory=True,
            **PICTURE,
        )
        marks = [mark(picture.output, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        return {
            "held_out": sum(one.score for one in marks) / len(marks),
            "held_out_all_right": sum(one.all_right for one in marks) / len(marks),
            "held_out_reward": sum(one.reward for one in marks) / len(marks),
        }

    def _tell(self, line: dict[str, Any]) -> None:
        line |= {"minutes": self._minutes()}
        rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in line.items()}
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")
        print(" ".join(f"{name} {value}" for name, value in rounded.items()), flush=True)
        if "held_out" in line:
            plot([self._log], self._options.out / "curve.png")

    def _save(self) -> None:
        state = {
            "iteration": self._iteration,
            "minutes": self._minutes(),
            "lora": self._options.lora,
            "learned": [parameter.detach() for parameter in self._policy.parameters],
            "optimizer": self._optimizer.state_dict(),
        }
        partial = self._options.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self._options.out / "checkpoint.pt")

    def _resume(self) -> float:
        """Returns the minutes that were spent before. What the log has of an iteration that was not saved goes."""
        path = self._options.out / "checkpoint.pt"
        if not path.exists():
            self._log.unlink(missing_ok=True)
            return 0.0
        state = torch.load(path, weights_only=True)
        if state["lora"] != self._options.lora:
            raise NotThisRun(f"{path} is of a run with --lora {state['lora']}; choose another --out for this one.")
        self._iteration = state["iteration"]
        lines = self._log.read_text(encoding="utf-8").splitlines(keepends=True)
        self._log.write_text("".join(lines[: self._iteration + 1]), encoding="utf-8")
        with torch.no_grad():
            for parameter, stored in zip(self._policy.parameters, state["learned"], strict=True):
                parameter.copy_(stored)
        self._optimizer.load_state_dict(state["optimizer"])
        minutes: float = state["minutes"]
        return minutes


class NotThisRun(Exception):
    """The folder or the server is for another run."""


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


if __name__ == "__main__":
    sys.exit(main())
