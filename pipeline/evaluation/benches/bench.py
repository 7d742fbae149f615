"""What a bench is: references in which subjects are known, and requests for pictures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from ssr_model.metrics import Sample

BoolMask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class SubjectName:
    """What a subject is called."""

    name: str
    """Its class, and the text query that means it: "cup". Without an article, whose state is the
    same for every query and dilutes the map of where a query looks."""
    phrase: str
    """What prompts call it: "a cup"."""

    @property
    def query(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class BenchSubject(SubjectName):
    """A subject of a reference, and what is known of it."""

    masks: tuple[BoolMask | None, ...]
    """Where it is in each of the reference's images, (h, w) of that image; None = not known."""

    @property
    def mask(self) -> BoolMask | None:
        """Where it is in the reference's first image."""
        return self.masks[0]


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture or more of the same subjects, to select from."""

    key: str
    images: tuple[Image.Image, ...]
    """RGB, upright; methods that take one picture take the first."""
    subjects: Sequence[BenchSubject]
    """One or more."""

    @property
    def image(self) -> Image.Image:
        return self.images[0]


@dataclass(frozen=True, eq=False)
class Selection:
    """One subject of one reference."""

    reference: Reference
    target: int
    """Index into the reference's subjects."""

    @property
    def subject(self) -> BenchSubject:
        return self.reference.subjects[self.target]

    @property
    def others(self) -> list[BenchSubject]:
        """The reference's other subjects, which a picture of this one should leave out."""
        return [s for i, s in enumerate(self.reference.subjects) if i != self.target]


@dataclass(frozen=True, eq=False)
class Outline:
    """A request without its pictures: what can be checked before any is read."""

    key: str
    prompt: str
    seed: int
    """These three as the request's."""
    subjects: tuple[SubjectName, ...]
    """Of its selections, in their order."""
    masked: bool
    """Whether the masks of all of them in their references' first images are known."""


@dataclass(frozen=True, eq=False)
class Request:
    """One picture to draw: what to take from where, into which sentence."""

    key: str
    """Its name, unique in the bench: pictures drawn elsewhere lie in <key>.png."""
    selections: tuple[Selection, ...]
    """The subjects to show, one or more, of one reference or of several."""
    prompt: str
    """The sentence, with the subjects by their phrases, in the selections' order."""
    seed: int
    """Seed of the initial noise; the same seed gives every method the same noise."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else results say of it, JSON-able: the number of its prompt, ..."""

    @property
    def reference(self) -> Reference:
        """The first selection's reference."""
        return self.selections[0].reference

    @property
    def outline(self) -> Outline:
        subjects = tuple(selection.subject for selection in self.selections)
        masked = all(subject.mask is not None for subject in subjects)
        return Outline(self.key, self.prompt, self.seed, subjects, masked)

    def left_out(self) -> list[BenchSubject]:
        """Subjects of the references that the picture was not asked to show, each once."""
        chosen = {id(selection.subject) for selection in self.selections}
        others = [other for selection in self.selections for other in selection.others]
        return list({id(o): o for o in others if id(o) not in chosen}.values())

    def sample(self, picture: Image.Image, masks: Sequence[BoolMask] | None = None) -> Sample:
        """The picture drawn for it, with all that metrics compare it with.

        masks: where each selection's subject is in the picture, zero everywhere where it is not;
        None = nobody looked. Subjects whose reference has no mask are left out of `subjects`, and
        so are all of a sample where any is.
        """
        from ssr_model.metrics import MaskedSubject, Sample  # slow: torch

        references = list({id(s.reference): s.reference for s in self.selections}.values())
        subjects = []
        for place, selection in enumerate(self.selections):
            views = zip(selection.reference.images, selection.subject.masks, strict=True)
            known = [(image, mask) for image, mask in views if mask is not None]
            found = None if masks is None else masks[place]
            if known:
                subjects.append(MaskedSubject(selection.subject.name, known, found))
        return Sample(
            picture,
            text=self.prompt,
            others=[subject.phrase for subject in self.left_out()],
            references=[image for reference in references for image in reference.images],
            subjects=subjects if len(subjects) == len(self.selections) else [],
        )


class Bench(Protocol):
    """Requests with known answers, in a fixed order: those of a reference follow one another."""

    @property
    def name(self) -> str:
        """Its folder under evaluation/: "mini", "dreambench", ..."""
        ...

    @property
    def title(self) -> str:
        """What tables call it: "100 held-out mini scenes, two subjects each"."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """JSON of everything that shapes its requests: seeds, the hashes of its files."""
        ...

    @property
    def published(self) -> bool:
        """Whether figures of the paper are of this very bench, so that they may stand beside."""
        ...

    def __len__(self) -> int:
        """Number of requests."""
        ...

    def references(self) -> Sequence[tuple[int, int]]:
        """For each reference in turn the first of its requests and the one after its last."""
        ...

    def outlines(self) -> list[Outline]:
        """Of all requests, in their order; no picture is read."""
        ...

    def masks(self) -> Iterator[tuple[str, BoolMask]]:
        """Of every subject that is asked for what to call it in messages, and its mask in its
        reference's first image, where it is known, in the mask's own size; no picture is read.
        """
        ...

    def requests(self, start: int, stop: int) -> list[Request]:
        """Requests start, ..., stop - 1, with their pictures read. Raises UserError."""
        ...
