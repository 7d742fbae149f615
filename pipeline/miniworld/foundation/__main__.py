"""Train the mini models from nothing: python -m pipeline.miniworld.foundation [--help].

Every model is seeded and resumable: run the same command again and it goes on. A model that
`foundation.json` in the output folder notes with the same lengths is not trained again. The file
holds each recipe, the scores on held-out scenes, and the hash of every file of weights. More steps
than a checkpoint in the work folder has are added to it, on the longer schedule.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPVisionModel

from pipeline.miniworld import world
from pipeline.miniworld.foundation import blip2, clip, dino, judging, text, unet, vae
from pipeline.miniworld.foundation.corpus import Corpus, build
from pipeline.miniworld.foundation.fitting import seconds_spent
from pipeline.miniworld.judge import Judge
from pipeline.models import device
from ssr_model.metrics import load_clip, load_dino

SCENES = 32_000
STEPS = {
    "vae": 1600,
    "clip_text": 700,
    "clip_vision": 4500,
    "judge": 1500,
    "unet": 19_000,
    "unet_parts": 3000,
    "blip2": 4000,
    "dino": 2000,
}
PARTS = {  # model -> the trainings it is made of, in the order in which they need one another
    "vae": ("vae",),
    "clip": ("clip_text", "clip_vision"),
    "judge": ("judge",),
    "unet": ("unet", "unet_parts"),
    "blip2": ("blip2",),
    "dino": ("dino",),
}
MODULES = {
    "vae": vae,
    "clip": clip,
    "judge": judging,
    "unet": unet,
    "blip2": blip2,
    "dino": dino,
}
SHIPPED = Path(__file__).parent.parent / "weights"
JSON = dict[str, Any]


class Foundation:
    """The six models: each method trains one, saves it and scores it."""

    def __init__(
        self,
        work: Path,
        out: Path,
        steps: dict[str, int],
        scenes: int,
        held_out: int,
        device: torch.device,
    ) -> None:
        self.work, self.out, self.steps, self.device = work, out, steps, device
        self.scenes, self.held_out = scenes, held_out
        self.tokenizer = text.build_tokenizer()

    @property
    def corpus(self) -> Corpus:
        return build("foundation", self.scenes, self.work / f"scenes-{self.scenes}.npz")

    def vae(self) -> JSON:
        model = vae.train(self.corpus, self.work, self.steps["vae"], self.device, say)
        scores = {"psnr_db": vae.psnr(model, build("val", self.held_out))}
        model.half().save_pretrained(self.out / "sd" / "vae")
        return scores

    def clip(self) -> JSON:
        model = clip.build(self.tokenizer).to(self.device)
        known = (model, self.corpus, self.tokenizer, self.work)
        clip.train_text(*known, self.steps["clip_text"], say)
        clip.train_vision(*known, self.steps["clip_vision"], say)
        one, two = (
            build("val", 2 * self.held_out, subjects=1),
            build("val", self.held_out, subjects=2),
        )
        scores = clip.scores(model, self.tokenizer, one, two)
        folder = self.out / "clip"
        model.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        clip.image_processor().save_pretrained(folder)
        return scores

    def judge(self) -> JSON:
        model = judging.train(self.corpus, self.work, self.steps["judge"], self.device, say)
        model.cpu().save(self.out / "judge")
        return judging.scores(Judge.load(self.out / "judge"), build("val", self.held_out))

    def unet(self) -> JSON:
        autoencoder = AutoencoderKL.from_pretrained(self.out / "sd" / "vae").float().eval()
        text_encoder = CLIPTextModel.from_pretrained(self.out / "clip").float().eval()
        model = unet.train(
            self.corpus,
            autoencoder,
            text_encoder,
            self.tokenizer,
            self.work,
            (self.steps["unet"], self.steps["unet_parts"]),
            self.device,
            say,
        )
        scores: JSON = {}
        pipe = unet.pipeline(model, autoencoder, text_encoder, self.tokenizer)
        judge = Judge.load(self.out / "judge")
        for sampling in unet.SAMPLINGS:
            scores |= unet.scores(pipe, judge, self.held_out, sampling)[0]
        pipe.to(torch.float16).save_pretrained(self.out / "sd")
        return scores

    def blip2(self) -> JSON:
        processor = blip2.build_processor()
        tower = CLIPVisionModel.from_pretrained(self.out / "clip").float()
        model = blip2.train(
            self.corpus, processor, tower, self.work, self.steps["blip2"], self.device, say
        )
        scores = blip2.scores(model, processor, build("val", self.held_out))
        model.half().save_pretrained(self.out / "blip2")
        processor.save_pretrained(self.out / "blip2")
        return scores

    def dino(self) -> JSON:
        model = dino.train(self.corpus, self.work, self.steps["dino"], self.device, say)
        folder = self.out / "dino"
        model.half().save_pretrained(folder)
        dino.image_processor().save_pretrained(folder)
        backbones = load_dino(str(folder)), load_clip(str(self.out / "clip"))
        return dino.scores(*backbones, build("val", self.held_out))


def say(line: str) -> None:
    print(line, flush=True)


def record(out: Path, name: str, entry: JSON) -> None:
    """Write one model's recipe and scores, and every file's hash, into foundation.json."""
    path = out / "foundation.json"
    notes: JSON = json.loads(path.read_text()) if path.exists() else {}
    notes.setdefault("world", {"classes": list(world.CLASSES), "grounds": list(world.GROUNDS)})
    notes.setdefault("models", {})[name] = entry
    notes["sha256"] = {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*.safetensors"))
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(notes, indent=2) + "\n")
    partial.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.miniworld.foundation",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the finished models")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/foundation"), help="checkpoints and cache"
    )
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], help="models")
    parser.add_argument("--scenes", type=int, default=SCENES, help="training scenes")
    parser.add_argument("--held-out", type=int, default=300, help="held-out scenes of each check")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    for name, default in STEPS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}-steps", type=int, default=default, help=f"steps of {name}"
        )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = {name: getattr(args, f"{name}_steps") for name in STEPS}
    where = device(args.device)
    foundation = Foundation(args.work, args.out, steps, args.scenes, args.held_out, where)
    notes = args.out / "foundation.json"
    done = json.loads(notes.read_text())["models"] if notes.exists() else {}
    for name in args.only:
        module = MODULES[name]
        recipe = {
            "scenes": args.scenes,
            "seed": module.SEED,
            "batch": module.BATCH,
            "steps": {part: steps[part] for part in PARTS[name]},
        }
        if name in done and all(done[name].get(key) == value for key, value in recipe.items()):
            say(f"{name}: is there ({args.out}); to train it again, remove it from {notes}")
            say(f"{' ' * len(name)}  and its checkpoint {', '.join(PARTS[name])} from {args.work}")
            continue
        make: Callable[[], JSON] = getattr(foundation, name)
        scores = make()
        seconds = sum(seconds_spent(part, args.work) for part in PARTS[name])
        record(args.out, name, {**recipe, "seconds": seconds, "scores": scores})
        say(f"{name}: {json.dumps(scores)}; {seconds} s")
    say(f"wrote {args.out}; next: make demo")


if __name__ == "__main__":
    main()
