"""A training run: its stages, its settings, what is done of it, and the work of one worker.

    train/init/                      the weights that it began from, see start.py
    train/<stage>/settings.json      what shapes its outcome; a run of other settings is refused
    train/<stage>/checkpoints/...    see checkpoint.py
    train/<stage>/metrics.jsonl      see record.py
    train/<stage>/attempts/...       see attempts.py
    train/<stage>/samples/...        see samples.py
    train/<stage>/done.json          the stage is over, and how it went
    train/owner.json                 which run may write: a newer one takes over
    train/done.json                  all stages are over and model/ is theirs
    model/                           the trained SSR-Encoder, for SSREncoder.from_pretrained

No Ray here: `Run` is picklable, is made by the driver, and `Run.work` runs on every worker.
"""

from __future__ import annotations

import functools
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from pipeline import models
from pipeline.config import TrainConfig
from pipeline.errors import UserError
from pipeline.shards import Manifest
from pipeline.storage import Storage
from pipeline.training import memory, trackers
from pipeline.training.checkpoint import Checkpoints
from pipeline.training.export import adapter_of, origin, write_model
from pipeline.training.loop import StageLoop
from pipeline.training.stage import STAGES, Frozen, Stage, World
from pipeline.training.start import Start, begin, read, read_kept
from pipeline.training.vision import OnlineVision
from ssr_model.config import SSRConfig
from ssr_model.encoder import SSRAdapter
from ssr_model.training_step import Dropping
from ssr_model.weights import CONFIG

MODEL = "model"
_OWNER, _DONE = "train/owner.json", "train/done.json"
# Where a run goes, how it is watched and how it is spread out do not shape what it learns.
_FREE = {
    "root", "data", "models", "init", "workers", "min_workers", "wait_minutes", "resize_minutes",
    "use_gpu", "ray", "semantic", "multi_scale", "checkpoint_steps", "keep_checkpoints",
    "keep_hours", "log_steps", "nonfinite", "validate_steps", "validate_rows", "micro_batch",
    "gradient_checkpointing", "compile", "corrupt", "verify",
    "sample_steps", "sample_rows", "sample_denoising", "sample_guidance", "sample_guidance_rescale",
    "gpu_hour_price", "trackers",
}  # fmt: skip
_SHAPE = (
    "heads",
    "head_dim",
    "value_projection",
    "token_norm",
    "init_layers",
    "mask_cls",
)  # none = the variant's


@dataclass
class Run:
    """One run of jobs/train.py, checked against what is there.

    Raises:
        UserError: no sealed features, or those of other encoders; settings that cannot be, or
            that are not those which the run under this root was begun with; weights to begin from
            that are of another model; a root that cannot be written.
    """

    cfg: TrainConfig
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        _check_config(self.cfg)
        trackers.check(self.cfg.trackers)
        self.storage = Storage(self.cfg.root)
        self.data = Storage(self.cfg.data or self.cfg.root)
        self.manifest = Manifest.load(self.data)
        if self.cfg.flip and not self.manifest.flipped:
            raise UserError(
                f"flip is true, but {self.data.url('features')} holds no features of mirrored "
                "images: curate with --features.flip true under another root, or leave it false"
            )
        self.stages = list(_stages(self.cfg, self.manifest))
        base, vision, revision = (
            self.cfg.models.base,
            self.cfg.models.vision,
            self.cfg.models.revision,
        )
        self.manifest.check_encoders(
            {
                "vision": models.identity(vision, revision=revision),
                "vae": models.identity(base, "vae", revision),
                "text": models.identity(base, "text_encoder", revision),
            }
        )
        self.unet = models.identity(base, "unet", revision)
        self.start = self._start()
        self.settings = {stage.name: self._settings(stage) for stage in self.stages}
        for stage in self.stages:
            self._check_settings(stage)
        self.storage.check_writable()

    # --- what is done ---

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: every stage is over and its model is exported."""
        if not all(self.done(stage) for stage in self.stages):
            return False
        if not all(self.storage.exists(path) for path in (_DONE, f"{MODEL}/{CONFIG}")):
            return False
        last = self.settings[self.stages[-1].name]
        return bool(self.storage.read_json(_DONE)["fingerprint"] == _fingerprint(last))

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """How the stage went, if it is over."""
        path = f"train/{stage.name}/done.json"
        return self.storage.read_json(path) if self.storage.exists(path) else None

    def figures(self) -> dict[str, dict[str, Any]]:
        """How each finished stage went, by name."""
        return {s.name: done["figures"] for s in self.stages if (done := self.done(s))}

    def position(self) -> tuple[int, int]:
        """(stages that are over, step of the newest checkpoint of the stage after them)."""
        over = [stage for stage in self.stages if self.done(stage)]
        if len(over) == len(self.stages):
            return len(over), 0
        steps = self._checkpoints(self.stages[len(over)]).steps()
        return len(over), steps[-1] if steps else 0

    # --- one writer ---

    def take_over(self) -> None:
        """From now on only this run writes here, and of it only what is sent out from now on; what
        is still alive elsewhere stops at its next checkpoint.
        """
        self.token = uuid.uuid4().hex
        if self.start is not None:
            self.start.keep(self.storage, self.cfg.models)
        for stage in self.stages:
            self.storage.write_json(f"train/{stage.name}/settings.json", self.settings[stage.name])
        self.storage.write_json(_OWNER, {"run": self.token, "since": _now()})

    def check_owner(self) -> None:
        """Raises UserError where a newer run has taken over."""
        owner = self.storage.read_json(_OWNER)
        if owner["run"] != self.token:
            where = self.storage.url("train")
            raise UserError(f"another run took over {where} at {owner['since']}; this one stops")

    # --- the work of one worker ---

    def work(
        self, world: World, leaving: Callable[[], bool] = lambda: False
    ) -> dict[str, dict[str, Any]] | None:
        """Train every stage that is not over, then export.

        Returns the figures, by stage; None where a worker's `leaving` ended it before, see
        `StageLoop`. The same call goes on then.
        """
        if world.rank == 0:
            self.check_owner()
        over = [world.from_first(self.done(s) if world.rank == 0 else None) for s in self.stages]
        left = [stage for stage, done in zip(self.stages, over, strict=True) if not done]
        memory.check_rows(self.cfg, left, self.data, self.manifest, world)
        frozen: Frozen | None = None
        base, vision = self.cfg.models.base, self.cfg.models.vision
        for stage in left:
            with memory.of_device(self.cfg, stage, world):
                frozen = frozen or self._frozen(world.device)
                adapter = self._adapter(stage, frozen)
                loop = StageLoop(
                    self.cfg,
                    stage,
                    world,
                    frozen,
                    adapter,
                    self.storage,
                    self.manifest,
                    self.data,
                    info={
                        "fingerprint": _fingerprint(self.settings[stage.name]),
                        "config": adapter.config.to_dict(),
                        "base_model": models.resolve(base),
                        "vision_model": models.resolve(vision),
                    },
                    run=self.token,
                    check_owner=self.check_owner,
                    leaving=leaving,
                )
                figures = loop.run()
            if loop.left:
                return None
            if world.rank == 0:
                done = {"step": loop.step, "finished": _now(), "figures": figures}
                self.storage.write_json(f"train/{stage.name}/done.json", done)
            world.from_first(None)  # the next stage begins from what the first worker has saved
        if world.rank == 0:
            self.check_owner()
            self._export()
        world.from_first(None)  # nobody leaves before the model is there
        return self.figures()

    def _frozen(self, device: torch.device) -> Frozen:
        base, revision = self.cfg.models.base, self.cfg.models.revision
        half = self.cfg.precision == "bf16"
        return Frozen(
            models.load_unet(base, revision, torch.bfloat16 if half else torch.float32),
            models.load_text_encoder(base, revision),
            models.load_tokenizer(base, revision),
            models.load_scheduler(base, revision=revision),
            models.vae_scaling_factor(base, revision),
            self._vision() if self.manifest.codec == "pixels" else None,
            functools.cache(functools.partial(models.load_vae, base, revision)),
        ).to(device)

    def _vision(self) -> OnlineVision:
        """The vision tower, on this worker: checked here too, for it makes what is trained on."""
        name, revision = self.cfg.models.vision, self.cfg.models.revision
        self.manifest.check_encoders({"vision": models.identity(name, revision=revision)})
        return OnlineVision(
            models.load_vision(name, revision),
            models.load_image_processor(name, revision),
            half=self.cfg.precision == "bf16",
        )

    def _adapter(self, stage: Stage, frozen: Frozen) -> SSRAdapter:
        """The trainables as the stage begins: from the stage before it, over what `init` names;
        else from the U-Net.
        """
        shape = self._shape(stage, frozen.text_encoder.config, frozen.unet)
        torch.manual_seed(self.cfg.seed)
        adapter = SSRAdapter(shape)
        known = read_kept(self.storage) if self.start is not None else {}
        if stage is not self.stages[0]:
            before = self.stages[self.stages.index(stage) - 1]
            known |= self._checkpoints(before).weights(before.optim.steps).tensors
        if known:
            begin(adapter, known)
        else:
            adapter.init_from_unet(frozen.unet)
        return adapter

    def _shape(self, stage: Stage, text_config: Any, unet: Any) -> SSRConfig:
        """Of the stage's trainables. `unet` is the U-Net, or its config."""
        try:
            return SSRConfig.from_models(
                models.load_vision_config(self.cfg.models.vision, self.cfg.models.revision),
                text_config,
                unet,
                depths=stage.depths,
                variant=self.cfg.variant,
                start_token=self.cfg.start_token,
                **{key: value for key in _SHAPE if (value := getattr(self.cfg, key)) is not None},
            )
        except ValueError as error:
            raise UserError(f"the encoder's settings do not fit: {error}") from None

    def _start(self) -> Start | None:
        """What the run begins from, or was begun from; checked before anything is started."""
        if self.cfg.init is None:
            return None
        kept = Start.kept(self.storage)
        if kept and kept.source == self.cfg.init and any(map(self._begun, self.stages)):
            return kept
        names = self.cfg.models
        start = read(self.cfg.init, names, self.cfg.heads)
        text_config = models.load_text_config(names.base, names.revision)
        unet_config = models.load_unet_config(names.base, names.revision)
        start.check(self._shape(self.stages[-1], text_config, unet_config))
        return start

    def _export(self) -> None:
        """Write model/ from the last stage's last checkpoint."""
        last = self.stages[-1]
        weights = self._checkpoints(last).weights(last.optim.steps)
        write_model(self.storage.sub(MODEL), adapter_of(weights), origin(weights))
        mark = {"fingerprint": _fingerprint(self.settings[last.name]), "finished": _now()}
        self.storage.write_json(_DONE, mark)

    # --- settings ---

    def _checkpoints(self, stage: Stage) -> Checkpoints:
        return Checkpoints(self.storage.sub(f"train/{stage.name}"))

    def _settings(self, stage: Stage) -> dict[str, Any]:
        """Everything that shapes what the stage learns, stages before it included, flat."""
        values = {key: value for key, value in asdict(self.cfg).items() if key not in _FREE}
        for earlier in self.stages[: self.stages.index(stage) + 1]:
            values |= {f"{earlier.name}.{k}": v for k, v in asdict(earlier.optim).items()}
        shards = [(shard["path"], shard["sha256"]) for shard in self.manifest.shards]
        values["features (root)"] = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
        values["models.base"] = self.unet["sha256"][:16]
        values["depths"] = list(stage.depths)
        values["init (sha256)"] = self.start.sha256[:16] if self.start else None
        return values

    def _begun(self, stage: Stage) -> bool:
        return bool(self.done(stage) or self._checkpoints(stage).steps())

    def _check_settings(self, stage: Stage) -> None:
        path = f"train/{stage.name}/settings.json"
        if not self._begun(stage) or not self.storage.exists(path):
            return
        before, now = self.storage.read_json(path), self.settings[stage.name]
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                where = self.storage.url("train")
                raise UserError(
                    f"{key} is {now.get(key)!r}, but {stage.name} under {where} was begun with "
                    f"{before.get(key)!r}: put it back, choose another root, or delete {where}"
                )


def _stages(cfg: TrainConfig, manifest: Manifest) -> Iterator[Stage]:
    depths = tuple(manifest.depths)
    if cfg.semantic.steps:
        yield Stage(STAGES[1], 0, depths[-1:], cfg.semantic)
    if cfg.multi_scale.steps:
        yield Stage(STAGES[2], 1, depths, cfg.multi_scale)


def _check_config(cfg: TrainConfig) -> None:
    """Refuse what cannot be, before anything is started."""
    if not cfg.semantic.steps and not cfg.multi_scale.steps:
        raise UserError(
            "semantic.steps and multi_scale.steps are both 0: there is nothing to train"
        )
    at_least = {
        "global_batch": 1, "micro_batch": 1, "lanes": 1, "shuffle_rows": 1, "heads": 1,
        "head_dim": 1, "queries": 1,
        "checkpoint_steps": 1, "keep_checkpoints": 1, "log_steps": 1, "seed": 0, "tau": 0,
        "keep_hours": 0, "clip_norm": 0, "weight_decay": 0, "validate_steps": 0, "validate_rows": 0,
        "min_workers": 1, "wait_minutes": 0, "resize_minutes": 0,
        "sample_steps": 0, "sample_rows": 1, "sample_denoising": 1, "sample_guidance": 0,
        "gpu_hour_price": 0,
    }  # fmt: skip
    for name, least in at_least.items():
        if (value := getattr(cfg, name)) is not None and value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    for stage in STAGES.values():
        for name in ("steps", "lr", "warmup_steps"):
            value = getattr(getattr(cfg, stage), name)
            if value < 0:
                raise UserError(f"{stage}.{name} is {value}; it must not be negative")
    try:
        Dropping(cfg.drop_prompt, cfg.drop_subject, cfg.drop_both)
    except ValueError as error:
        raise UserError(f"drop_prompt, drop_subject, drop_both: {error}") from None
    for name in ("drop_query", "drop_article", "ema_decay", "sample_guidance_rescale"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise UserError(f"{name} is {getattr(cfg, name)}; it must lie between 0 and 1")
    if cfg.workers is not None and cfg.min_workers is not None and cfg.min_workers > cfg.workers:
        raise UserError(
            f"min_workers is {cfg.min_workers}, more than workers, {cfg.workers}; change one"
        )
    if cfg.global_batch % cfg.lanes:
        raise UserError(
            f"global_batch {cfg.global_batch} is not a multiple of lanes {cfg.lanes}; change one"
        )


def _fingerprint(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
