"""Aligner and subject encoder against slow, plain einsum references."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from ssr_model.aligner import TokenToPatchAligner
from ssr_model.config import VARIANTS, SSRConfig
from ssr_model.encoder import SSRAdapter, SubjectEncoder


def config(**fields: Any) -> SSRConfig:
    shape: dict[str, Any] = {
        "vision_dim": 12,
        "text_dim": 10,
        "depths": (2, 4, 6),
        "layers": {"down.attn2.processor": 8, "up.attn2.processor": 16},
        "heads": 2,
        "head_dim": 4,
    }
    return SSRConfig(**{**shape, **fields})


def reference_attention(aligner: TokenToPatchAligner, z_q: Any, z_0: Any, mask: Any = None) -> Any:
    """Eq. 1-2 per head, in float64; the mask multiplies A, then rows are normalised."""
    heads = []
    width = aligner.to_q.weight.shape[0] // aligner.heads
    for head in range(aligner.heads):
        rows = slice(head * width, (head + 1) * width)
        q = torch.einsum("bnd,ed->bne", z_q.double(), aligner.to_q.weight[rows].double())
        k = torch.einsum("bnd,ed->bne", z_0.double(), aligner.to_k.weight[rows].double())
        a = torch.einsum("bqe,bie->bqi", q, k).div(math.sqrt(width)).exp()
        a = a / a.sum(-1, keepdim=True)
        if mask is not None:
            a = a * mask[:, None].double()
            a = a / a.sum(-1, keepdim=True)
        heads.append(a)
    return torch.stack(heads, dim=1)


def reference_tokens(encoder: SubjectEncoder, z_q: Any, features: Any, mask: Any = None) -> Any:
    """Eq. 3 for each scale, then LayerNorm."""
    a = reference_attention(encoder.aligner, z_q, features[max(features)], mask)
    scales = []
    for depth in sorted(features):
        w = encoder.to_v[str(depth)].weight.double()
        v = torch.einsum("bid,ed->bie", features[depth].double(), w)
        width = v.shape[-1] // a.shape[1]
        merged = torch.cat(
            [a[:, h] @ v[..., h * width : (h + 1) * width] for h in range(a.shape[1])], dim=-1
        )
        if encoder.config.value_projection == "factored":
            merged = merged @ encoder.to_out[str(depth)].weight.double().T
        scales.append(merged)
    c = torch.cat(scales, dim=1)
    if not encoder.config.token_norm:
        return c
    c = (c - c.mean(-1, keepdim=True)) / (c.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return c * encoder.norm.weight.double() + encoder.norm.bias.double()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed: int, variant: Any) -> None:
    torch.manual_seed(seed)
    draw = [int(n) for n in torch.randint(1, 5, (5,))]
    batch, n_q, n_i, heads, scales = draw[0], draw[1], draw[2] + 1, draw[3], min(draw[4], 3)
    own = {key: VARIANTS[variant][key] for key in ("value_projection", "token_norm")}
    shape = config(heads=heads, depths=(2, 4, 6)[:scales], text_dim=4 * heads, **own)
    encoder = SubjectEncoder(shape)
    z_q = torch.randn(batch, n_q, shape.text_dim)
    features = {d: torch.randn(batch, n_i, shape.vision_dim) * 3 for d in shape.depths}
    mask = (torch.rand(batch, n_i) * 2).clamp(0, 1)
    mask[:, -1] = 1
    for m in (None, mask):
        out = encoder(z_q, features, m)
        assert out.tokens.shape == (batch, scales * n_q, shape.text_dim)
        assert out.per_scale.shape == (batch, scales, n_q, shape.text_dim)
        attention = reference_attention(encoder.aligner, z_q, features[shape.depths[-1]], m)
        torch.testing.assert_close(out.attention.double(), attention, atol=1e-5, rtol=1e-4)
        tokens = reference_tokens(encoder, z_q, features, m)
        torch.testing.assert_close(out.tokens.double(), tokens, atol=1e-4, rtol=1e-3)


def test_mask_leaves_out_exactly() -> None:
    shape = config()
    encoder = SubjectEncoder(shape)
    z_q = torch.randn(2, 3, 10)
    features = {d: torch.randn(2, 5, 12) for d in shape.depths}
    mask = torch.tensor([[0.0, 1, 1, 0, 0], [1.0, 1, 1, 1, 1]])
    out = encoder(z_q, features, mask)
    assert (out.attention[0, :, :, [0, 3, 4]] == 0).all()
    plain = encoder(z_q, features)
    assert torch.equal(out.tokens[1], plain.tokens[1])
    hidden = {d: f.clone() for d, f in features.items()}
    for f in hidden.values():
        f[0, 3:] = 7.0  # what the mask leaves out cannot matter
    assert torch.equal(encoder(z_q, hidden, mask).tokens[0], out.tokens[0])


def test_released_mask_adds_to_logits() -> None:
    shape = config(variant="released", **{**VARIANTS["released"], "mask_weight": 3.0})
    aligner = TokenToPatchAligner(shape)
    logits = aligner.mask_logits(torch.tensor([[1.0, 1.0, 0.0, 0.5]]))
    # CLS +1, inside +w^2 - ... as m - (1 - m) w with m = [1, w mask]
    torch.testing.assert_close(logits, torch.tensor([[1.0, 9.0, -3.0, 3.0]]))


def test_scales_can_be_restricted() -> None:
    shape = config()
    encoder = SubjectEncoder(shape)
    z_q, features = torch.randn(1, 3, 10), {d: torch.randn(1, 5, 12) for d in shape.depths}
    whole, last = encoder(z_q, features), encoder(z_q, {6: features[6]})
    assert torch.equal(last.tokens, whole.tokens[:, -3:])
    with pytest.raises(ValueError, match="lack depth 6"):
        encoder(z_q, {2: features[2]})
    with pytest.raises(ValueError, match="depth 5 is not one"):
        encoder(z_q, {5: features[6], 6: features[6]})


@pytest.mark.parametrize("kind", ["direct", "factored"])
def test_stage_two_starts_from_stage_one(kind: str) -> None:
    adapter = SSRAdapter(config(value_projection=kind))
    adapter.train_scales([6])
    frozen = {n for n, p in adapter.named_parameters() if not p.requires_grad}
    factors = ["to_v"] if kind == "direct" else ["to_v", "to_out"]
    assert frozen == {f"encoder.{m}.{d}.weight" for m in factors for d in (2, 4)}
    adapter.encoder.start_new_scales_from(6)
    adapter.train_scales([2, 4, 6])
    assert all(p.requires_grad for p in adapter.parameters())
    for projections in (adapter.encoder.get_submodule(name) for name in factors):
        last = projections["6"].weight
        for key in ("2", "4"):
            assert torch.equal(projections[key].weight, last)
            assert projections[key].weight.data_ptr() != last.data_ptr()


def test_wrong_mask_shape() -> None:
    encoder = SubjectEncoder(config())
    with pytest.raises(ValueError, match="mask must be"):
        encoder(
            torch.randn(2, 3, 10),
            {6: torch.randn(2, 5, 12)},
            torch.ones(2, 4),
        )


def test_without_its_start_token_a_query_says_the_same_whatever_stands_there() -> None:
    torch.manual_seed(0)
    shape = config(start_token=False)
    encoder = SubjectEncoder(shape)
    z_q = torch.randn(2, 5, shape.text_dim)
    other = torch.cat([torch.randn(2, 1, shape.text_dim), z_q[:, 1:]], dim=1)
    features = {d: torch.randn(2, 7, shape.vision_dim) for d in shape.depths}
    out = encoder(z_q, features)
    assert out.per_scale.shape == (2, 3, 4, shape.text_dim)
    assert torch.equal(out.z_q, z_q[:, 1:])
    assert torch.equal(out.tokens, encoder(other, features).tokens)
    whole = SubjectEncoder(config())
    whole.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(whole(z_q, features).per_scale[:, :, 1:], out.per_scale)


def test_the_paper_reads_as_its_equations() -> None:
    """One softmax, one matrix of a scale, nothing after: Eq. 1-3 in four lines."""
    shape = {"vision_dim": 12, "text_dim": 10, "depths": (2, 4), "layers": {"attn2.processor": 8}}
    encoder = SubjectEncoder(SSRConfig(**shape, **VARIANTS["paper"]))
    z_q, z = torch.randn(1, 3, 10), {d: torch.randn(1, 5, 12) for d in (2, 4)}
    q, k = z_q @ encoder.aligner.to_q.weight.T, z[4] @ encoder.aligner.to_k.weight.T
    a = (q @ k.transpose(1, 2) / math.sqrt(512)).softmax(dim=-1)
    c = torch.cat([a @ (z[d] @ encoder.to_v[str(d)].weight.T) for d in (2, 4)], dim=1)
    out = encoder(z_q, z)
    torch.testing.assert_close(out.tokens, c)
    torch.testing.assert_close(out.attention[:, 0], a)
    assert len(list(encoder.parameters())) == 2 + 2


def test_heads_that_do_not_divide_a_direct_projection() -> None:
    with pytest.raises(ValueError, match="heads that divide the text's width: 3 and 10"):
        config(heads=3, value_projection="direct")
