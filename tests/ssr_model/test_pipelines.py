"""The SSR-Encoder on the text-to-image pipeline, against references that are written out."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssr_model import Subject
from ssr_model.attachment import KEY
from ssr_model.config import VARIANTS
from ssr_model.encoder import layer_key
from ssr_model.images import mask_tokens
from tests.ssr_model.written import Part, Written, close, query, tokens, write_out


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
    given = [a, Subject(b.image, query="cup", mask=kit.mask, scale=0.5)]
    ssr.attach(kit.pipe)
    found = kit.latents(**ssr.condition(given))
    ssr.detach()
    states = ssr.vision(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states
    features = {d: states[d] for d in ssr.config.depths}
    # the mask weighs the zero image's patches too, as in the authors' code
    mask = mask_tokens(torch.from_numpy(kit.mask).float(), (0, 0, 32, 32), (8, 8), "bias", cls=True)
    nothing = [
        ssr.adapter.encoder(query(ssr, ""), features, m).tokens[0] for m in (None, mask[None])
    ]
    pixels = ssr.image_processor(Image.fromarray(kit.image), return_tensors="pt").pixel_values
    states = ssr.vision(pixels, output_hidden_states=True).hidden_states
    features = {d: states[d] for d in ssr.config.depths}
    masked = ssr.adapter.encoder(query(ssr, "cup"), features, mask[None]).tokens[0]
    parts = [
        [Part(nothing[0]), Part(nothing[1], 0.5)],
        [Part(tokens(ssr, given[0])), Part(masked, 0.5)],
    ]
    for name in ssr.config.layers:
        processor = Written(ssr.adapter.layers[layer_key(name)], parts, (8, 8))
        kit.pipe.unet.get_submodule(name.removesuffix(".processor")).set_processor(processor)
    close(found, kit.latents())


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_regions_confine_where_a_subject_acts(kit: Any, guidance: float) -> None:
    a, b, c = subjects(kit)
    left, corner = np.zeros((16, 16)), np.zeros((32, 32), bool)
    left[:, :6] = 1
    left[:, 6:8] = 0.5  # no whole column of the coarser grid
    corner[16:, 16:] = True
    a.region, b.region = left, corner
    call = {"prompt": ["a fish", "a cup"], "num_images_per_prompt": 2, "guidance_scale": guidance}
    kit.ssr.attach(kit.pipe)
    rows = [[a, b, c], [b]]
    found = kit.latents(**call, **kit.ssr.condition(rows))
    kit.ssr.detach()
    nobody: list[list[Subject]] = [[]] * 4 if guidance > 1 else []
    write_out(kit.ssr, kit.pipe.unet, nobody + [row for row in rows for _ in range(2)])
    close(found, kit.latents(**call))
    a.region = b.region = None
    write_out(kit.ssr, kit.pipe.unet, nobody + [row for row in rows for _ in range(2)])
    assert (found - kit.latents(**call)).abs().mean() > 0.01  # and regions do something


@torch.no_grad()
def test_scales_of_blocks_and_steps(kit: Any) -> None:
    a, b, _ = subjects(kit)
    a.scale = {"down_blocks": 0.0, "up_blocks.1": 1.5}
    b.scale, b.schedule = 1.0, [0.0, 0.5, 1.0]
    kit.ssr.attach(kit.pipe)
    found = kit.latents(**kit.ssr.condition([a, b]))
    assert torch.equal(kit.latents(**kit.ssr.condition([a, b])), found)
    b.schedule = [0.0, 1.0]  # straight between two knots: the same at three steps
    again = kit.latents(**kit.ssr.condition([a, b]))
    close(again, found)
    b.schedule = [0.0, 0.5, 1.0]
    kit.ssr.detach()
    write_out(kit.ssr, kit.pipe.unet, [[], [a, b]])
    close(found, kit.latents())
    b.schedule = [1.0, 0.5, 0.0]
    write_out(kit.ssr, kit.pipe.unet, [[], [a, b]])
    assert (found - kit.latents()).abs().mean() > 0.01


@torch.no_grad()
def test_a_subject_that_never_acts_is_the_plain_pipeline(kit: Any) -> None:
    a, b, _ = subjects(kit)
    plain = kit.latents()
    kit.ssr.attach(kit.pipe)
    a.schedule, b.scale = [0.0, 0.0], dict.fromkeys(("down_blocks", "mid_block", "up_blocks"), 0.0)
    assert torch.equal(kit.latents(**kit.ssr.condition([a])), plain)
    assert torch.equal(kit.latents(**kit.ssr.condition([b])), plain)
    a.schedule = [0.0, 0.0, 1.0]
    late = kit.latents(**kit.ssr.condition([a]))
    assert not torch.equal(late, plain)


@torch.no_grad()
def test_scales_can_be_restricted(kit: Any, build_ssr: Any) -> None:
    """The last scale alone, without another model."""
    a, _, _ = subjects(kit)
    kit.ssr.attach(kit.pipe)
    found = kit.latents(**kit.ssr.condition([a], depths=[6]))
    whole = kit.latents(**kit.ssr.condition([a]))
    kit.ssr.detach()
    one = build_ssr(kit.pipe.unet, depths=(6,), scales=None)
    one.adapter.load_state_dict(
        {k: v for k, v in kit.ssr.adapter.state_dict().items() if k in one.adapter.state_dict()}
    )
    one.attach(kit.pipe)
    assert torch.equal(kit.latents(**one.condition([a])), found)
    assert (whole - found).abs().mean() > 0.01
    for depths, message in (([2, 4], "lack depth 6"), ([3, 6], "depth 3 is not one")):
        with pytest.raises(ValueError, match=message):
            one.detach() if one._attachments else None
            kit.ssr.attach(kit.pipe).condition([a], depths=depths)


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
def test_an_image_is_seen_once_whatever_is_asked_of_it(kit: Any) -> None:
    seen: list[int] = []
    hook = kit.ssr.vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    a, b, c = subjects(kit)  # two pictures
    kit.ssr.attach(kit.pipe)
    kit.ssr.condition([[a, b], [c], [Subject(kit.image, query="cup"), a]])
    assert seen == [2]
    seen.clear()
    pictures = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    row = [Subject(picture, query="cup") for picture in pictures]
    whole = kit.ssr.condition(row)["cross_attention_kwargs"][KEY].conditional
    assert seen == [16, 4]
    last = kit.ssr.condition(row[-1:])["cross_attention_kwargs"][KEY].conditional
    for name, keys in last.keys.items():
        torch.testing.assert_close(whole.keys[name][:, -keys.shape[1] :], keys)
    hook.remove()


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


@torch.no_grad()
def test_subjects_are_not_passed_over_in_silence(kit: Any) -> None:
    """A condition on a pipeline that does not carry the encoder: refused, not drawn without."""
    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline.from_pretrained(kit.folder / "sd")
    kit.ssr.attach(other)
    given = kit.ssr.condition([Subject(kit.image, query="fish")])
    with pytest.raises(ValueError, match="does not carry the SSR-Encoder") as error:
        kit.latents(**given)
    assert "\n" not in str(error.value)
    unet = other.unet
    del other
    gc.collect()
    with pytest.raises(ValueError, match=r"attach\(pipe\) first"):  # nobody is left to draw
        kit.ssr.condition([Subject(kit.image, query="fish")])
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}


@torch.no_grad()
def test_subjects_are_taken_as_they_are_when_asked(kit: Any) -> None:
    a, b, _ = subjects(kit)
    a.schedule, b.region = [1.0, 0.5], np.ones((4, 4))
    kit.ssr.attach(kit.pipe)
    given = kit.ssr.condition([a, b])
    expected = kit.latents(**given)
    a.schedule, a.scale, b.region = [0.0, 1.0], 0.0, np.eye(4)
    assert torch.equal(kit.latents(**given), expected)
    a.scale = float("nan")
    with pytest.raises(ValueError, match="finite number"):
        kit.ssr.condition([a])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_variants_as_they_stand(kit: Any, build_ssr: Any, variant: str) -> None:
    """Without the tests' own choice of parts."""
    own = {**VARIANTS[variant], "unconditional": "null", "heads": 1, "head_dim": 16}
    ssr = build_ssr(kit.pipe.unet, variant, **own)
    a, b, _ = subjects(kit)
    b.mask = None
    row = [a, Subject(kit.image, query="cup", scale=0.5)]
    ssr.attach(kit.pipe)
    found = kit.latents(**ssr.condition(row))
    ssr.detach()
    write_out(ssr, kit.pipe.unet, [[], row])
    close(found, kit.latents())


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
    for prompts in (["a", "b", "c"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match="made for 2 prompts"):
            kit.latents(prompts, **ssr.condition([[fish], [fish]]))
    twice = ssr.condition([[fish], [fish]])
    for _ in range(3):  # every call is looked at
        kit.latents(["a", "b"], **twice)
        with pytest.raises(ValueError, match="made for 2 prompts"):
            kit.latents(["a", "b", "c", "d"], **twice)
    with pytest.raises(ValueError, match="guided batch is"):
        kit.latents(guidance_scale=1.0, **ssr.condition([fish], guided=True))
    assert ssr._attachments[0].attention.slot.conditional is None  # empty even after a failure
    config = dict(pipe.unet.config) | {"block_out_channels": (16, 16)}
    other = type("Pipe", (), {"unet": UNet2DConditionModel.from_config(config)})()
    with pytest.raises(ValueError, match="trained for another base model"):
        ssr.attach(other)
    wide = Subject(kit.image[..., :1], query="fish")
    with pytest.raises(ValueError, match="image array must be"):
        ssr.condition([wide])
    with pytest.raises(ValueError, match="NaN"):
        ssr.condition([Subject(np.full((8, 8, 3), np.nan), query="fish")])
    with pytest.raises(ValueError, match="region selects nothing"):
        ssr.condition([Subject(kit.image, query="fish", region=np.zeros((4, 4)))])
    with pytest.raises(ValueError, match="no text attention in 'middle'"):
        ssr.condition([Subject(kit.image, query="fish", scale={"middle": 1.0})])


def test_more_subjects_than_memory_allows(kit: Any, monkeypatch: Any) -> None:
    """The figure is what the keys and values really take; only the free memory is pretended."""
    fish = Subject(kit.image, query="fish")
    kit.ssr.attach(kit.pipe)
    condition = kit.ssr.condition([fish] * 3)["cross_attention_kwargs"][KEY].conditional
    tensors = [*condition.keys.values(), *condition.values.values()]
    takes = sum(t.numel() * t.element_size() for t in tensors)
    told: list[int] = []
    monkeypatch.setattr("ssr_model.memory.free_bytes", lambda device: told[-1])
    told.append(takes)
    with pytest.raises(ValueError, match="3 subjects"):  # features and tokens take some too
        kit.ssr.condition([fish] * 3)
    told.append(round(2.2 * takes))
    kit.ssr.condition([fish] * 3)
    with pytest.raises(ValueError, match=r"4 subjects .* GiB are free on cpu: give fewer") as error:
        kit.ssr.condition([fish] * 4)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="4 subjects"):  # padding counts
        kit.ssr.condition([[fish] * 2, [fish]])
