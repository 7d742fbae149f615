"""One differentiable step of the method: from cached features to the U-Net's prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ssr_model.attention import SubjectAttention
from ssr_model.branch import SubjectBranch
from ssr_model.encoder import SSRAdapter, SubjectEmbedding, check_layers


@dataclass(frozen=True)
class Dropping:
    """How often training leaves out the prompt, the subject, or both: probabilities of events that
    exclude each other.

    The null subject adds exactly nothing, so with a frozen U-Net a sample without its subject has
    no gradient but that of L_reg.
    """

    prompt: float = 0.0
    subject: float = 0.0
    both: float = 0.0

    def __post_init__(self) -> None:
        chances = (self.prompt, self.subject, self.both)
        if not all(0 <= chance <= 1 for chance in chances) or sum(chances) > 1 + 1e-9:
            raise ValueError(
                "the probabilities of dropping prompt, subject and both must lie in [0, 1], and so "
                f"must their sum: {', '.join(map(str, chances))}."
            )

    def __call__(self, uniform: float) -> tuple[bool, bool]:
        """(drop the prompt, drop the subject) of one sample, by a number drawn from [0, 1)."""
        alone, either = self.prompt, self.prompt + self.subject
        both = either <= uniform < either + self.both
        return uniform < alone or both, alone <= uniform < either or both


class SSRTrainingModule(nn.Module):
    """The adapter in front of a frozen U-Net; what DistributedDataParallel wraps.

    Every trainable tensor is the adapter's, is registered here and is used in `forward`, so every
    gradient is averaged over the workers. The U-Net is frozen and not registered: it is neither
    moved, saved nor trained with this module; move it yourself.
    """

    def __init__(self, adapter: SSRAdapter, unet: nn.Module) -> None:
        super().__init__()
        check_layers(adapter.config, unet)
        self.adapter = adapter
        unet.requires_grad_(False)
        self._attention = SubjectAttention.install(unet, adapter.config.layers)

    @property
    def unet(self) -> Any:
        """The frozen U-Net."""
        return self._attention.unet

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        prompt_embeds: Tensor,
        z_q: Tensor,
        features: Mapping[int, Tensor],
        mask: Tensor | None = None,
        keep_subject: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, SubjectEmbedding]:
        """Prediction (B, C, h, w) of the U-Net under prompt and subject, and the subject's
        embedding.

        noisy_latents: (B, C, h, w); timesteps: (B,); prompt_embeds: (B, N_t, D); z_q: (B, N_q, D),
        or (B, S, N_q, D) for S subjects of each image, whose tokens condition it together, as
        several subjects do at inference. features: {depth: (B, N_i, d)}, only the depths of the
        stage. mask: (B, N_i) for mask queries, (B, S, N_i) with S subjects. keep_subject: (B,)
        bool; where false the subject is dropped (the null subject: it contributes exactly
        nothing). added_cond_kwargs: what a U-Net of SDXL is told besides (`text_embeds`,
        `time_ids`). The embedding returned has a row per subject: B, or B * S.
        """
        subjects = z_q.shape[1] if z_q.dim() == 4 else 1
        if z_q.dim() == 4:
            z_q = z_q.flatten(0, 1)
            mask = None if mask is None else mask.flatten(0, 1)
            features = {d: state.repeat_interleave(subjects, 0) for d, state in features.items()}
        embedding = self.adapter.encoder(z_q, features, mask)
        together = embedding.tokens.unflatten(0, (-1, subjects)).flatten(1, 2)
        pairs = self.adapter.keys_values(together)
        keys = {name: key for name, (key, _) in pairs.items()}
        values = {name: value for name, (_, value) in pairs.items()}
        if keep_subject is not None:
            values = {
                name: v * keep_subject[:, None, None].to(v.dtype) for name, v in values.items()
            }
        # not cleared afterwards: gradient checkpointing runs the layers again in the backward pass
        self._attention.slot.conditional = SubjectBranch(keys, values)
        prediction = self.unet(
            noisy_latents,
            timesteps,
            prompt_embeds,
            added_cond_kwargs=added_cond_kwargs,
            return_dict=False,
        )[0]
        return prediction, embedding

    @contextmanager
    def showing(self, tokens: Tensor | None, guided: bool) -> Iterator[None]:
        """Within the block a pipeline that runs the U-Net draws these subjects, (B, T, D), one for
        each of its B prompts; None = no subjects.

        guided: its batch is [unconditional, conditional], and the first half sees none.
        """
        slot = self._attention.slot
        slot.clear()  # of the last training step's
        if tokens is not None:
            pairs = self.adapter.keys_values(tokens)
            keys = {name: key for name, (key, _) in pairs.items()}
            slot.conditional = SubjectBranch(keys, {name: v for name, (_, v) in pairs.items()})
            slot.guided = guided
        try:
            yield
        finally:
            slot.clear()

    def release(self) -> None:
        """Give the U-Net its own attention processors back."""
        self._attention.remove()
