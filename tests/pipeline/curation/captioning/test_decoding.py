import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pipeline.config import CaptionConfig
from pipeline.curation.captioning.decoding import SeededSampling, grouped, mended, texts

END = 0


def sampled(
    scores: torch.Tensor, keys: list[str], steps: int = 1, **cfg: float
) -> tuple[list[list[int]], SeededSampling]:
    """Tokens that each row draws from the same `scores` (rows, vocabulary) at every step."""
    sampling = SeededSampling(CaptionConfig(**{"temperature": 1.0, **cfg}), keys, END)  # type: ignore[arg-type]
    ids = torch.zeros(len(scores), 0, dtype=torch.int64)
    for _ in range(steps):
        token = sampling(ids, scores).argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
    return ids.tolist(), sampling


def test_draws_follow_the_distribution() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    keys = [f"key{i}" for i in range(4000)]
    drawn, _ = sampled(p.log().expand(len(keys), -1), keys, top_p=1.0)
    shares = np.bincount([row[0] for row in drawn], minlength=4) / len(keys)
    assert np.abs(shares - p.numpy()).max() < 0.03


def test_temperature_sharpens_and_the_nucleus_cuts() -> None:
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    keys = [f"key{i}" for i in range(1000)]
    scores = p.log().expand(len(keys), -1)
    cold, _ = sampled(scores, keys, temperature=0.1, top_p=1.0)
    assert sum(row[0] == 3 for row in cold) > 930  # 0.4 ** 10 of the sum of all: 0.946
    nucleus, _ = sampled(scores, keys, top_p=0.65)
    assert {row[0] for row in nucleus} == {2, 3}
    narrow, _ = sampled(scores, keys, top_p=0.01)
    assert {row[0] for row in narrow} == {3}


def test_a_row_draws_the_same_whatever_stands_beside_it() -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 50)
    keys = list("abcdef")
    together, _ = sampled(scores, keys, steps=5)
    order = [4, 0, 2]
    apart, _ = sampled(scores[order], [keys[i] for i in order], steps=5)
    assert apart == [together[i] for i in order]
    assert sampled(scores, keys, steps=5, seed=1)[0] != together
    same, _ = sampled(scores[:1].expand(6, -1), keys, steps=5)
    assert len({tuple(row) for row in same}) > 1


def test_captions_of_one_image_differ_and_the_likeliest_comes_first() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 50).repeat_interleave(4, dim=0)
    ids, sampling = sampled(scores, ["a", "b"], steps=3, captions_per_image=4, top_p=1.0)
    assert len({tuple(row) for row in ids[:4]}) == 4
    log_p = scores.log_softmax(-1)
    expected = []
    for row, tokens in enumerate(ids):
        counted = tokens[: tokens.index(END) + 1] if END in tokens else tokens
        expected.append(float(log_p[row, counted].mean()))
    assert np.allclose(sampling.likelihood(), expected, atol=1e-5)
    for image, group in enumerate(grouped([str(i) for i in range(8)], 4, sampling)):
        rows = [int(name) for name in group]
        assert sorted(rows) == list(range(4 * image, 4 * image + 4))
        assert [expected[i] for i in rows] == sorted((expected[i] for i in rows), reverse=True)


def test_what_follows_the_end_does_not_count() -> None:
    certain = torch.full((1, 5), -30.0)
    certain[0, END] = 30.0
    _, sampling = sampled(certain, ["a"])
    sampling(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 5))  # padding, after the end
    assert np.allclose(sampling.likelihood(), 0.0, atol=1e-6)


PIECES = ["<end>", "a", "dog", "##gy", "on", "the", "sand"]


@pytest.fixture(scope="module")
def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of word pieces: "dog" begins a word, "##gy" goes on with it."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<end>"))
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.mark.parametrize(
    ("pieces", "limit", "told"),
    [
        ("a dog on the sand <end>", 8, "a dog on the sand"),  # it ended by itself
        ("a dog on the sand <end>", 5, "a dog on the sand"),  # exactly at the limit
        ("a dog on", 2, "a dog"),  # cut, between words
        ("a dog on the sand", 4, "a dog"),  # cut, and "on the" leads nowhere
        ("a dog on dog ##gy", 4, "a dog"),  # cut within "doggy"
        ("a dog ##gy on", 3, "a doggy"),  # "doggy" was whole
        ("dog ##gy", 1, ""),  # nothing whole
        ("a dog on <end> <end>", 4, "a dog on"),  # the model's own end is left alone
    ],
)
def test_a_text_at_its_limit_ends_in_a_whole_word(
    word_pieces: PreTrainedTokenizerFast, pieces: str, limit: int, told: str
) -> None:
    ids = torch.tensor([[PIECES.index(piece) for piece in pieces.split()]])
    assert texts(word_pieces, ids[:, : limit + 1], limit, END) == [told]


@pytest.mark.parametrize(
    ("text", "caption", "reason"),
    [
        ("a dog on sand", "a dog on sand", ""),
        ("", "", "empty_caption"),
        (" ... !?", "", "empty_caption"),
        ("dog dog dog dog", "", "repeated_word"),
        ("Dog, dog. dog", "", "repeated_word"),
        ("dog", "dog", ""),
        ("a dog on sand sand sand sand", "a dog on sand", ""),
        ("a dog on a bed on a bed on a bed", "a dog on a bed", ""),
        ("a cat and a cat and a cat and a cat", "a cat and a cat", ""),
        ("a red car a red car a red car", "a red car", ""),
        ("a man and a woman and a dog", "a man and a woman and a dog", ""),
        ("a no no sign", "a no no sign", ""),
        ("2 2 2 cats", "2 cats", ""),
    ],
)
def test_a_degenerate_text_is_mended_or_refused(text: str, caption: str, reason: str) -> None:
    assert mended(text) == (caption, reason)
