"""Tiny random models in the libraries' own folder layouts, made once per test session.

They have the mini world's shapes: 32x32 images, a VAE that downsamples by 4, CLIP patches of 4
pixels. Every weight is random and seeded,
so nothing is downloaded and nothing is learned: they show that the plumbing is right.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only wait for each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# A shell lets its background jobs ignore Ctrl-C, and theirs inherit it; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, signal.default_int_handler)
# Ray gives its parts little time to come up, which a machine full of tests misses. A Ray reads them
# as it starts, so they are here: for clusters of this process and of all that it starts.
for _name, _value in {
    "raylet_start_wait_time_s": 180,
    "agent_register_timeout_ms": 300_000,
    "worker_register_timeout_seconds": 300,
    "gcs_rpc_server_connect_timeout_s": 60,
}.items():
    os.environ.setdefault(f"RAY_{_name}", str(_value))

WORDS = [
    "a",
    "an",
    "the",
    "and",
    "of",
    "on",
    "in",
    "with",
    "at",
    "photo",
    "picture",
    "two",
    "three",
    "red",
    "green",
    "blue",
    "white",
    "black",
    "yellow",
    "pink",
    "orange",
    "purple",
    "fish",
    "tree",
    "house",
    "cup",
    "star",
    "car",
    "mushroom",
    "boat",
    "key",
    "flower",
    "sand",
    "grass",
    "water",
    "snow",
    "brick",
    "beach",
]
CONTEXT_TOKENS = 24
IMAGE_SIZE = 32


def write_clip_tokenizer(folder: Path) -> Path:
    """A real byte-level CLIP tokenizer: vocab.json, merges.txt and the special tokens,
    `CONTEXT_TOKENS` long.
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = [chr(byte) for byte in visible] + [chr(256 + i) for i in range(len(hidden))]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            parts = ["".join(pair), *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    return folder


def make_clip(folder: Path, tokenizer_folder: Path) -> None:
    """`CLIPModel` (both towers) with its tokenizer and a `CLIPImageProcessorPil` configuration."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    config = CLIPConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT_TOKENS,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 4,
        },
        projection_dim=32,
    )
    torch.manual_seed(1)
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


def make_sd(folder: Path, clip_folder: Path) -> None:
    """A `StableDiffusionPipeline` (v-prediction, DDIM) on the text tower of the CLIP in
    `clip_folder`.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=0.7,
    )
    text_encoder = CLIPTextModel.from_pretrained(clip_folder)
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=16,
        out_channels=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(clip_folder),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def make_blip2(folder: Path) -> None:
    """`Blip2ForConditionalGeneration` on a two-layer OPT, with the files of `Blip2Processor`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessorPil,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<image>", *WORDS])}
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
    query_tokens = 4
    config = Blip2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        qformer_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": 32,
            "initializer_range": 0.2,
        },
        text_config={
            "model_type": "opt",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "init_std": 0.2,
        },
        num_query_tokens=query_tokens,
        image_token_index=vocabulary["<image>"],
    )
    torch.manual_seed(3)
    model = Blip2ForConditionalGeneration(config).eval()
    # Random words that differ from image to image: no tied head that repeats the start token (and
    # so ends at once), no special token in a caption, and visual tokens as loud as the positions.
    decoder = model.language_model.model.decoder
    head = torch.randn_like(decoder.embed_tokens.weight)
    head[: len(vocabulary) - len(WORDS)] = 0
    with torch.no_grad():
        model.language_model.lm_head.weight = torch.nn.Parameter(head)
        model.query_tokens.normal_()
        model.language_projection.weight.mul_(20)
    for part in (model.config, model.config.text_config):
        part.tie_word_embeddings = False
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    Blip2Processor(
        BlipImageProcessorPil(size=size), tokenizer, num_query_tokens=query_tokens
    ).save_pretrained(folder)


LONG = ("test_curate", "test_submit", "test_train", "test_runner", "test_train_chaos", "test_demo")
"""Files of minutes each, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: at the end no process waits for another's last file."""

    def place(item: pytest.Item) -> tuple[bool, int]:
        system, name = "system" in item.path.parts, item.path.stem
        return not system, LONG.index(name) if system and name in LONG else len(LONG)

    items.sort(key=place)


def make_dinos(folder: Path) -> None:
    """dino/ (`ViTModel`) and dinov2/ (`Dinov2Model`), each with its image processor's
    configuration: the first squeezes a picture into its square, the second crops.
    """
    import torch
    from transformers import (
        BitImageProcessorPil,
        Dinov2Config,
        Dinov2Model,
        ViTConfig,
        ViTImageProcessorPil,
        ViTModel,
    )

    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "initializer_range": 0.2,
    }
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    torch.manual_seed(4)
    dino = ViTModel(ViTConfig(intermediate_size=64, **shape), add_pooling_layer=False)
    dino.eval().save_pretrained(folder / "dino")
    square = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ViTImageProcessorPil(size=square, image_mean=mean, image_std=deviation).save_pretrained(
        folder / "dino"
    )
    torch.manual_seed(5)
    Dinov2Model(Dinov2Config(**shape)).eval().save_pretrained(folder / "dinov2")
    BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE * 8 // 7},
        crop_size=square,
        image_mean=mean,
        image_std=deviation,
    ).save_pretrained(folder / "dinov2")


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with sd/ (StableDiffusionPipeline), clip/ (CLIPModel), blip2/
    (Blip2ForConditionalGeneration), dino/ (ViTModel) and dinov2/ (Dinov2Model).
    """
    folder = tmp_path_factory.mktemp("models")
    tokenizer = write_clip_tokenizer(folder / "tokenizer")
    make_clip(folder / "clip", tokenizer)
    make_sd(folder / "sd", folder / "clip")
    make_blip2(folder / "blip2")
    make_dinos(folder)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, str]]:
    """A real S3 server over HTTP (moto): the environment that leads s3:// to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server.stop()


@pytest.fixture(scope="module")
def bucket(s3_server: dict[str, str]) -> Iterator[str]:
    """s3:// and a new bucket, for this process and all that it starts in the module's tests."""
    import boto3

    name = f"bucket-{uuid.uuid4().hex}"
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3_server.items():
            patch.setenv(key, value)
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}"
