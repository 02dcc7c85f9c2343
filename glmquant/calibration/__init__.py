"""What text tells about weights: see `glmquant.calibration.calibrator`."""

from .calibrator import Calibrator, folded
from .inputs import LayerFacts, layer_facts
from .text import CalibrationText, calibration_text

__all__ = ["CalibrationText", "Calibrator", "LayerFacts", "calibration_text", "folded", "layer_facts"]
