"""Every kind of pipeline that the SSR-Encoder drives, against references that are written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssr_model import Subject
from ssr_model.frozen import load_text
from ssr_model.text import QueryEncoder
from tests.ssr_model.written import close, write_out

SIDE = 32


def subjects(kit: Any) -> tuple[Subject, Subject]:
    region = np.zeros((8, 8))
    region[:, 2:] = 1
    mask = np.zeros((SIDE, SIDE), bool)
    mask[8:24, 4:20] = True
    return Subject(kit.image, query="red fish"), Subject(
        kit.image, mask=mask, scale=0.6, region=region
    )


def steps(count: int = 3) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(0)
    return {"num_inference_steps": count, "output_type": "latent", "generator": noise}


def check(ssr: Any, pipe: Any, run: Callable[..., Any], rows: list[list[Subject]]) -> Any:
    """Guided and unguided: nothing without subjects, the written-out reference with them, and the
    plain pipeline again after `detach`. Gives the guided result.
    """
    pipe.set_progress_bar_config(disable=True)
    results = []
    for guidance in (5.0, 1.0):
        plain = run(guidance_scale=guidance)
        ssr.attach(pipe)
        found = run(guidance_scale=guidance, **ssr.condition(rows))
        assert torch.equal(run(guidance_scale=guidance, **ssr.condition([])), plain)
        ssr.detach()
        assert torch.equal(run(guidance_scale=guidance), plain)
        assert (found - plain).abs().mean() > 0.003
        before = dict(pipe.unet.attn_processors)
        nobody: list[list[Subject]] = [[]] * len(rows) if guidance > 1 else []
        write_out(ssr, pipe.unet, nobody + rows)
        close(found, run(guidance_scale=guidance))
        pipe.unet.set_attn_processor(before)
        results.append(found)
    return results[0]


@pytest.fixture
def four_channels(kit: Any) -> Any:
    """The kit's pipeline with the four latent channels that inpainting wants."""
    vae, unet = kit.pipe.vae, kit.pipe.unet
    torch.manual_seed(3)
    vae = type(vae).from_config(dict(vae.config) | {"latent_channels": 4})
    unet = type(unet).from_config(dict(unet.config) | {"in_channels": 4, "out_channels": 4})
    kit.pipe.register_modules(vae=vae.eval(), unet=unet.eval())
    return kit.pipe


@torch.no_grad()
def test_img2img(kit: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline(**kit.pipe.components, requires_safety_checker=False)
    a, b = subjects(kit)

    def run(**kwargs: Any) -> Any:
        start = Image.fromarray(kit.image)
        return pipe(["a fish", "a cup"], image=start, strength=0.8, **steps(5), **kwargs).images

    check(kit.ssr, pipe, run, [[a], [a, b]])


@torch.no_grad()
@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint(kit: Any, four_channels: Any, channels: int) -> None:
    """Plain models, and those trained to inpaint, which see mask and masked image too."""
    from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel

    parts = dict(four_channels.components)
    if channels == 9:
        config = dict(parts["unet"].config) | {"in_channels": channels}
        parts["unet"] = UNet2DConditionModel.from_config(config).eval()
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    a, b = subjects(kit)

    def run(**kwargs: Any) -> Any:
        pictures = {"image": Image.fromarray(kit.image), "mask_image": Image.fromarray(kit.mask)}
        size = {"height": SIDE, "width": SIDE, "strength": 1.0}
        return pipe(["a fish", "a cup"], **pictures, **size, **steps(), **kwargs).images

    check(kit.ssr, pipe, run, [[a], [a, b]])


def control_net(unet: Any, seed: int) -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    # two halvings of the control image, as the tiny VAE has
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 16)).eval()
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_", "controlnet_cond_embedding.conv_out")):
            parameter.normal_(std=0.2)  # zero at the start of its training: it would do nothing
    return net


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_control_nets(kit: Any, count: int) -> None:
    from diffusers import StableDiffusionControlNetPipeline

    nets = [control_net(kit.pipe.unet, seed) for seed in range(count)]
    pipe = StableDiffusionControlNetPipeline(
        **kit.pipe.components,
        controlnet=nets if count > 1 else nets[0],
        requires_safety_checker=False,
    )
    a, b = subjects(kit)
    control = Image.fromarray(kit.image)
    seen: list[Any] = []
    for net in nets:
        net.register_forward_pre_hook(lambda _, args, kw: seen.append((args, kw)), with_kwargs=True)
        net.register_forward_hook(lambda _, args, output: seen.append(output[0]))

    def run(strength: float = 1.0, **kwargs: Any) -> Any:
        images = [control] * count if count > 1 else control
        scale = [strength] * count if count > 1 else strength
        given = {"image": images, "controlnet_conditioning_scale": scale}
        return pipe(["a fish", "a cup"], **given, **steps(), **kwargs).images

    processors = [dict(net.attn_processors) for net in nets]
    check(kit.ssr, pipe, run, [[a], [a, b]])
    told = [each[1] for each in seen if len(each) == 2]
    assert told and all(kwargs.get("cross_attention_kwargs") is None for kwargs in told)
    assert [net.attn_processors for net in nets] == processors
    # the first step, where the latents are the same: what the ControlNet says does not change
    seen.clear()
    run()
    plain = seen[1]
    kit.ssr.attach(pipe)
    seen.clear()
    controlled = run(**kit.ssr.condition([[a], [a, b]]))
    assert all(torch.equal(one, other) for one, other in zip(seen[1], plain, strict=True))
    # and the ControlNet acts beside the subjects
    assert (controlled - run(0.0, **kit.ssr.condition([[a], [a, b]]))).abs().mean() > 0.003


@torch.no_grad()
def test_animate_diff(kit: Any) -> None:
    pipe = animate(kit)
    a, b = subjects(kit)

    def run(**kwargs: Any) -> Any:
        size = {"num_frames": 3, "height": SIDE, "width": SIDE}
        return pipe(["a fish", "a cup"], **size, **steps(), **kwargs).frames

    frames = check(kit.ssr, pipe, run, [[a], [a, b]])
    assert frames.shape[0] == 2 and 3 in frames.shape
    assert not any("motion_modules" in name for name in kit.ssr.config.layers)


def animate(kit: Any) -> Any:
    from diffusers import AnimateDiffPipeline, MotionAdapter

    torch.manual_seed(5)
    motion = MotionAdapter(
        block_out_channels=tuple(kit.pipe.unet.config.block_out_channels),
        motion_layers_per_block=1,
        motion_num_attention_heads=4,
        motion_norm_num_groups=4,
    ).eval()
    parts = {k: v for k, v in kit.pipe.components.items() if k != "safety_checker"}
    pipe = AnimateDiffPipeline(**parts, motion_adapter=motion)
    for parameter in pipe.unet.parameters():
        if not parameter.any():
            parameter.normal_(std=0.2)  # the motion modules' last layers begin at zero
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- Stable Diffusion XL ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def xl_folder(tiny_models: Path, tmp_path_factory: Any) -> Path:
    """A tiny StableDiffusionXLPipeline: two text encoders, several transformer layers in a block,
    the size conditioning, and a second tokenizer that pads otherwise.
    """
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    first = CLIPTextModel.from_pretrained(tiny_models / "sd", subfolder="text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(tiny_models / "sd", subfolder="tokenizer")
    second_tokenizer = CLIPTokenizer.from_pretrained(
        tiny_models / "sd", subfolder="tokenizer", pad_token="!"
    )
    torch.manual_seed(8)
    config = first.config.to_dict() | {"hidden_size": 40, "projection_dim": 24}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    unet = UNet2DConditionModel(
        sample_size=SIDE // 4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32 + 40,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    )
    folder = tmp_path_factory.mktemp("xl")
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=second_tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text to image", "img2img", "inpaint", "ControlNet"])
def test_sdxl(kit: Any, build_ssr: Any, xl_folder: Path, kind: str) -> None:
    import diffusers

    base = diffusers.StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    ssr = build_ssr(base.unet, base=xl_folder)
    assert ssr.config.text_dim == 72
    a, b = subjects(kit)
    picture = Image.fromarray(kit.image)
    given: dict[str, Any] = {"height": SIDE, "width": SIDE}
    if kind == "text to image":
        pipe: Any = base
    elif kind == "img2img":
        pipe = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components)
        given = {"image": picture, "strength": 0.8}
    elif kind == "inpaint":
        pipe = diffusers.StableDiffusionXLInpaintPipeline(**base.components)
        given |= {"image": picture, "mask_image": Image.fromarray(kit.mask), "strength": 1.0}
    else:
        net = control_net(base.unet, 1)
        pipe = diffusers.StableDiffusionXLControlNetPipeline(
            **base.components, controlnet=net, add_watermarker=False
        )
        given |= {"image": picture}

    def run(**kwargs: Any) -> Any:
        return pipe(["a fish", "a cup"], **given, **steps(5), **kwargs).images

    check(ssr, pipe, run, [[a], [a, b]])


@torch.no_grad()
def test_queries_are_read_as_prompts_are(kit: Any, xl_folder: Path) -> None:
    """z_q is what the pipelines themselves hand to their U-Nets, to the bit."""
    from diffusers import StableDiffusionXLPipeline

    xl = StableDiffusionXLPipeline.from_pretrained(xl_folder, add_watermarker=False)
    for folder, pipe in ((kit.folder / "sd", kit.pipe), (xl_folder, xl)):
        expected = pipe.encode_prompt(
            ["a red fish", "cup"], device="cpu", num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )[0]  # fmt: skip
        for queries in (load_text(str(folder)), QueryEncoder.from_pipeline(pipe)):
            assert torch.equal(queries(["a red fish", "cup"]), expected)
            places, words = queries.words("red fish")
            assert (places.tolist(), words) == ([1, 2], ["red", "fish"])
    assert load_text(str(xl_folder)).width == 72


def test_pipelines_of_another_kind(kit: Any) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    other = DDPMPipeline(
        UNet2DModel(
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ),
        DDPMScheduler(),
    )
    with pytest.raises(ValueError, match="UNet2DModel has no text cross-attention") as error:
        kit.ssr.attach(other)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="DDPMPipeline has no text encoder"):
        QueryEncoder.from_pipeline(other)


@torch.no_grad()
def test_perturbed_attention_is_refused(kit: Any) -> None:
    from diffusers import StableDiffusionPAGPipeline

    pipe = StableDiffusionPAGPipeline(
        **kit.pipe.components, pag_applied_layers="mid", requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    kit.ssr.attach(pipe)
    given = kit.ssr.condition([Subject(kit.image, query="fish")])
    without = pipe("a fish", pag_scale=0.0, guidance_scale=7.5, **steps(), **given).images
    kit.ssr.attach(kit.pipe)
    assert torch.equal(without, kit.pipe("a fish", **steps(), **given).images)
    with pytest.raises(ValueError, match="set pag_scale=0"):
        pipe("a fish", pag_scale=3.0, **steps(), **given)


@torch.no_grad()
def test_a_pipeline_whose_batches_are_not_known_has_to_be_told(kit: Any) -> None:
    """Panorama says that it is not guided, and is."""
    from diffusers import StableDiffusionPanoramaPipeline

    pipe = StableDiffusionPanoramaPipeline(**kit.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert not pipe.do_classifier_free_guidance
    kit.ssr.attach(pipe)
    a, _ = subjects(kit)
    given = {"height": SIDE, "width": SIDE, **steps()}
    with pytest.raises(ValueError, match="a StableDiffusionPanoramaPipeline is guided") as error:
        pipe("a fish", **given, **kit.ssr.condition([a]))
    assert "\n" not in str(error.value)
    told = pipe("a fish", **{**given, **steps()}, **kit.ssr.condition([a], guided=True)).images
    kit.ssr.detach()
    write_out(kit.ssr, pipe.unet, [[], [a]])
    close(told, pipe("a fish", **{**given, **steps()}).images)


@torch.no_grad()
def test_one_condition_on_several_pipelines(kit: Any) -> None:
    """Pipelines never forget the arguments of their last call: the one that runs is asked, also
    after a call that broke off, within another's, and where it was not attached itself.
    """
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**kit.pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    other.scheduler = type(kit.pipe.scheduler).from_config(kit.pipe.scheduler.config)
    a, b = subjects(kit)
    b.schedule = [0, 1]

    def first(guidance: float, given: Any) -> Any:
        return kit.pipe("a fish", guidance_scale=guidance, **steps(4), **given).images

    def second(guidance: float, given: Any) -> Any:
        start = Image.fromarray(kit.image)
        return other("a fish", image=start, guidance_scale=guidance, **steps(5), **given).images

    kit.ssr.attach(kit.pipe).attach(other)
    runs = [(first, 1.0), (second, 5.0), (second, 1.0), (first, 5.0), (second, 5.0), (first, 1.0)]
    expected = [run(guidance, kit.ssr.condition([a, b])) for run, guidance in runs]
    again = kit.ssr.condition([a, b])
    for (run, guidance), fresh in zip(runs, expected, strict=True):
        assert torch.equal(run(guidance, again), fresh)
        with pytest.raises(ValueError):
            other("a fish", guidance_scale=1.0, **again)  # without its image
    inner: list[Any] = []

    def within(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            inner.append(second(5.0, again))
        return tensors

    outer = kit.pipe(
        "a fish", guidance_scale=1.0, callback_on_step_end=within, **steps(4), **again
    ).images
    assert torch.equal(outer, expected[0]) and torch.equal(inner[0], expected[1])
    kit.ssr.detach()
    kit.ssr.attach(kit.pipe)
    assert torch.equal(second(5.0, again), expected[1])


@torch.no_grad()
def test_free_noise_that_splits_its_batches_is_refused(kit: Any) -> None:
    pipe = animate(kit)
    a, _ = subjects(kit)
    size = {"num_frames": 16, "height": SIDE, "width": SIDE}
    kit.ssr.attach(pipe)
    before = dict(pipe.unet.attn_processors)
    pipe.enable_free_noise(context_length=8, context_stride=4)
    pipe.enable_free_noise_split_inference(spatial_split_size=4, temporal_split_size=4)
    with pytest.raises(ValueError, match="turn off what splits them") as error:
        pipe("a fish", **size, **steps(2), **kit.ssr.condition([a]))
    assert "\n" not in str(error.value)
    kit.ssr.detach()
    kinds = {type(p).__name__ for p in pipe.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"} and before
