"""One file for each architecture of transformers, named as its `model_type`, with an `ARCHITECTURE`.

A file that lies here is known everywhere, to be read, written, chosen and listed; nothing else has to name it.
"""

import pkgutil

MODEL_TYPES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
"""What `model_type` says in the folders that are read and written."""
