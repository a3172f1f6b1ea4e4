"""Files, as Flax asks for them where TensorFlow is installed."""

import os
from types import SimpleNamespace

gfile = SimpleNamespace(isdir=os.path.isdir, makedirs=os.makedirs)
