"""Linear -> cross-entropy heads without logits, for unmodified models under torch.compile.

import lce_inductor
lce_inductor.install()
model = torch.compile(model)
"""

# Light on purpose: TORCH_LOGS="+lce_inductor" imports this package while torch itself is still being imported.
from .config import Config
from .deferred_heads.module import Deferred, defer
from .explaining.explanation import Explanation, explain
from .install import current_config, inductor_options, install, installed, is_installed, uninstall
from .reporting.history import Report, report

__version__ = "0.2.0"
__all__ = [
    "Config",
    "Deferred",
    "Explanation",
    "Report",
    "current_config",
    "defer",
    "explain",
    "inductor_options",
    "install",
    "installed",
    "is_installed",
    "report",
    "uninstall",
]
