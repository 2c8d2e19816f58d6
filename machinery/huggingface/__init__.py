"""Models leave and enter as Hugging Face checkpoints."""

from machinery.huggingface.families import ExportError
from machinery.huggingface.weights import begin_with, config_from_hf, export_hf, import_hf

__all__ = ["ExportError", "begin_with", "config_from_hf", "export_hf", "import_hf"]
