"""What a reader may trust without reading. The names that the notebook and scripts begin with are here."""

from machinery.errors import UserError
from machinery.figures import play, show, show_run
from machinery.machine import Machine
from machinery.notebook import load_definitions
from machinery.processes import gather
from machinery.saved_run import SavedRun
from machinery.settings import Settings, parse_overrides, setting
from machinery.tokenizers import decode_text

__all__ = [
    "Machine",
    "SavedRun",
    "Settings",
    "UserError",
    "decode_text",
    "gather",
    "load_definitions",
    "parse_overrides",
    "play",
    "setting",
    "show",
    "show_run",
]
