"""The training loops that train_step.py measures, each in a process of its own.

A loop stands still before every `window` steps until it is told to go on, so that many of them can
be measured in turn.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Client
from typing import Any

import numpy as np
import torch
from encoders import Encoders
from PIL import Image
from random_models import SIZES, Size, pictures
from torch import Tensor

from pipeline import models
from pipeline.cluster import connect
from pipeline.config import TrainConfig
from pipeline.progress import Progress, quiet_libraries
from pipeline.training.inputs import Inputs
from pipeline.training.loop import StageLoop
from pipeline.training.read_ahead import ReadAhead
from pipeline.training.run import Run
from pipeline.training.stage import World
from pipeline.training.trainer import fit
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter
from ssr_model.losses import ldm_loss, reg_loss, total_loss
from ssr_model.training_step import SSRTrainingModule
from ssr_model.vision import clip_crop, clip_input, vision_features

KEY = b"benchmark"
PICTURES = 32


@dataclass
class Task:
    """What one process measures."""

    method: str
    cfg: TrainConfig
    size: str
    gate: str
    """Where the measuring process listens."""
    window: int
    windows: int
    threads: int


class Gate:
    """Called before every step; it waits where a window begins, and tells that one is over."""

    def __init__(self, task: Task) -> None:
        self.task, self.step = task, 0
        self.connection = Client(task.gate, authkey=KEY)
        self.connection.send(task.method)

    @property
    def open(self) -> bool:
        """Whether another window is wanted."""
        return self.step < self.task.window * self.task.windows

    def __call__(self) -> None:
        if self.step % self.task.window == 0:
            self.connection.send("over")
            if self.open:
                self.connection.recv()
        self.step += 1


@dataclass
class Gated(Run):
    """A run whose stage runs one of the loops below; where it is None, its own."""

    task: Any = None

    def work(self, world: World) -> dict[str, dict[str, Any]]:
        task: Task = self.task
        torch.set_num_threads(task.threads)
        own, take, gate = StageLoop.run, StageLoop._take, Gate(task)

        def run(loop: StageLoop) -> dict[str, Any]:
            loop.learner.texts.keep_bytes = 0  # few texts are made up here; a crawl has many
            if task.method == RAY:
                return own(loop)
            LOOPS[task.method](loop, gate, task)
            gate()
            raise SystemExit

        def taken(loop: StageLoop, inputs: Inputs) -> None:
            gate()
            take(loop, inputs)

        StageLoop.run, StageLoop._take = run, taken  # type: ignore[method-assign]
        return super().work(world)


def serve(task: Task) -> None:
    """The process of one loop."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the table alone goes to stdout
    quiet_libraries()
    run = Gated(task.cfg, task=task)
    if task.method == RAY:
        with connect(task.cfg.ray), Progress(terminal=False) as progress:
            fit(run, progress)
    else:
        run.take_over()
        run.work(World())


def bare(loop: StageLoop, gate: Gate, task: Task) -> None:
    """The step on batches that lie ready in memory."""
    ready = [loop.prepare(batch) for batch in loop.lanes.batches(0, 4)]
    for inputs in itertools.cycle(ready):
        if not gate.open:
            return
        gate()
        loop.learner(inputs)


def online(loop: StageLoop, gate: Gate, task: Task) -> None:
    """The same step, with VAE and CLIP run in it; a thread decodes the JPEGs ahead."""
    cfg, size, encode = loop.cfg, SIZES[task.size], _encoders(loop.cfg)
    ready = [loop.prepare(batch) for batch in loop.lanes.batches(0, 4)]
    decoded = partial(_decode, encode.image_processor)
    with ReadAhead(_batches(size, cfg.global_batch), decoded) as ahead:
        for inputs, (image, clip) in zip(itertools.cycle(ready), ahead, strict=False):
            if not gate.open:
                return
            gate()
            loop.learner(encode(inputs, image, clip, loop.stage.depths))


def released(loop: StageLoop, gate: Gate, task: Task) -> None:
    """As the trainer of the paper's authors works: everything online, float32, under anomaly
    detection, AdamW in its plain form, no clipping, the loss read at every step.
    """
    cfg, size, frozen, encode = loop.cfg, SIZES[task.size], loop.frozen, _encoders(loop.cfg)
    loop.learner.release()
    unet = frozen.unet.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    shape = SSRConfig.from_models(
        encode.vision.tower.config,
        frozen.text_encoder.config,
        unet,
        depths=loop.stage.depths,
        variant="released",
    )
    adapter = SSRAdapter(shape)
    module = SSRTrainingModule(adapter, unet)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=5e-5, weight_decay=1e-2)
    images = _Images(_some(size), encode.image_processor)
    data = torch.utils.data.DataLoader(images, cfg.global_batch, num_workers=1)
    ready = [loop.prepare(batch) for batch in loop.lanes.batches(0, 4)]
    for inputs, (image, clip) in zip(itertools.cycle(ready), data, strict=False):
        if not gate.open:
            return
        gate()
        with torch.autograd.set_detect_anomaly(True):
            latents = encode.vae.encode(image).latent_dist.sample() * frozen.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, frozen.scheduler.config.num_train_timesteps, (len(latents),))
            noisy = frozen.scheduler.add_noise(latents, noise, t)
            z_q = frozen.text_encoder(inputs.query_ids.flatten(0, 1))[0]
            values = clip_input(encode.image_processor, clip)
            features = vision_features(encode.vision.tower, values, loop.stage.depths)
            prompt = frozen.text_encoder(inputs.prompt_ids)[0]
            prediction, subject = module(noisy, t, prompt, z_q, features)
            reg = reg_loss(subject.per_scale, z_q, "per_scale")
            loss = total_loss(ldm_loss(prediction, noise), reg, 0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()


BARE, RAY = "the step alone, batches ready", "the loop through Ray Train"
PIXELS = "the step alone, layout pixels (CLIP in it)"
ONLINE, RELEASED = "encoders online", "as the released trainer works"
LOOPS: dict[str, Callable[[StageLoop, Gate, Task], None]] = {
    BARE: bare,
    PIXELS: bare,
    ONLINE: online,
    RELEASED: released,
}


class _Images(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Endless JPEGs, decoded for the VAE and for CLIP."""

    def __init__(self, files: list[bytes], image_processor: Any) -> None:
        self.files, self.image_processor = files, image_processor

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        file = self.files[index % len(self.files)]
        image, clip = _decode(self.image_processor, [file])
        return image[0], clip[0]


def _encoders(cfg: TrainConfig) -> Encoders:
    vision = cfg.models.vision
    return Encoders(
        models.load_vae(cfg.models.base),
        models.load_vision(vision),
        models.load_image_processor(vision),
    )


def _some(size: Size) -> list[bytes]:
    return pictures(size, PICTURES)


def _batches(size: Size, rows: int) -> Iterator[list[bytes]]:
    files = itertools.cycle(_some(size))
    while True:
        yield list(itertools.islice(files, rows))


def _decode(image_processor: Any, files: list[bytes]) -> tuple[Tensor, Tensor]:
    """Of JPEGs: float32 (B, 3, s, s) in [-1, 1] for the VAE, uint8 (B, S, S, 3) for CLIP."""
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    clip = np.stack([clip_crop(image_processor, image) for image in images])
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(clip)
