"""Nothing here reaches the network: models and tokenizers are made on the spot, and trl reports to nobody."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
