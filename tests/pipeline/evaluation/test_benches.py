import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.evaluation import benches
from pipeline.miniworld import world
from pipeline.miniworld.judge import palette_distance


def test_references_are_known_exactly() -> None:
    for reference in benches.mini_bench(20, 32):
        a, b = reference.subjects
        assert a.name != b.name and a.query.split()[-1] == a.name
        assert not (a.mask & b.mask).any() and a.mask.sum() > 20 and b.mask.sum() > 20
        assert not set(a.palette) & set(b.palette)
        pixels = np.asarray(reference.image)
        for subject in reference.subjects:
            own, other = (
                palette_distance(pixels[subject.mask].astype(np.float32), s.palette)
                for s in sorted(reference.subjects, key=lambda s: s is not subject)
            )
            assert own < 50 < other, "the mask lies on the subject's own colours"


def test_prompts_name_another_ground_and_no_appearance() -> None:
    words = {*world.COLOURS, *world.TEXTURES}
    for index, reference in enumerate(benches.mini_bench(20, 32)):
        scene = world.scene(index, "bench", 2)
        assert reference.ground in world.GROUNDS and reference.ground != scene.ground
        for target in (0, 1):
            prompt = reference.prompt(target)
            assert prompt == f"{reference.subjects[target].phrase} on {reference.ground}"
            assert not words & set(prompt.split())


def test_a_longer_bench_begins_with_the_shorter_one() -> None:
    short, long = benches.mini_bench(3, 32, seed=2), benches.mini_bench(5, 32, seed=2)
    assert [r.key for r in long[:3]] == [r.key for r in short]
    assert [r.ground for r in long[:3]] == [r.ground for r in short]
    assert not {r.key for r in long} & {r.key for r in benches.mini_bench(5, 32)}


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(UserError, match="references"):
        benches.mini_bench(count, 32)
