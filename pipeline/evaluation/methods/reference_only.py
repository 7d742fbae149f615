"""Reference-only control: the base model looks at the reference through its own self-attention.

At every step the U-Net first runs on the reference, noised to that step, under the same prompt;
then, drawing, each self-attention attends to its own tokens and the reference's. Nothing is
trained. As diffusers' community pipeline `stable_diffusion_reference.py` does with reference_attn,
at all layers; style fidelity f says how the unconditional half of guidance sees the reference:
f Attn(x) + (1 - f) Attn(x, reference). At 1 guidance pushes towards the reference the most.

Where this departs from it:
- no reference_adain (it is that pipeline's default, and no part of reference-only control);
- the reference is scaled to the picture's side and cropped to its central square, which is what
  the SSR-Encoder and IP-Adapter see of it too; there the picture takes the reference's size;
- of several references the tokens are all attended to; there one image serves a prompt.
The random numbers follow the same order: a picture's noise, the reference's latent, then the
reference's noise at every step, all of the picture's own seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from pipeline.config import EvaluateConfig
from pipeline.errors import UserError
from pipeline.evaluation.benches import Bench, Request
from pipeline.evaluation.methods.method import Drawn
from pipeline.evaluation.methods.shared import denoising, in_batches, whole_images
from pipeline.generation.sampler import denoise, load_base, side_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class ReferenceOnly:
    """Stable Diffusion under reference-only control; cfg.fidelity is the style fidelity, 0 to 1.

    It has no selection: of each reference of a request the first image conditions. Fidelity 0 is
    not the plain picture: both halves of guidance see the reference then.
    """

    native, learns = True, False
    title = "Reference only"

    def __init__(self, name: str, cfg: EvaluateConfig) -> None:
        if not 0 <= cfg.fidelity <= 1:
            raise UserError(f"fidelity: {cfg.fidelity} is not within 0 to 1; choose another")
        self.name, self.cfg = name, cfg
        self.settings: dict[str, Any] = {
            "method": "reference-only",
            "fidelity": cfg.fidelity,
            **denoising(cfg),
        }
        self._pipe: Any = None
        self._control: ReferenceControl | None = None

    def check(self, bench: Bench) -> None: ...

    def open(self) -> None:
        if self._pipe is None:
            self._pipe = load_base(self.cfg)
            self._control = ReferenceControl(self._pipe, self.cfg.fidelity)

    def close(self) -> None:
        if self._control is not None:
            self._control.remove()
        self._pipe = self._control = None

    def __call__(self, requests: Sequence[Request]) -> list[Drawn]:
        pictures = in_batches(
            requests, self.cfg.batch_size, self._draw, lambda request: len(whole_images(request))
        )
        return [Drawn(picture) for picture in pictures]

    def _draw(self, requests: Sequence[Request]) -> list[Image.Image]:
        assert self._control is not None
        prompts, seeds = [r.prompt for r in requests], [r.seed for r in requests]
        with self._control.showing([whole_images(r) for r in requests], seeds):
            return denoise(self._pipe, self.cfg, prompts, seeds)


class ReferenceControl:
    """Reference attention on a Stable Diffusion pipeline, until it is removed.

    Without `showing` the pipeline draws as it did.
    """

    def __init__(self, pipe: Any, fidelity: float) -> None:
        self._pipe, self.fidelity = pipe, fidelity
        self.looking = False
        """Whether the U-Net runs on the references."""
        self.guided = False
        """Whether its batch is [unconditional, conditional]."""
        self._latents: Tensor | None = None  # (n, m, channels, h, w): m references of n pictures
        self._generators: list[torch.Generator] = []
        self._before = dict(pipe.unet.attn_processors)
        self._layers = {
            name: _ReferenceAttention(self, processor)
            for name, processor in self._before.items()
            if name.endswith("attn1.processor")
        }
        pipe.unet.set_attn_processor({**self._before, **self._layers})
        self._hook = pipe.unet.register_forward_pre_hook(self._look, with_kwargs=True)

    def remove(self) -> None:
        """Leave the U-Net as it was."""
        self._hook.remove()
        self._pipe.unet.set_attn_processor(dict(self._before))

    @contextmanager
    def showing(
        self, images: Sequence[Sequence[Image.Image]], seeds: Sequence[int]
    ) -> Iterator[None]:
        """Pictures of the pipeline's next call look at these images, as many for each.

        seeds: of the pictures; the references' noise is drawn after their own.
        """
        import torch

        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        side = (side_of(self._pipe),) * 2
        squares = [
            ImageOps.fit(image, side, Image.Resampling.LANCZOS) for each in images for image in each
        ]
        vae = self._pipe.vae
        with torch.no_grad():
            pixels = self._pipe.image_processor.preprocess(squares).to(vae.device, vae.dtype)
            found = vae.encode(pixels).latent_dist
        mean = found.mean.unflatten(0, (len(images), -1))
        deviation = found.std.unflatten(0, (len(images), -1))
        self._noise(mean[:, :1])  # the pictures' own
        self._latents = vae.config.scaling_factor * (mean + deviation * self._noise(mean))
        try:
            yield
        finally:
            self._latents = None
            for layer in self._layers.values():
                layer.seen = None

    def _noise(self, like: Tensor) -> Tensor:
        """Normal noise of the shape (n, m, channels, h, w): each picture's of its own generator."""
        import torch

        drawn = [torch.randn(like.shape[1:], generator=each) for each in self._generators]
        return torch.stack(drawn).to(like)

    def _look(self, unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a step: run the U-Net on the references, so that every layer keeps its tokens."""
        if self._latents is None:
            return
        sample, step = args
        scheduler, count = self._pipe.scheduler, self._latents.shape[1]
        clean, noise = self._latents.flatten(0, 1), self._noise(self._latents).flatten(0, 1)
        halves = len(sample) // len(self._latents)
        noisy = scheduler.add_noise(clean, noise, step.reshape(1)).repeat(halves, 1, 1, 1)
        text = kwargs["encoder_hidden_states"].repeat_interleave(count, dim=0)
        self.guided, self.looking = halves == 2, True
        try:
            # the module itself, not its hooks: this is one
            unet.forward(
                scheduler.scale_model_input(noisy, step).to(sample.dtype),
                step,
                **{**kwargs, "encoder_hidden_states": text},
            )
        finally:
            self.looking = False


class _ReferenceAttention:
    """Self-attention over a layer's own tokens and those that it saw of the references."""

    def __init__(self, control: ReferenceControl, plain: Any) -> None:
        self._control, self._plain = control, plain
        self.seen: Tensor | None = None
        """Tokens of the references at this step, (n m, tokens, width)."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        import torch

        seen, self.seen = self.seen, None
        if self._control.looking:
            self.seen = hidden_states
        if self._control.looking or seen is None:
            return self._plain(attn, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        of_each = seen.unflatten(0, (len(hidden_states), -1)).flatten(1, 2)
        joint: Tensor = self._plain(attn, hidden_states, torch.cat([hidden_states, of_each], 1))
        if not self._control.guided:
            return joint
        half, fidelity = len(hidden_states) // 2, self._control.fidelity
        alone = self._plain(attn, hidden_states[:half])
        free = fidelity * alone + (1 - fidelity) * joint[:half]
        return torch.cat([free, joint[half:]])
