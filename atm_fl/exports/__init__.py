"""The model that a run made, taken home: a folder that other libraries load, with a model card.

    README.md             the model card: base, tasks, rounds, merge, accuracies, privacy, licences, versions
    atm-fl.json           what `predict` needs: the format, the image's size, mean and deviation
    heads.safetensors     the heads that are kept on this machine, with their tasks' and classes' names
    config.json, model.safetensors, …   what the library's own loader takes

A head never leaves the machine of the party that made it but in such a folder: see `export`.
"""

from atm_fl.exports.export import Export, export
from atm_fl.exports.formats import FORMATS, Format, export_format
from atm_fl.exports.predictor import Prediction, Predictor

__all__ = ["FORMATS", "Export", "Format", "Prediction", "Predictor", "export", "export_format"]
