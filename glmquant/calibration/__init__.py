"""What text tells about weights: see `glmquant.calibration.calibrator`."""

from .calibrator import Calibrator, folded
from .inputs import mean_squares
from .text import CalibrationText, calibration_text

__all__ = ["CalibrationText", "Calibrator", "calibration_text", "folded", "mean_squares"]
