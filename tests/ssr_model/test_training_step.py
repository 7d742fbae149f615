"""Gradients reach every trainable tensor, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssr_model.encoder import layer_key
from ssr_model.losses import ldm_loss, reg_loss
from ssr_model.training_step import Dropping, SSRTrainingModule


def batch(kit: Any, rows: int = 3) -> dict[str, Any]:
    torch.manual_seed(7)
    config = kit.ssr.config
    return {
        "noisy_latents": torch.randn(rows, 16, 8, 8),
        "timesteps": torch.tensor([5, 400, 900])[:rows],
        "prompt_embeds": torch.randn(rows, 24, config.text_dim),
        "z_q": torch.randn(rows, 24, config.text_dim),
        "features": {d: torch.randn(rows, 65, config.vision_dim) for d in config.depths},
    }


def test_gradients(kit: Any) -> None:
    unet, adapter = kit.pipe.unet, kit.ssr.adapter
    module = SSRTrainingModule(adapter, unet)
    assert dict(module.named_parameters()).keys() == {
        f"adapter.{name}" for name, _ in adapter.named_parameters()
    }
    inputs = batch(kit)
    for depths in ([6], [2, 4, 6]):
        adapter.train_scales(depths)
        module.zero_grad()
        given = {**inputs, "features": {d: inputs["features"][d] for d in depths}}
        prediction, subject = module(**given)
        assert prediction.shape == inputs["noisy_latents"].shape
        loss = ldm_loss(prediction, torch.zeros_like(prediction))
        (loss + 0.01 * reg_loss(subject.per_scale, inputs["z_q"])).backward()
        for name, parameter in module.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert reached == parameter.requires_grad, name
    assert all(p.grad is None for p in unet.parameters())
    module.release()
    assert {type(p).__name__ for p in unet.attn_processors.values()} == {"AttnProcessor2_0"}


def test_prediction_is_equation_4(kit: Any) -> None:
    """The module's prediction equals a U-Net whose processors are written out with einsum."""
    unet, adapter = kit.pipe.unet, kit.ssr.adapter
    inputs = batch(kit)
    module = SSRTrainingModule(adapter, unet)
    keep = torch.tensor([True, False, True])
    with torch.no_grad():
        prediction, subject = module(**inputs, keep_subject=keep)
        bare, _ = module(**inputs, keep_subject=torch.zeros(3, dtype=torch.bool))
        module.release()
        plain = unet(inputs["noisy_latents"], inputs["timesteps"], inputs["prompt_embeds"]).sample
        weight = keep.float()[:, None, None]
        for name in adapter.config.layers:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            layer = adapter.layers[layer_key(name)]
            k, v = layer.to_k(subject.tokens), layer.to_v(subject.tokens) * weight
            attention.set_processor(Written(k, v))
        expected = unet(
            inputs["noisy_latents"], inputs["timesteps"], inputs["prompt_embeds"]
        ).sample
    torch.testing.assert_close(prediction, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bare, plain, atol=1e-5, rtol=1e-5)
    assert (prediction - plain)[0].abs().mean() > 1e-3  # and the subject does something
    torch.testing.assert_close(prediction[1], plain[1], atol=1e-5, rtol=1e-5)


def test_several_subjects_of_an_image_condition_it_together(kit: Any) -> None:
    inputs, adapter = batch(kit), kit.ssr.adapter
    module = SSRTrainingModule(adapter, kit.pipe.unet)
    one, other = inputs["z_q"], inputs["z_q"].roll(1, 0)
    with torch.no_grad():
        alone, _ = module(**inputs)
        twice, _ = module(**{**inputs, "z_q": torch.stack([one, one], dim=1)})
        both, subjects = module(**{**inputs, "z_q": torch.stack([one, other], dim=1)})
        swapped, _ = module(**{**inputs, "z_q": torch.stack([other, one], dim=1)})
        each = [adapter.encoder(z, inputs["features"]).tokens for z in (one, other)]
    # told twice is told once: attention does not count; and the order does not matter
    torch.testing.assert_close(twice, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(swapped, both, atol=1e-5, rtol=1e-5)
    assert (both - alone).abs().mean() > 1e-4
    torch.testing.assert_close(subjects.tokens.unflatten(0, (3, 2)), torch.stack(each, dim=1))
    module.release()


class Written:
    """Eq. 4 with einsum, for one layer."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.k, self.v = k, v

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *_: Any, **__: Any
    ) -> Any:
        def attend(k: Any, v: Any) -> Any:
            q, k, v = (
                t.reshape(*t.shape[:2], attn.heads, -1) for t in (attn.to_q(hidden_states), k, v)
            )
            weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
            return torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v).flatten(2)

        text = attend(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        return attn.to_out[0](text + attend(self.k, self.v))


def test_layers_start_as_copies_of_the_text_keys_and_values(kit: Any, build_ssr: Any) -> None:
    unet = kit.pipe.unet
    for variant, same in (("paper", True), ("released", False)):
        adapter = build_ssr(unet, variant).adapter
        for name in adapter.config.layers:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            layer = adapter.layers[layer_key(name)]
            assert torch.equal(layer.to_k.weight, attention.to_k.weight) == same
            assert torch.equal(layer.to_v.weight, attention.to_v.weight) == same
            assert layer.to_k.weight.data_ptr() != attention.to_k.weight.data_ptr()


def test_gradient_checkpointing_gives_the_same_gradients(kit: Any) -> None:
    module = SSRTrainingModule(kit.ssr.adapter, kit.pipe.unet)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            module.unet.enable_gradient_checkpointing()
        module.unet.train(checkpointed)
        module.zero_grad()
        module(**batch(kit))[0].square().mean().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_dropping_takes_prompt_subject_or_both() -> None:
    drop = Dropping(prompt=0.2, subject=0.1, both=0.4)
    assert [drop(u) for u in (0.0, 0.19)] == [(True, False)] * 2
    assert [drop(u) for u in (0.21, 0.29)] == [(False, True)] * 2
    assert [drop(u) for u in (0.31, 0.69)] == [(True, True)] * 2
    assert [drop(u) for u in (0.71, 0.999)] == [(False, False)] * 2
    assert Dropping()(0.0) == (False, False)
    assert Dropping(both=1.0)(0.999) == (True, True)
    for bad in ({"prompt": 1.1}, {"both": -0.1}, {"prompt": 0.6, "subject": 0.6}):
        with pytest.raises(ValueError, match="must their sum"):
            Dropping(**bad)


def test_a_dropped_subject_trains_the_regulariser_alone(kit: Any) -> None:
    """The null subject adds exactly nothing, so nothing flows back through the U-Net."""
    module, inputs = SSRTrainingModule(kit.ssr.adapter, kit.pipe.unet), batch(kit)
    prediction, subject = module(**inputs, keep_subject=torch.zeros(3, dtype=torch.bool))
    prediction.square().mean().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())
    reg_loss(subject.per_scale, subject.z_q).backward()
    assert kit.ssr.adapter.encoder.aligner.to_q.weight.grad.any()
