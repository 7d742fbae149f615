"""Mini BLIP-2: transformers' Blip2ForConditionalGeneration, taught to caption without attributes.

Web captions rarely describe appearance exactly; what SSR needs from its captioner is the nouns.
Its vision tower starts from CLIP's, as BLIP-2's own did, and keeps a dense loss of patches against
classes (a head that is thrown away).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from pipeline.miniworld import world
from pipeline.miniworld.foundation.clip import MEAN, STD, WORDS, normalised, patch_labels
from pipeline.miniworld.foundation.corpus import IMAGE_SIZE, Corpus
from pipeline.miniworld.foundation.fitting import fit
from pipeline.miniworld.foundation.text import words

SEED = 4  # of the first weights
BATCH = 48
QUERIES = 8


def build_processor() -> Blip2Processor:
    special = ["<pad>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="</s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = BlipImageProcessorPil(size=side, image_mean=MEAN, image_std=STD)
    return Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)


def build(processor: Blip2Processor, vision: CLIPVisionModel) -> Blip2ForConditionalGeneration:
    """A BLIP-2 whose vision tower has the shape of CLIP's, and starts from its weights."""
    torch.manual_seed(SEED)
    tokenizer = processor.tokenizer
    tower = vision.config
    config = Blip2Config(
        vision_config={
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_hidden_layers,
            "num_attention_heads": tower.num_attention_heads,
            "hidden_act": tower.hidden_act,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
        },
        qformer_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": tower.hidden_size,
            "cross_attention_frequency": 1,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "word_embed_proj_dim": 96,
            "ffn_dim": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    start_from(model.vision_model, vision)
    return model


@torch.no_grad()
def start_from(ours: Any, clip: CLIPVisionModel) -> None:
    """Copy CLIP's vision tower into BLIP-2's, which fuses q, k, v and has no LayerNorm in front.

    That LayerNorm is folded into the embeddings with the spread that noise gives; training mends
    the rest.
    """
    embeddings, norm = clip.embeddings, clip.pre_layrnorm
    side = clip.config.image_size
    spread = embeddings(torch.randn(16, 3, side, side)).std(dim=-1).mean()
    gain = norm.weight / spread
    place = embeddings.position_embedding.weight * gain + norm.bias
    ours.embeddings.patch_embedding.weight.copy_(
        embeddings.patch_embedding.weight * gain[:, None, None, None]
    )
    ours.embeddings.patch_embedding.bias.zero_()
    ours.embeddings.position_embedding.copy_(place[None])
    ours.embeddings.class_embedding.copy_(embeddings.class_embedding * gain)
    for mine, theirs in zip(ours.encoder.layers, clip.encoder.layers, strict=True):
        attention = theirs.self_attn
        towers = (attention.q_proj, attention.k_proj, attention.v_proj)
        mine.self_attn.qkv.weight.copy_(torch.cat([tower.weight for tower in towers]))
        mine.self_attn.qkv.bias.copy_(torch.cat([tower.bias for tower in towers]))
        mine.self_attn.projection.load_state_dict(attention.out_proj.state_dict())
        for name in ("layer_norm1", "layer_norm2", "mlp"):
            getattr(mine, name).load_state_dict(getattr(theirs, name).state_dict())
    ours.post_layernorm.load_state_dict(clip.post_layernorm.state_dict())


def captioned(corpus: Corpus, index: np.ndarray) -> list[str]:
    """The plain caption, subjects from left to right, so that there is one right answer."""
    out = []
    for i in index:
        scene = corpus.scenes[i]
        ordered = tuple(sorted(scene.subjects, key=lambda s: s.cx))
        out.append(world.caption(world.Scene(ordered, scene.ground, scene.phase)))
    return out


def train(
    corpus: Corpus,
    processor: Blip2Processor,
    vision: CLIPVisionModel,
    work: Path,
    steps: int,
    device: torch.device,
    say: Callable[[str], None],
) -> Blip2ForConditionalGeneration:
    model = build(processor, vision)
    head = nn.Linear(model.config.vision_config.hidden_size, len(WORDS))
    both = nn.ModuleDict({"model": model, "head": head}).to(device)
    tokenizer = processor.tokenizer
    image_ids = torch.full((BATCH, QUERIES), model.config.image_token_index)

    def step(number: int, rng: np.random.Generator) -> Mapping[str, torch.Tensor]:
        index = rng.integers(len(corpus), size=BATCH)
        text = tokenizer(
            [f"{c} </s>" for c in captioned(corpus, index)], padding=True, return_tensors="pt"
        )
        pixel_values = normalised(corpus.images[index])
        labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
        labels[:, 0] = -100  # the leading </s> is given, not predicted
        # OPT's end and beginning share a token: the one at the end is a target
        out = model(
            pixel_values=pixel_values.to(device),
            input_ids=torch.cat([image_ids, text["input_ids"]], dim=1).to(device),
            attention_mask=torch.cat(
                [torch.ones_like(image_ids), text["attention_mask"]], dim=1
            ).to(device),
            labels=torch.cat([torch.full_like(image_ids, -100), labels], dim=1).to(device),
        )
        patches = out.vision_outputs.last_hidden_state[:, 1:]
        classes = torch.from_numpy(patch_labels(corpus.class_map(index))).to(device)
        dense = functional.cross_entropy(
            head(patches).flatten(0, 1), classes.flatten(), ignore_index=-1
        )
        return {"loss": out.loss + dense, "caption": out.loss, "patch": dense}

    fit("blip2", both, step, steps=steps, peak=1e-3, work=work, ema_decay=0.995, say=say)
    return model


@torch.no_grad()
def scores(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, corpus: Corpus
) -> dict[str, float]:
    """Held-out captions, greedy: exactly the right classes named; the right ground named."""
    from PIL import Image

    model = model.cpu()
    images = [Image.fromarray(image) for image in corpus.images]
    inputs = processor(images=images, text=[""] * len(images), return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=24)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    classes, grounds = [], []
    for text, scene in zip(texts, corpus.scenes, strict=True):
        named = [w for w in text.replace(",", " ").split() if w in world.CLASSES]
        classes.append(sorted(named) == sorted(s.cls for s in scene.subjects))
        grounds.append(text.split()[-1:] == [scene.ground])
    return {"exact_classes": float(np.mean(classes)), "ground": float(np.mean(grounds))}
