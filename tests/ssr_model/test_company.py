"""In company: schedulers, precision, offloading, slicing, LoRA, textual inversion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssr_model import SSREncoder, Subject
from tests.ssr_model.written import close, write_out


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("DDIMScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("HeunDiscreteScheduler", {}),
        ("KDPM2DiscreteScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ],
)
def test_any_scheduler(kit: Any, kind: str, settings: dict[str, Any]) -> None:
    """With a subject that enters in the second half: the U-Net's calls are told apart by them."""
    import diffusers

    scheduler = getattr(diffusers, kind).from_config(kit.pipe.scheduler.config, **settings)
    kit.pipe.scheduler = scheduler
    scheduler.set_timesteps(3)
    calls, processors = len(scheduler.timesteps), dict(kit.pipe.unet.attn_processors)
    a, b = Subject(kit.image, query="red fish"), Subject(kit.image, query="cup", scale=0.7)
    kit.ssr.attach(kit.pipe)
    found = kit.latents(**kit.ssr.condition([a, b]))
    kit.ssr.detach()
    write_out(kit.ssr, kit.pipe.unet, [[], [a, b]])
    close(found, kit.latents(), 5e-3)
    kit.pipe.unet.set_attn_processor(processors)
    # a factor for each distinct timestep; those of second order visit one twice
    timesteps = [float(t) for t in scheduler.timesteps]
    distinct = sorted(set(timesteps), reverse=True)
    b.schedule = [0.5 * i / len(distinct) for i in range(len(distinct))]
    kit.ssr.attach(kit.pipe)
    found = kit.latents(**kit.ssr.condition([a, b]))
    kit.ssr.detach()
    b.schedule = [b.schedule[distinct.index(t)] for t in timesteps]
    assert len(b.schedule) == calls
    write_out(kit.ssr, kit.pipe.unet, [[], [a, b]])
    close(found, kit.latents(), 5e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kit: Any, dtype: torch.dtype) -> None:
    """The U-Net in half precision, the encoder in full: keys and values are cast once."""
    left = np.zeros((8, 8))
    left[:, :4] = 1
    a = Subject(kit.image, query="fish", region=left)
    b = Subject(kit.image, query="cup", scale=0.5)
    full = kit.latents()
    kit.ssr.attach(kit.pipe)
    full = kit.latents(**kit.ssr.condition([a, b]))
    kit.pipe.to(dtype=dtype)
    found = kit.latents(**kit.ssr.condition([a, b]))
    assert found.dtype == dtype
    assert {p.dtype for p in kit.ssr.adapter.parameters()} == {torch.float32}
    plain = kit.latents()
    away = (found - plain).float().abs().mean()
    assert (found.float() - full).abs().mean() < 0.1 * away
    kit.ssr.to(dtype=dtype)  # and everything in half
    halves = kit.latents(**kit.ssr.condition([a, b]))
    coarse = 0.1 if dtype is torch.float16 else 0.25  # bfloat16 holds 8 bits
    assert (halves - found).float().abs().mean() < coarse * away


@torch.no_grad()
def test_given_generators_and_latents(kit: Any) -> None:
    """Noise is the pipeline's: a subject takes none of it."""
    a = Subject(kit.image, query="fish")
    kit.ssr.attach(kit.pipe)
    call = {"prompt": ["a fish", "a cup"], "num_inference_steps": 2, "output_type": "latent"}
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = kit.pipe(**call, generator=seeds, **kit.ssr.condition([a])).images
    for i, seed in enumerate((3, 4)):
        noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        alone = kit.pipe(
            **{**call, "prompt": call["prompt"][i]}, latents=noise, **kit.ssr.condition([a])
        ).images
        close(both[i : i + 1], alone, 1e-4)


@torch.no_grad()
def test_attention_slicing_before_and_after(kit: Any) -> None:
    given = [Subject(kit.image, query="fish")]
    kit.pipe.enable_attention_slicing(1)
    plain = kit.latents()
    kit.ssr.attach(kit.pipe)
    assert torch.equal(kit.latents(), plain)  # the sliced processors, where no subject acts
    assert torch.equal(kit.latents(**kit.ssr.condition([])), plain)
    kit.ssr.detach()
    kit.pipe.disable_attention_slicing()
    kit.ssr.attach(kit.pipe)
    expected = kit.latents(**kit.ssr.condition(given))
    kit.pipe.enable_attention_slicing(1)
    close(kit.latents(**kit.ssr.condition(given)), expected)
    kit.ssr.detach()
    kinds = {type(p).__name__ for p in kit.pipe.unet.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor"}
    kit.ssr.attach(kit.pipe)
    close(kit.latents(**kit.ssr.condition(given)), expected)
    kit.pipe.disable_attention_slicing()
    close(kit.latents(**kit.ssr.condition(given)), expected)
    kit.ssr.detach()
    kinds = {type(p).__name__ for p in kit.pipe.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}


@torch.no_grad()
@pytest.mark.parametrize("order", ["offload first", "attach first"])
def test_model_offloading(kit: Any, order: str) -> None:
    """accelerate's own hooks, as `enable_model_cpu_offload` sets them, with the CPU as the device:
    models are shared with the encoder, moved by their hooks, and give the same pictures.
    """
    from accelerate import cpu_offload_with_hook

    given = [Subject(kit.image, query="fish"), Subject(kit.image, mask=kit.mask)]
    ssr = SSREncoder(kit.ssr.adapter, kit.ssr.vision, kit.ssr.image_processor, _shared(kit.pipe))
    ssr.attach(kit.pipe)
    expected = kit.latents(**ssr.condition(given))
    ssr.detach()
    if order == "attach first":
        ssr.attach(kit.pipe)
    hook = None
    for name in ("text_encoder", "unet", "vae"):
        _, hook = cpu_offload_with_hook(getattr(kit.pipe, name), "cpu", hook)
    if order == "offload first":
        ssr.attach(kit.pipe)
    assert torch.equal(kit.latents(**ssr.condition(given)), expected)


@torch.no_grad()
def test_sequential_offloading(kit: Any) -> None:
    """Weights lie elsewhere, and the model's device is `meta`, until each layer runs."""
    from accelerate import cpu_offload

    given = [Subject(kit.image, query="fish")]
    ssr = SSREncoder(kit.ssr.adapter, kit.ssr.vision, kit.ssr.image_processor, _shared(kit.pipe))
    ssr.attach(kit.pipe)
    expected = kit.latents(**ssr.condition(given))
    for model in (kit.pipe.vae, kit.pipe.text_encoder, kit.pipe.unet, ssr.vision):
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        assert model.device.type == "meta"
    assert torch.equal(kit.latents(**ssr.condition(given)), expected)


def _shared(pipe: Any) -> Any:
    from ssr_model.text import QueryEncoder

    return QueryEncoder.from_pipeline(pipe)


@torch.no_grad()
@pytest.mark.parametrize("order", ["LoRA first", "attach first"])
def test_lora(kit: Any, tmp_path: Path, order: str) -> None:
    """A LoRA on the U-Net's attention, loaded by diffusers' own loader, at a scale of its own."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, a = kit.pipe, Subject(kit.image, query="fish")
    donor = type(pipe.unet).from_config(pipe.unet.config)
    donor.add_adapter(
        LoraConfig(
            r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False
        )
    )
    torch.manual_seed(0)
    lora = {k: torch.randn_like(v) * 0.3 for k, v in get_peft_model_state_dict(donor).items()}
    pipe.save_lora_weights(tmp_path, unet_lora_layers=lora)
    bare = kit.latents()
    if order == "attach first":
        kit.ssr.attach(pipe)
    pipe.load_lora_weights(tmp_path)
    if order == "LoRA first":
        kit.ssr.attach(pipe)
    assert (kit.latents() - bare).abs().mean() > 0.01

    def condition(scale: float) -> dict[str, Any]:
        return kit.ssr.condition([a], lora_scale=scale)

    found = [kit.latents(**condition(scale)) for scale in (1.0, 0.4, 0.0)]
    kit.ssr.detach()
    write_out(kit.ssr, pipe.unet, [[], [a]])
    for latents, scale in zip(found, (1.0, 0.4, 0.0), strict=True):
        close(latents, kit.latents(cross_attention_kwargs={"scale": scale}))
    pipe.unload_lora_weights()
    write_out(kit.ssr, pipe.unet, [[], [a]])
    close(found[2], kit.latents())
    assert (found[0] - found[1]).abs().mean() > 0.003


@torch.no_grad()
def test_layers_start_as_copies_of_the_weights_below_a_lora(kit: Any, build_ssr: Any) -> None:
    from peft import LoraConfig

    unet = kit.pipe.unet
    before = build_ssr(unet).adapter.layers.state_dict()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    after = build_ssr(unet).adapter.layers.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_textual_inversion(kit: Any) -> None:
    """A learnt word of two vectors, in prompts and in queries."""
    pipe, width = kit.pipe, kit.ssr.config.text_dim
    torch.manual_seed(0)
    pipe.load_textual_inversion({"<cat>": torch.randn(2, width)}, token="<cat>")
    ssr = SSREncoder(kit.ssr.adapter, kit.ssr.vision, kit.ssr.image_processor, _shared(pipe))
    (found,) = ssr.attention_maps(kit.image, ["red <cat>"])
    assert found.words == ["red", "<cat>", "<cat>_1"]
    a = Subject(kit.image, query="<cat>")
    ssr.attach(pipe)
    latents = kit.latents("a photo of <cat>", **ssr.condition([a]))
    ssr.detach()
    spelled = pipe.maybe_convert_prompt("<cat>", pipe.tokenizer)
    assert spelled == "<cat> <cat>_1"
    write_out(ssr, pipe.unet, [[], [Subject(kit.image, query=spelled)]])
    close(latents, kit.latents("a photo of <cat>"))


@torch.no_grad()
def test_projections_that_were_fused_meanwhile(kit: Any) -> None:
    """diffusers keeps processors aside while it fuses, and brings ours back after our removal."""
    plain, given = kit.latents(), [Subject(kit.image, query="fish")]
    kit.ssr.attach(kit.pipe)
    expected = kit.latents(**kit.ssr.condition(given))
    kit.pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match="more than plain text attention"):
        kit.latents(**kit.ssr.condition(given))
    kit.ssr.detach()
    kit.pipe.unfuse_qkv_projections()
    assert torch.equal(kit.latents(), plain)
    kit.ssr.attach(kit.pipe)
    assert torch.equal(kit.latents(**kit.ssr.condition(given)), expected)
    kit.ssr.detach()
    assert {type(p).__name__ for p in kit.pipe.unet.attn_processors.values()} == {
        "AttnProcessor2_0"
    }


@torch.no_grad()
def test_a_mask_over_the_prompt(kit: Any) -> None:
    """`encoder_attention_mask` leaves words out of the text, beside the subject."""
    unet = kit.pipe.unet
    kit.ssr.attach(kit.pipe)
    given = kit.ssr.condition([Subject(kit.image, query="fish")], guided=False)
    torch.manual_seed(0)
    sample, t = torch.randn(2, 16, 8, 8), torch.tensor(500)
    text = torch.randn(1, 24, kit.ssr.config.text_dim).expand(2, -1, -1)
    mask = torch.zeros(2, 24)
    mask[:, :9] = 1
    masked = unet(sample, t, text, encoder_attention_mask=mask, **given).sample
    close(masked, unet(sample, t, text[:, :9], **given).sample, 1e-4)
    assert (masked - unet(sample, t, text, **given).sample).abs().mean() > 1e-3


@torch.no_grad()
def test_a_condition_under_autocast_and_without(kit: Any) -> None:
    left = np.zeros((8, 8))
    left[:, :4] = 1
    row = [Subject(kit.image, query="fish", region=left), Subject(kit.image, query="cup")]
    kit.ssr.attach(kit.pipe)
    given = kit.ssr.condition(row)
    expected = kit.latents(**kit.ssr.condition(row))
    with torch.autocast("cpu", torch.bfloat16):
        kit.latents(**given)
    assert torch.equal(kit.latents(**given), expected)


@torch.no_grad()
def test_callbacks_that_change_the_prompts_or_turn_guidance_off(kit: Any) -> None:
    """As diffusers documents: the batch halves in the middle of a call."""
    a, b = Subject(kit.image, query="fish"), Subject(kit.image, query="cup", scale=0.6)
    prompts = ["a fish", "a cup"]

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        embeds = tensors["prompt_embeds"]
        if step == 0:
            tensors["prompt_embeds"] = embeds + 0.1 * torch.arange(len(embeds))[:, None, None]
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = embeds.chunk(2)[-1]
        return tensors

    call: dict[str, Any] = {
        "num_images_per_prompt": 2,
        "callback_on_step_end": change,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    kit.ssr.attach(kit.pipe)
    found = kit.latents(prompts, **call, **kit.ssr.condition([[a], [b]]))
    kit.ssr.detach()
    processors = dict(kit.pipe.unet.attn_processors)
    write_out(kit.ssr, kit.pipe.unet, [[]] * 4 + [[a], [a], [b], [b]])

    def shrink(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        tensors = change(pipe, step, timestep, tensors)
        if step == 1:
            pipe.unet.set_attn_processor(dict(processors))
            write_out(kit.ssr, pipe.unet, [[a], [a], [b], [b]])
        return tensors

    close(found, kit.latents(prompts, **{**call, "callback_on_step_end": shrink}))


@torch.no_grad()
def test_a_copy_carries_no_subjects(kit: Any) -> None:
    plain, given = kit.latents(), [Subject(kit.image, query="fish")]
    kit.ssr.attach(kit.pipe)
    expected = kit.latents(**kit.ssr.condition(given))
    twin = copy.deepcopy(kit.pipe)
    kinds = {type(p).__name__ for p in twin.unet.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}
    with pytest.raises(ValueError, match="does not carry the SSR-Encoder"):
        twin("a red fish", num_inference_steps=1, **kit.ssr.condition(given))
    kit.ssr.attach(twin)
    kit.pipe, first = twin, kit.pipe
    assert torch.equal(kit.latents(**kit.ssr.condition(given)), expected)
    kit.ssr.detach(twin)
    assert torch.equal(kit.latents(), plain)
    kit.pipe = first
    assert torch.equal(kit.latents(**kit.ssr.condition(given)), expected)


@torch.no_grad()
def test_a_unet_that_was_exchanged_is_given_back(kit: Any) -> None:
    old, plain = kit.pipe.unet, kit.latents()
    kit.ssr.attach(kit.pipe)
    kit.pipe.unet = type(old).from_config(old.config).eval()
    kit.ssr.attach(kit.pipe)
    assert {type(p).__name__ for p in old.attn_processors.values()} == {"AttnProcessor2_0"}
    assert len(kit.ssr._attachments) == 1
    kit.pipe.unet = old
    assert torch.equal(kit.latents(), plain)
