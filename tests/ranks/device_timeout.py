"""Stage train whose collectives on the devices give up after some seconds.

    device_timeout.py gloo|devices SECONDS STORE CONFIG [key=value …]

gloo: ranks wait as they do in `trace-opd train`. devices: they wait in a collective on the devices.
"""

import sys
from datetime import timedelta

from trace_opd.data.store import Store
from trace_opd.pipelines.stages import train
from trace_opd.schemas.configs import TrainConfig
from trace_opd.schemas.settings import load_config
from trace_opd.trace import ranks

waits_in, seconds, root, config, *overrides = sys.argv[1:]
if waits_in == "devices":
    ranks._waiting_group = lambda hours: None
ranks.join_ranks("cpu", device_timeout=timedelta(seconds=float(seconds)))
train.run(load_config(TrainConfig, config, overrides, "train"), Store(root))
