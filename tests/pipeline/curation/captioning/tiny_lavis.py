"""A BLIP-2 of LAVIS's own class with small, random parts; runs in LAVIS's environment alone.

`python tiny_lavis.py FOLDER` writes what a user would have: a checkpoint and a folder with an OPT.
"""

import sys
from pathlib import Path

from pipeline.curation.captioning.lavis_environment import import_lavis

import_lavis()

import torch  # noqa: E402
from lavis.common.registry import registry  # noqa: E402
from lavis.models.blip2_models.blip2 import LayerNorm  # noqa: E402
from lavis.models.blip2_models.blip2_opt import Blip2OPT  # noqa: E402
from lavis.models.blip2_models.Qformer import BertConfig, BertLMHeadModel  # noqa: E402
from lavis.models.eva_vit import VisionTransformer  # noqa: E402

WIDTH = 32


@registry.register_model("tiny_blip2_opt")
class TinyBlip2OPT(Blip2OPT):
    """`Blip2OPT` whose vision tower and Q-Former are small, and ask no hub for their sizes."""

    PRETRAINED_MODEL_CONFIG_DICT = {  # noqa: RUF012 (as LAVIS has it)
        "random": str(Path(__file__).with_suffix(".yaml"))
    }

    @classmethod
    def init_tokenizer(cls):
        return None  # the Q-Former's; captioning gives it no text

    @classmethod
    def init_vision_encoder(cls, name, img_size, *_):
        tower = VisionTransformer(
            img_size=img_size, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=4, mlp_ratio=2
        )
        return tower, LayerNorm(WIDTH)

    @classmethod
    def init_Qformer(cls, num_query_token, vision_width, cross_attention_freq=2):
        config = BertConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        config.encoder_width = vision_width
        config.add_cross_attention = True
        config.cross_attention_freq = cross_attention_freq
        config.query_length = num_query_token
        queries = torch.nn.Parameter(torch.randn(1, num_query_token, WIDTH))
        return BertLMHeadModel(config), queries


def write_opt(folder: Path, words: list[str]) -> None:
    """A two-layer OPT, and GPT-2's tokenizer whose merges make one token of each word."""
    import json

    from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    folder.mkdir(parents=True)
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values()]
    merges = []
    for word in words:
        made = "Ġ"
        for letter in word:
            merges.append(f"{made} {letter}")
            made += letter
            vocabulary.append(made)
    vocabulary = list(dict.fromkeys(vocabulary))
    merges = list(dict.fromkeys(merges))
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = GPT2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), bos_token="</s>",
        eos_token="</s>", unk_token="</s>", pad_token="<pad>", add_bos_token=True,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config = OPTConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=64,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, init_std=0.2,
        pad_token_id=1, bos_token_id=2, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    opt = OPTForCausalLM(config)
    # Only whole words and the line end are ever said; a tied head would repeat its input.
    head = torch.zeros(len(vocabulary), WIDTH)
    said = [vocabulary.index("Ġ" + word) for word in words]
    said.append(tokenizer("\n", add_special_tokens=False).input_ids[0])
    head[said] = torch.randn(len(said), WIDTH)
    with torch.no_grad():
        opt.lm_head.weight.copy_(head)
    opt.save_pretrained(folder)


def main(folder: Path) -> None:
    from omegaconf import OmegaConf

    torch.manual_seed(5)
    write_opt(folder / "opt", ["a", "dog", "cat", "fish", "red", "cup", "boat", "on", "sand"])
    cfg = OmegaConf.load(TinyBlip2OPT.default_config_path("random")).model
    cfg.opt_model = str(folder / "opt")
    TinyBlip2OPT.load_checkpoint_from_config = lambda *_: None
    model = TinyBlip2OPT.from_config(cfg).float()
    with torch.no_grad():
        for part in (model.visual_encoder, model.Qformer, model.opt_proj):
            for weight in part.parameters():
                weight.mul_(10 if weight.dim() > 1 else 1)  # captions differ from image to image
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("opt_model.")}
    torch.save({"model": own}, folder / "checkpoint.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
