"""Mini text-to-image: diffusers' UNet2DConditionModel on the mini VAE's latents, v-prediction.

Half of the subjects in its captions name their colours. The loss is weighted towards subjects
(exact masks), which cover a tenth of the picture, and pictures of a single subject are shown most:
both shorten the training. It is trained twice: first every part of a subject counts by its size;
then, more briefly, by either of its colours alike, for a tree's trunk or the teeth of a key cover
a fiftieth of a picture and were left in any colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from pipeline.miniworld import world
from pipeline.miniworld.foundation.corpus import IMAGE_SIZE, Corpus
from pipeline.miniworld.foundation.fitting import StepFn, fit
from pipeline.miniworld.foundation.text import encode
from pipeline.miniworld.foundation.vae import pixels
from pipeline.miniworld.judge import Judge, named_colours

SEED = 3  # of the first weights
BATCH = 32
DROP_PROMPT = 0.1
SUBJECT_WEIGHT = 3.0  # of a latent that a subject covers, against 1 for the ground
PART_WEIGHT = 0.15  # of either colour of a subject in the second training, in shares of a picture
LARGEST_WEIGHT = 8.0  # of a latent: the smallest parts are blurred at this size, and never right
TIME_LOGIT = (0.3, 1.2)  # mean and deviation of the logit of t / T
COUNT_SHARES = {1: 0.6, 2: 0.35, 3: 0.05}  # of the pictures by number of subjects


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's own noise schedule, v-prediction, and no signal left at the last step.

    Few and strongly correlated latents would otherwise shine through the last step's noise, and
    the ground, which sampling has to find in pure noise, would never be learned there.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def build(vae: AutoencoderKL, text_encoder: CLIPTextModel) -> UNet2DConditionModel:
    torch.manual_seed(SEED)
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=(2, 4),  # heads, by diffusers' naming: 32 channels each
        norm_num_groups=8,
    ).to(memory_format=torch.channels_last)


@torch.no_grad()
def encode_corpus(vae: AutoencoderKL, corpus: Corpus) -> torch.Tensor:
    """Scaled posterior means, float16 (n, c, 8, 8)."""
    parts = []
    for start in range(0, len(corpus), 256):
        batch = pixels(corpus.images[start : start + 256]).to(vae.device)
        parts.append((vae.encode(batch).latent_dist.mean * vae.config.scaling_factor).half().cpu())
    return torch.cat(parts)


def weights_by_size(corpus: Corpus, side: int) -> torch.Tensor:
    """Weight of each latent by how much of it subjects cover, float32 (n, 1, side, side)."""
    cover = torch.from_numpy(corpus.regions > 0).float()[:, None]
    return 1 + (SUBJECT_WEIGHT - 1) * functional.adaptive_avg_pool2d(cover, side)


def weights_by_part(corpus: Corpus, side: int) -> torch.Tensor:
    """Weight of each latent by what parts cover it, every part the same in all, (n, 1, side, side).

    A part is the pixels of a subject that are nearest to one of its two colours.
    """
    out = torch.ones(len(corpus), 1, side, side)
    for i, scene in enumerate(corpus.scenes):
        image = corpus.images[i].astype(np.float32)
        for place, spec in enumerate(scene.subjects):
            gaps = [((image - colour) ** 2).sum(-1) for colour in spec.palette]
            inside, first = corpus.regions[i] == place + 1, gaps[0] <= gaps[1]
            for part in (inside & first, inside & ~first):
                cover = torch.from_numpy(part).float()[None]
                share = cover.mean().clamp_min(1 / part.size)
                out[i] += PART_WEIGHT * functional.adaptive_avg_pool2d(cover, side) / share
    return out.clamp_max(LARGEST_WEIGHT)


def train(
    corpus: Corpus,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: tuple[int, int],
    device: torch.device,
    say: Callable[[str], None],
) -> UNet2DConditionModel:
    """Both trainings from nothing; `steps` of each."""
    unet = build(vae, text_encoder).to(device)
    step = step_function(unet, corpus, vae.to(device), text_encoder.to(device), tokenizer, device)
    side = unet.config.sample_size
    known: dict[str, Any] = {"work": work, "ema_decay": 0.999, "warmup": 300, "say": say}
    fit("unet", unet, step(weights_by_size(corpus, side)), steps=steps[0], peak=1e-3, **known)
    by_part, second = step(weights_by_part(corpus, side)), work / "unet_parts.pt"
    if second.exists() and second.stat().st_mtime_ns < (work / "unet.pt").stat().st_mtime_ns:
        second.unlink()  # it went on from a first training that has been lengthened since
    fit("unet_parts", unet, by_part, steps=steps[1], peak=4e-4, seed=1, **known)
    return unet


def step_function(
    unet: UNet2DConditionModel,
    corpus: Corpus,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    device: torch.device,
) -> Callable[[torch.Tensor], StepFn]:
    """weights (n, 1, side, side) -> the step of a training whose loss is weighted by them."""
    latents = encode_corpus(vae, corpus)
    alphas = scheduler().alphas_cumprod
    counts = np.array([len(scene.subjects) for scene in corpus.scenes])
    chances = sum((counts == n) * share / (counts == n).sum() for n, share in COUNT_SHARES.items())
    edges = np.cumsum(chances)

    def weighted(weights: torch.Tensor) -> StepFn:
        def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
            index = np.searchsorted(edges, rng.random(BATCH) * edges[-1])
            captions = [
                ""
                if rng.random() < DROP_PROMPT
                else world.caption(corpus.scenes[i], rng.random() < 0.75, rng)
                for i in index
            ]
            with torch.no_grad():
                text = text_encoder(encode(tokenizer, captions).to(device)).last_hidden_state
            clean = latents[index].float()
            # middle noise levels most: shapes are decided there, and the ends learn fast
            middle = 1 / (1 + np.exp(-rng.normal(*TIME_LOGIT, size=BATCH)))
            times = torch.from_numpy((middle * len(alphas)).astype(np.int64))
            signal = alphas[times].view(-1, 1, 1, 1)
            noise = torch.randn_like(clean)
            noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            target = signal.sqrt() * noise - (1 - signal).sqrt() * clean
            noisy = noisy.to(device, memory_format=torch.channels_last)
            error = (unet(noisy, times.to(device), text).sample - target.to(device)).square()
            loss = (weights[index].to(device) * error).mean()
            return {"loss": loss, "mse": error.mean()}

        return step

    return weighted


def pipeline(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SAMPLINGS = {
    "guidance_3.0": {"guidance_scale": 3.0},
    "guidance_7.5": {"guidance_scale": 7.5},
    "guidance_7.5_rescaled_0.7": {"guidance_scale": 7.5, "guidance_rescale": 0.7},  # as in presets
}


def scores(
    pipe: StableDiffusionPipeline, judge: Judge, count: int, sampling: str
) -> tuple[dict[str, float], np.ndarray]:
    """Text to image on held-out single subjects: class found, both colours found; and the pictures.

    `sampling` is one of SAMPLINGS. A colour is found when 12 % of the pixels that the judge gives
    to the class are nearest to it.
    """
    scenes = [world.scene(seed, "val", 1) for seed in range(count)]
    prompts = [world.caption(scene, True) for scene in scenes]
    made = []
    for start in range(0, count, 50):
        generator = torch.Generator().manual_seed(start)
        batch = prompts[start : start + 50]
        images = pipe(
            batch,
            num_inference_steps=30,
            generator=generator,
            output_type="np",
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            **SAMPLINGS[sampling],
        ).images
        made.append(images)
    pictures = np.concatenate(made)
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    present, labels = judge.present(tensor), judge.segment(tensor).numpy()
    classes, colours = [], []
    for i, scene in enumerate(scenes):
        spec = scene.subjects[0]
        number = world.CLASSES.index(spec.cls)
        classes.append(bool(present[i, number]))
        seen = named_colours(pictures[i][labels[i] == number + 1] * 255.0)
        colours.append({spec.identity.main, spec.identity.second} <= seen)
    return {
        f"class_named_{sampling}": float(np.mean(classes)),
        f"colours_named_{sampling}": float(np.mean(colours)),
    }, pictures
