"""Stage train whose collectives on the devices give up after some seconds.

    device_timeout.py gloo|devices SECONDS STORE CONFIG [key=value …]

gloo: ranks wait as they do in `trace-opd train`. devices: they wait in a collective on the devices.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from trace_opd.data.store import Store
from trace_opd.pipelines.stages import train
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.settings import load_config
from trace_opd.trace import ranks

waits_in, seconds, root, config, *overrides = sys.argv[1:]
if waits_in == "devices":
    ranks._waiting_group = lambda hours: None
# The time-out also counts while a rank waits for the other's start, which takes long under load.
Path(root, f"started-{os.environ['RANK']}").touch()
while len(list(Path(root).glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.1)
ranks.join_ranks("cpu", device_timeout=timedelta(seconds=float(seconds)))
train.run(load_config(TrainConfig, config, overrides, "train"), Store(root))
