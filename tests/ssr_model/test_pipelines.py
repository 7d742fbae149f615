"""The SSR-Encoder on diffusers' pipelines, against references that are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssr_model import SSREncoder, Subject
from ssr_model.encoder import layer_key


class Written:
    """Eq. 4 with plain matrices; subject i of sample b has tokens[b][i] and scales[b][i]."""

    def __init__(self, layer: Any, tokens: list[list[Any]], scales: list[list[float]]) -> None:
        self.layer, self.tokens, self.scales = layer, tokens, scales

    def __call__(self, attn: Any, x: Any, encoder_hidden_states: Any, *_: Any, **__: Any) -> Any:
        rows = []
        frames = len(x) // len(self.tokens)
        for b, row in enumerate(x):
            c = encoder_hidden_states[b]
            out = self.attend(attn, row, attn.to_k(c), attn.to_v(c))
            subjects, scales = self.tokens[b // frames], self.scales[b // frames]
            if subjects:
                k = torch.cat([self.layer.to_k(t) for t in subjects])
                v = torch.cat(
                    [self.layer.to_v(t) * s for t, s in zip(subjects, scales, strict=True)]
                )
                out = out + self.attend(attn, row, k, v)
            rows.append(attn.to_out[0](out))
        return torch.stack(rows)

    def attend(self, attn: Any, x: Any, k: Any, v: Any) -> Any:
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for t in (attn.to_q(x), k, v))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)


def written_query(ssr: SSREncoder, text: str) -> Any:
    """z_q of Stable Diffusion 1 and 2: the last hidden state of the one text encoder."""
    (encoder,), (tokenizer,) = ssr.queries.encoders, ssr.queries.tokenizers
    return encoder(
        tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    ).last_hidden_state


def written_tokens(ssr: SSREncoder, subject: Subject) -> Any:
    """Subject tokens, step by step, of an image of the vision model's own size."""
    pixels = ssr.image_processor(Image.fromarray(subject.image), return_tensors="pt").pixel_values
    states = ssr.vision(pixels, output_hidden_states=True).hidden_states
    z_q = written_query(ssr, subject.query or "")
    mask = None
    if subject.mask is not None:
        blocks = torch.from_numpy(subject.mask).float().reshape(8, 4, 8, 4).mean(dim=(1, 3))
        mask = torch.cat([torch.zeros(1), blocks.flatten()])[None]
    return ssr.adapter.encoder(z_q, {d: states[d] for d in ssr.config.depths}, mask).tokens[0]


def write_out(ssr: SSREncoder, unet: Any, rows: list[list[Subject]]) -> None:
    """Put written-out processors into the U-Net: one row of subjects per sample of its batch."""
    tokens = [[written_tokens(ssr, s) for s in row] for row in rows]
    scales = [[s.scale for s in row] for row in rows]
    for name in ssr.config.layers:
        processor = Written(ssr.adapter.layers[layer_key(name)], tokens, scales)
        unet.get_submodule(name.removesuffix(".processor")).set_processor(processor)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


def subjects(kit: Any) -> tuple[Subject, Subject, Subject]:
    other = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    blocks = np.kron(np.random.default_rng(2).random((8, 8)) > 0.5, np.ones((4, 4))) > 0
    return (
        Subject(kit.image, query="red fish"),
        Subject(kit.image, mask=blocks, scale=0.6),
        Subject(other, query="cup", mask=blocks, scale=1.3),
    )


@torch.no_grad()
def test_text_to_image(kit: Any) -> None:
    a, b, c = subjects(kit)
    plain = kit.latents()
    kit.ssr.attach(kit.pipe)
    found = [kit.latents(**kit.ssr.condition(row)) for row in ([a], [b], [a, b, c])]
    unguided = kit.latents(guidance_scale=1.0, **kit.ssr.condition([a, c]))
    kit.ssr.detach()
    for row, latents in zip(([a], [b], [a, b, c]), found, strict=True):
        write_out(kit.ssr, kit.pipe.unet, [[], row])
        close(latents, kit.latents())
        assert (latents - plain).abs().mean() > 0.01
    write_out(kit.ssr, kit.pipe.unet, [[a, c]])
    close(unguided, kit.latents(guidance_scale=1.0))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_prompt_batch_with_subjects_of_each(kit: Any, guidance: float) -> None:
    a, b, c = subjects(kit)
    rows = [[a, c], [], [b]]
    call = {
        "prompt": ["a fish", "a cup on sand", "a tree"],
        "num_images_per_prompt": 2,
        "guidance_scale": guidance,
    }
    kit.ssr.attach(kit.pipe)
    found = kit.latents(**call, **kit.ssr.condition(rows))
    everyone = kit.latents(**call, **kit.ssr.condition([b]))
    kit.ssr.detach()
    nobody: list[list[Subject]] = [[]] * 6 if guidance > 1 else []
    write_out(kit.ssr, kit.pipe.unet, nobody + [row for row in rows for _ in range(2)])
    close(found, kit.latents(**call))
    write_out(kit.ssr, kit.pipe.unet, nobody + [[b]] * 6)
    close(everyone, kit.latents(**call))


@torch.no_grad()
def test_released_unconditional_subject_is_a_zero_image(kit: Any, build_ssr: Any) -> None:
    ssr = build_ssr(kit.pipe.unet, "released")
    a, b, _ = subjects(kit)
    ssr.attach(kit.pipe)
    found = kit.latents(**ssr.condition([a, Subject(b.image, query="cup", scale=0.5)]))
    ssr.detach()
    pixels = torch.zeros(1, 3, 32, 32)
    states = ssr.vision(pixels, output_hidden_states=True).hidden_states
    features = {d: states[d] for d in ssr.config.depths}
    zero = ssr.adapter.encoder(written_query(ssr, ""), features).tokens[0]
    tokens = [written_tokens(ssr, Subject(a.image, query=q)) for q in ("red fish", "cup")]
    for name in ssr.config.layers:
        layer = ssr.adapter.layers[layer_key(name)]
        processor = Written(layer, [[zero, zero], tokens], [[1.0, 0.5], [1.0, 0.5]])
        kit.pipe.unet.get_submodule(name.removesuffix(".processor")).set_processor(processor)
    close(found, kit.latents())


@torch.no_grad()
def test_nothing_changes_without_a_subject(kit: Any) -> None:
    unet = kit.pipe.unet
    names, state = dict(unet.attn_processors), set(unet.state_dict())
    plain = kit.latents()
    kit.ssr.attach(kit.pipe)
    assert set(unet.state_dict()) == state
    assert torch.equal(kit.latents(), plain)
    a = Subject(kit.image, query="fish", scale=0)
    assert torch.equal(kit.latents(**kit.ssr.condition([a, a])), plain)
    assert torch.equal(kit.latents(**kit.ssr.condition([])), plain)
    kit.latents(**kit.ssr.condition([Subject(kit.image, query="fish")]))
    assert torch.equal(kit.latents(), plain)  # nothing is left of the last call
    kit.ssr.detach(kit.pipe)
    assert all(unet.attn_processors[name] is processor for name, processor in names.items())
    assert not unet._forward_hooks and not unet._forward_pre_hooks
    assert not unet._forward_hooks_always_called and not unet._forward_hooks_with_kwargs
    assert torch.equal(kit.latents(), plain)
    with pytest.raises(ValueError, match="not attached"):
        kit.ssr.detach(kit.pipe)


@torch.no_grad()
def test_a_subject_of_scale_zero_is_left_out(kit: Any) -> None:
    a, b, _ = subjects(kit)
    kit.ssr.attach(kit.pipe)
    alone = kit.latents(**kit.ssr.condition([a]))
    b.scale = 0.0
    assert torch.equal(kit.latents(**kit.ssr.condition([a, b])), alone)
    b.scale = 0.5
    assert not torch.equal(kit.latents(**kit.ssr.condition([a, b])), alone)


@torch.no_grad()
def test_keys_and_values_are_computed_once_per_call(kit: Any) -> None:
    kit.ssr.attach(kit.pipe)
    calls = {"count": 0}

    def count(*_: Any) -> None:
        calls["count"] += 1

    layers = kit.ssr.adapter.layers
    hooks = [layer.register_forward_hook(count) for layer in layers.values()]
    kit.latents(**kit.ssr.condition([Subject(kit.image, query="fish")]))
    assert calls["count"] == len(layers)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_other_pipelines_sharing_the_unet(kit: Any, kind: str) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline

    a, b, _ = subjects(kit)
    start = Image.fromarray(kit.image)
    call: dict[str, Any] = {"prompt": ["a fish", "a cup"], "image": start, "strength": 0.9}
    if kind == "img2img":
        other = StableDiffusionImg2ImgPipeline(**kit.pipe.components, requires_safety_checker=False)
    else:
        # inpainting wants 4 latent channels
        vae, unet = kit.pipe.vae, kit.pipe.unet
        vae = type(vae).from_config(dict(vae.config) | {"latent_channels": 4})
        unet = type(unet).from_config(dict(unet.config) | {"in_channels": 4, "out_channels": 4})
        kit.pipe.register_modules(vae=vae, unet=unet)
        other = StableDiffusionInpaintPipeline(**kit.pipe.components, requires_safety_checker=False)
        call |= {"mask_image": Image.fromarray(kit.mask), "height": 32, "width": 32}
    other.set_progress_bar_config(disable=True)

    def run(**kwargs: Any) -> Any:
        noise = torch.Generator().manual_seed(0)
        steps = {"num_inference_steps": 4, "output_type": "latent", "generator": noise}
        return other(**call, **steps, **kwargs).images

    plain = run()
    kit.ssr.attach(kit.pipe)
    with pytest.raises(ValueError, match="cannot tell whether this call is guided"):
        run(**kit.ssr.condition([a]))
    told = run(**kit.ssr.condition([[a], [b]], guided=True))
    kit.ssr.attach(other)
    asked = run(**kit.ssr.condition([[a], [b]]))
    assert torch.equal(told, asked)
    assert torch.equal(run(), plain)
    kit.ssr.detach()
    assert torch.equal(run(), plain)
    write_out(kit.ssr, other.unet, [[], [], [a], [b]])
    close(asked, run())


@torch.no_grad()
def test_attention_slicing_before_and_after(kit: Any) -> None:
    given = [Subject(kit.image, query="fish")]
    kit.ssr.attach(kit.pipe)
    expected = kit.latents(**kit.ssr.condition(given))
    kit.pipe.enable_attention_slicing(1)
    close(kit.latents(**kit.ssr.condition(given)), expected)
    kit.ssr.detach()
    kinds = {type(p).__name__ for p in kit.pipe.unet.attn_processors.values()}
    assert kinds == {"SlicedAttnProcessor"}
    kit.ssr.attach(kit.pipe)
    close(kit.latents(**kit.ssr.condition(given)), expected)


@torch.no_grad()
def test_half_precision_pipeline(kit: Any) -> None:
    kit.pipe.to(dtype=torch.bfloat16)
    kit.ssr.attach(kit.pipe)
    latents = kit.latents(**kit.ssr.condition([Subject(kit.image, query="fish")]))
    assert latents.dtype == torch.bfloat16 and latents.isfinite().all()
    assert {p.dtype for p in kit.ssr.adapter.parameters()} == {torch.float32}


@torch.no_grad()
def test_two_encoders_on_two_pipelines(kit: Any, build_ssr: Any) -> None:
    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline.from_pretrained(kit.folder / "sd")
    second = build_ssr(other.unet)
    kit.ssr.attach(kit.pipe)
    second.attach(other)
    with pytest.raises(ValueError, match="already carries"):
        second.attach(kit.pipe)
    given = [Subject(kit.image, query="fish")]
    mine = kit.latents(**kit.ssr.condition(given))
    second.detach(other)
    assert torch.equal(kit.latents(**kit.ssr.condition(given)), mine)


def test_one_line_refusals(kit: Any, build_ssr: Any) -> None:
    from diffusers import UNet2DConditionModel

    ssr, pipe = kit.ssr, kit.pipe
    fish = Subject(kit.image, query="fish")
    with pytest.raises(ValueError, match="attach"):
        ssr.condition([fish])
    with pytest.raises(ValueError, match="has no U-Net"):
        ssr.attach(object())
    ssr.attach(pipe)
    with pytest.raises(ValueError, match="even for one"):
        ssr.condition(fish)
    with pytest.raises(ValueError, match="one such list per prompt"):
        ssr.condition([fish, [fish]])
    with pytest.raises(ValueError, match="mask of the image's own size"):
        ssr.condition([Subject(kit.image, mask=np.ones((5, 5)))])
    with pytest.raises(ValueError, match="made for 2 prompts"):
        kit.latents(["a", "b", "c"], **ssr.condition([[fish], [fish]]))
    assert ssr._attachments[0].slot.conditional is None  # empty even after a failure
    config = dict(pipe.unet.config) | {"block_out_channels": (16, 16)}
    other = type("Pipe", (), {"unet": UNet2DConditionModel.from_config(config)})()
    with pytest.raises(ValueError, match="trained for another base model"):
        ssr.attach(other)
    for bad in ({}, {"query": "  "}, {"query": 3}, {"query": "a", "scale": float("nan")}):
        with pytest.raises(ValueError):
            Subject(kit.image, **bad)
