"""Mini CLIPModel: contrastive on captions that name attributes, with dense help from exact masks.

Beside CLIP's own loss two dense ones are used, so the towers align in minutes on two cores: each
patch against the words for classes and grounds, and each subject's pooled patches against its
noun phrase. They make the aligner's task easier than with a CLIP that saw captions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline.miniworld import world
from pipeline.miniworld.foundation.corpus import GROUND_NAMES, IMAGE_SIZE, Corpus
from pipeline.miniworld.foundation.fitting import fit
from pipeline.miniworld.foundation.text import CONTEXT, encode

PATCH = 4
BATCH = 64
MEAN, STD = (0.5, 0.5, 0.5), (0.3, 0.3, 0.3)
WORDS = [f"{'an' if w[0] in 'aeiou' else 'a'} {w}" for w in world.CLASSES] + list(GROUND_NAMES)


def image_processor() -> CLIPImageProcessorPil:
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=MEAN, image_std=STD
    )


def normalised(images: np.ndarray) -> torch.Tensor:
    """uint8 (n, h, w, 3) -> what the image processor gives for pictures of the right size."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255.0
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def build(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(2)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "projection_dim": 96,
            **special,
        },
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
            "projection_dim": 96,
        },
        projection_dim=96,
    )
    return CLIPModel(config)


def text_features(clip: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Unit text embeddings (n, 96); the padding past the longest text is not computed."""
    longest = int((ids != clip.config.text_config.eos_token_id).sum(dim=1).max()) + 1
    pooled = clip.text_model(input_ids=ids[:, :longest].to(clip.device)).pooler_output
    return functional.normalize(clip.text_projection(pooled), dim=-1)


def patch_labels(classes: np.ndarray) -> np.ndarray:
    """(n, 32, 32) pixel classes -> (n, 64) class of each patch, -1 where none has 60 %."""
    n, grid = len(classes), IMAGE_SIZE // PATCH
    blocks = classes.reshape(n, grid, PATCH, grid, PATCH).swapaxes(2, 3).reshape(n, grid * grid, -1)
    counts = (blocks[..., None] == np.arange(len(WORDS))).sum(axis=2)
    return np.where(counts.max(-1) >= 0.6 * PATCH * PATCH, counts.argmax(-1), -1)


def contrast(
    a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor, texts: list[str]
) -> torch.Tensor:
    """CLIP's symmetric loss; equal texts count as one another's positives."""
    logits = scale * a @ b.T
    names = np.array(texts)
    same = torch.from_numpy((names[:, None] == names[None, :]).astype(np.float32)).to(a.device)
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (
        functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
    )


def train(
    corpus: Corpus,
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: int,
    device: torch.device,
    say: Callable[[str], None],
) -> CLIPModel:
    clip = build(tokenizer).to(device)
    word_ids = encode(tokenizer, WORDS)
    grid = IMAGE_SIZE // PATCH

    def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        index = rng.integers(len(corpus), size=BATCH)
        captions = [world.caption(corpus.scenes[i], rng.random() < 0.6, rng) for i in index]
        phrases, owner, cover = [], [], []
        for row, i in enumerate(index):
            for number_, spec in enumerate(corpus.scenes[i].subjects):
                phrases.append(world.phrase(spec, rng.random() < 0.7))
                owner.append(row)
                inside = corpus.regions[i] == number_ + 1
                cover.append(inside.reshape(grid, PATCH, grid, PATCH).mean(axis=(1, 3)).ravel())
        vision = clip.vision_model(pixel_values=normalised(corpus.images[index]).to(device))
        texts = text_features(clip, torch.cat([encode(tokenizer, captions + phrases), word_ids]))
        whole, parts, words = texts.split([len(captions), len(phrases), len(WORDS)])
        scale = clip.logit_scale.exp().clamp(max=100)
        images = functional.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        tokens = clip.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
        patches = functional.normalize(clip.visual_projection(tokens), dim=-1)
        weight = torch.from_numpy(np.stack(cover)).float().to(device)
        pooled = (patches[owner] * weight[..., None]).sum(1)
        globally = contrast(images, whole, scale, captions)
        by_phrase = contrast(functional.normalize(pooled, dim=-1), parts, scale, phrases)
        labels = torch.from_numpy(patch_labels(corpus.class_map(index))).to(device)
        by_patch = functional.cross_entropy(
            (scale * patches @ words.T).flatten(0, 1), labels.flatten(), ignore_index=-1
        )
        loss = globally + by_phrase + by_patch
        return {"loss": loss, "caption": globally, "phrase": by_phrase, "patch": by_patch}

    fit("clip", clip, step, steps=steps, peak=1.5e-3, work=work, ema_decay=0.995, say=say)
    return clip


@torch.no_grad()
def scores(clip: CLIPModel, tokenizer: CLIPTokenizer, one: Corpus, two: Corpus) -> dict[str, float]:
    """Held-out checks: class of a single subject, both of two in the top two, colour probes.

    `colour_r2_depth_<k>`: R2 of a ridge regression from the subject's mean hidden state at depth
    k to the RGB of its main and second colour, fitted on half of `one`, scored on the other.
    """
    clip = clip.cpu()
    names = text_features(clip, encode(tokenizer, WORDS[: len(world.CLASSES)]))

    def ranked(corpus: Corpus) -> torch.Tensor:
        pooled = clip.vision_model(pixel_values=normalised(corpus.images)).pooler_output
        return (functional.normalize(clip.visual_projection(pooled), dim=-1) @ names.T).argsort(
            dim=1, descending=True
        )

    top_one, top_two = ranked(one)[:, 0].tolist(), ranked(two)[:, :2].tolist()
    single = [
        world.CLASSES[t] == s.subjects[0].cls for t, s in zip(top_one, one.scenes, strict=True)
    ]
    both = [
        {world.CLASSES[t] for t in pair} == {s.cls for s in scene.subjects}
        for pair, scene in zip(top_two, two.scenes, strict=True)
    ]
    found = {"class_of_one": float(np.mean(single)), "both_of_two": float(np.mean(both))}
    hidden = clip.vision_model(
        pixel_values=normalised(one.images), output_hidden_states=True
    ).hidden_states
    grid = IMAGE_SIZE // PATCH
    cover = (
        (one.regions > 0)
        .reshape(-1, grid, PATCH, grid, PATCH)
        .mean(axis=(2, 4))
        .reshape(len(one), -1)
    )
    weight = torch.from_numpy(cover / cover.sum(1, keepdims=True)).float()
    colours = np.array([np.concatenate(s.subjects[0].palette) for s in one.scenes]) / 255.0
    half = len(one) // 2
    for depth in range(2, len(hidden), 2):
        mean = torch.einsum("np,npd->nd", weight, hidden[depth][:, 1:]).numpy()
        x = np.concatenate([mean, np.ones((len(one), 1))], axis=1)
        solution = np.linalg.solve(
            x[:half].T @ x[:half] + 1e-3 * np.eye(x.shape[1]), x[:half].T @ colours[:half]
        )
        error = ((x[half:] @ solution - colours[half:]) ** 2).sum(0)
        spread = ((colours[half:] - colours[half:].mean(0)) ** 2).sum(0)
        r2 = 1 - error / spread
        found[f"main_colour_r2_depth_{depth}"] = float(r2[:3].mean())
        found[f"second_colour_r2_depth_{depth}"] = float(r2[3:].mean())
    return found
