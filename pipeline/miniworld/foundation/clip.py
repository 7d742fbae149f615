"""Mini CLIPModel: both towers from nothing in minutes, with dense help from exact masks.

The text tower learns first, alone, what its words state; the vision tower is then aligned with it
by CLIP's contrastive loss and by dense ones: each patch against the words for classes and grounds,
each subject's pooled patches against its noun phrase, the picture against the classes in it, and
an outline of the subjects from the second layer (its head is thrown away). They make the aligner's
task easier than with a CLIP that saw captions alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline.miniworld import world
from pipeline.miniworld.foundation.corpus import GROUND_NAMES, IMAGE_SIZE, Corpus
from pipeline.miniworld.foundation.fitting import fit
from pipeline.miniworld.foundation.text import CONTEXT, encode

PATCH = 4
SEED = 2  # of the first weights
BATCH = 64
WEIGHTS = {"caption": 1.0, "phrase": 1.0, "class": 1.0, "patch": 2.0, "ground": 0.3, "outline": 2.0}
TEXT_SCALE = 10.0  # of unit text states in front of the heads that read words and facts off them
TEXT_WEIGHTS = {"facts": 1.0, "padding": 0.5, "words": 1.0, "common": 2.0}
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
    torch.manual_seed(SEED)
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


def attributes(text: str) -> list[int]:
    """Which facts a text states, as indices of 0/1 targets: words, and colours bound to classes."""
    nouns, colours = list(world.CLASSES), list(world.COLOURS)
    plain = [*nouns, *colours, *GROUND_NAMES, "striped"]
    found, pending = [], []
    for word in text.replace(",", " ").split():
        if word in plain:
            found.append(plain.index(word))
        if word in colours:
            pending.append(colours.index(word))
        elif word in nouns:
            base = len(plain) + nouns.index(word) * len(colours)
            found += [base + colour for colour in pending]
            pending = []
    return found


ATTRIBUTES = (
    len(world.CLASSES) * (1 + len(world.COLOURS)) + len(world.COLOURS) + len(GROUND_NAMES) + 1
)


def train_text(
    clip: CLIPModel,
    corpus: Corpus,
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: int,
    say: Callable[[str], None],
) -> None:
    """Teach the text tower what its words state, before there is any picture, and freeze it.

    Trained together from random weights, both towers sit for long on a saddle where all nouns mean
    the same; a text tower that tells them apart gives the vision tower a target from step one. The
    U-Net is trained on this tower too, so it must not change any more.

    What the U-Net, the query and L_reg read is the state of every token, not the pooled text. Left
    to the pooled loss alone the states share one large common part (cosine distance between the
    words for two classes: 0.005), and nothing that is read from them learns. So each word's state
    must name the word by its direction, and the states after the last word the text's facts.
    """
    config, device = clip.config, clip.device
    words = nn.Linear(config.text_config.hidden_size, len(tokenizer), bias=False).to(device)
    facts = nn.ModuleList(
        nn.Linear(width, ATTRIBUTES).to(device)
        for width in (config.projection_dim, config.text_config.hidden_size)
    )
    parts = nn.ModuleDict(
        {
            "text": clip.text_model,
            "projection": clip.text_projection,
            "words": words,  # the heads are thrown away afterwards
            "facts": facts,
        }
    )
    rows = torch.arange(2 * BATCH)

    def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        scenes = [corpus.scenes[i] for i in rng.integers(len(corpus), size=2 * BATCH)]
        texts = [world.caption(s, rng.random() < 0.7, rng) for s in scenes[:BATCH]]
        texts += [world.phrase(s.subjects[0], rng.random() < 0.7) for s in scenes[BATCH:]]
        target = torch.zeros(len(texts), ATTRIBUTES)
        for row, stated in enumerate(texts):
            target[row, attributes(stated)] = 1.0
        target, ids = target.to(device), encode(tokenizer, texts)
        ends = (ids == config.text_config.eos_token_id).int().argmax(dim=1)
        later = torch.from_numpy(rng.integers(ends.numpy(), ids.shape[1]))
        places = torch.arange(ids.shape[1])
        named = (places > 0) & (places < ends[:, None])
        output = clip.text_model(input_ids=ids.to(device))
        pooled = functional.normalize(clip.text_projection(output.pooler_output), dim=-1)
        states = functional.normalize(output.last_hidden_state, dim=-1)
        padding = states[rows, later]
        read = TEXT_SCALE * states[named] @ functional.normalize(words.weight, dim=-1).T
        losses = {
            name: ATTRIBUTES
            * functional.binary_cross_entropy_with_logits(head(TEXT_SCALE * state), target)
            for name, head, state in zip(
                ("facts", "padding"), facts, (pooled, padding), strict=True
            )
        }
        losses["words"] = functional.cross_entropy(read, ids[named].to(device))
        losses["common"] = padding.mean(dim=0).square().sum()
        total = torch.stack([TEXT_WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        return {"loss": total, **losses}

    fit("clip_text", parts, step, steps=steps, peak=3e-3, work=work, ema_decay=0.98, say=say)
    for part in (clip.text_model, clip.text_projection):
        part.requires_grad_(False)


def train_vision(
    clip: CLIPModel,
    corpus: Corpus,
    tokenizer: CLIPTokenizer,
    work: Path,
    steps: int,
    say: Callable[[str], None],
) -> None:
    """Align the vision tower with the frozen text tower."""
    width, device = clip.config.vision_config.hidden_size, clip.device
    outline = nn.Linear(width, PATCH * PATCH).to(device)  # thrown away afterwards
    parts = nn.ModuleDict(
        {"vision": clip.vision_model, "projection": clip.visual_projection, "outline": outline}
    )
    parts.register_parameter("scale", clip.logit_scale)
    grid = IMAGE_SIZE // PATCH
    with torch.no_grad():
        words = text_features(clip, encode(tokenizer, WORDS))

    def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        index = rng.integers(len(corpus), size=BATCH)
        captions = [world.caption(corpus.scenes[i], rng.random() < 0.6, rng) for i in index]
        phrases, owner, cover, present = [], [], [], np.zeros((BATCH, len(world.CLASSES)))
        for row, i in enumerate(index):
            for place, spec in enumerate(corpus.scenes[i].subjects):
                phrases.append(world.phrase(spec, rng.random() < 0.6))
                owner.append(row)
                inside = corpus.regions[i] == place + 1
                cover.append(inside.reshape(grid, PATCH, grid, PATCH).mean(axis=(1, 3)).ravel())
                present[row, world.CLASSES.index(spec.cls)] = 1
        with torch.no_grad():
            texts = text_features(clip, encode(tokenizer, captions + phrases))
        whole, named = texts.split([len(captions), len(phrases)])
        vision = clip.vision_model(
            pixel_values=normalised(corpus.images[index]).to(device), output_hidden_states=True
        )
        scale = clip.logit_scale.exp().clamp(max=100)
        images = functional.normalize(clip.visual_projection(vision.pooler_output), dim=-1)
        tokens = clip.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
        patches = functional.normalize(clip.visual_projection(tokens), dim=-1)
        weight = torch.from_numpy(np.stack(cover)).float().to(device)
        pooled = functional.normalize((patches[owner] * weight[..., None]).sum(1), dim=-1)
        share = torch.from_numpy(present / present.sum(1, keepdims=True)).float().to(device)
        losses = {
            "caption": contrast(images, whole, scale, captions),
            "phrase": contrast(pooled, named, scale, phrases),
            "class": functional.cross_entropy(
                scale * images @ words[: len(world.CLASSES)].T, share
            ),
        }
        labels = torch.from_numpy(patch_labels(corpus.class_map(index))).to(device)
        on_subject = (labels >= 0) & (labels < len(world.CLASSES))
        for name, chosen in (("patch", on_subject), ("ground", (labels >= 0) & ~on_subject)):
            losses[name] = functional.cross_entropy(
                scale * patches[chosen] @ words.T, labels[chosen]
            )
        inside = (corpus.regions[index] > 0).reshape(BATCH, grid, PATCH, grid, PATCH)
        shape = torch.from_numpy(inside.swapaxes(2, 3).reshape(BATCH, grid * grid, -1)).float()
        losses["outline"] = functional.binary_cross_entropy_with_logits(
            outline(vision.hidden_states[2][:, 1:]), shape.to(device)
        )
        total = torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()
        return {"loss": total, **losses}

    fit("clip_vision", parts, step, steps=steps, peak=1.5e-3, work=work, ema_decay=0.995, say=say)


@torch.no_grad()
def scores(clip: CLIPModel, tokenizer: CLIPTokenizer, one: Corpus, two: Corpus) -> dict[str, float]:
    """Held-out checks: class of a single subject, both of two in the top two, colour probes.

    `<what>_colour_r2_depth_<k>`: R2 of a ridge regression from the subject's mean hidden state at
    depth k to an RGB, fitted on half of `one`, scored on the other. `mean` is the subject's mean
    colour; `main` and `second` are its two colours apart, which a mean cannot separate.
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
    inside = (one.regions > 0)[..., None]
    mean_rgb = (one.images * inside).sum(axis=(1, 2)) / inside.sum(axis=(1, 2)) / 255.0
    named_rgb = np.array([np.concatenate(s.subjects[0].palette) for s in one.scenes]) / 255.0
    colours = np.concatenate([mean_rgb, named_rgb], axis=1)
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
        for place, name in enumerate(("mean", "main", "second")):
            found[f"{name}_colour_r2_depth_{depth}"] = float(r2[3 * place : 3 * place + 3].mean())
    return found
