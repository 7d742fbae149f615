"""A trained SSR-Encoder as a service: an HTTP API, and a page on it.

python jobs/serve.py                                        # http://127.0.0.1:8000
python jobs/serve.py --replicas 2 --batch 8 --dtype float16
SSR_TOKEN=$(openssl rand -hex 32) python jobs/serve.py --host 0.0.0.0
Ctrl-C or SIGTERM: what is being drawn is finished, up to --drain_s; then it ends.
"""

from __future__ import annotations

import dataclasses
import signal
import threading

from pipeline.cluster import connect, private
from pipeline.config import ServeConfig, parse
from pipeline.config.shared import absolute
from pipeline.errors import run, take_signals
from pipeline.progress import quiet_libraries, say
from pipeline.serving.access import read_token
from pipeline.serving.listening import free_port, url
from pipeline.storage import Storage


def main() -> None:
    cfg = parse(ServeConfig)
    quiet_libraries()
    token = read_token(cfg)
    port = free_port(cfg) if private(cfg.ray) else cfg.port
    cfg = dataclasses.replace(cfg, root=absolute(cfg.root), port=port)

    from pipeline.generation.sampler import model_folder, model_identity  # slow: after the settings

    with model_folder(Storage(cfg.root), cfg.model) as folder:
        model_identity(folder)  # one line where there is no model, before anything is started

    with connect(cfg.ray):
        from pipeline.serving.deployment import resources, served

        say(f"starting {cfg.replicas} replica(s), {resources(cfg).gpus:g} GPU(s) each")
        with served(cfg, token):
            stop = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            show(cfg, token is not None)
            while not stop.wait(1.0):
                pass
            take_signals()  # a second one ends it at once
            say(f"stopping: what is being drawn is finished, up to {cfg.drain_s:g} s")
    say("stopped")


def show(cfg: ServeConfig, with_token: bool) -> None:
    here = url(cfg)
    bearer = '-H "Authorization: Bearer $SSR_TOKEN" ' if with_token else ""
    recipe = '{"prompt":"a cup on snow","subjects":[{"image":0,"query":"cup"}]}'
    say(f"service:  {here}")
    if cfg.page:
        say(f"page:     {here}/")
    say(f"api:      {here}/openapi.json")
    asked = f"-F 'recipe={recipe}' -F files=@cup.png -o out.png"
    say(f"try:      curl {bearer}{here}/v1/pictures {asked}")
    say("stop:     Ctrl-C, or SIGTERM")


if __name__ == "__main__":
    run(main)
