__version__ = "0.1.0"

import logging

# peft imports bitsandbytes wherever it is installed, and that advises another package at each import
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
