"""Every error that glmquant raises on purpose.

::

    GlmquantError                 one sentence: what is wrong, where, what to do next
    ├── UsageError                options that contradict each other, or a scheme no format can hold
    ├── SourceError               the checkpoint that is read is missing, damaged or unknown
    │   ├── UnsafeFileError       a file that would run code or reach outside its folder
    │   └── QuantizedSourceError  the checkpoint is already quantized
    ├── HubError                  a hub that does not answer, or not with what was asked for
    ├── QuantizationError         a weight that cannot be quantized (NaN, Inf, scale overflow)
    ├── ModelError                a model that computes NaN or infinity
    ├── OutOfMemoryError          memory ran out while a model was converted
    ├── OutputError               OUT cannot be written: exists, is locked, disk full
    ├── VerificationError         what was written is not what was planned
    └── DoesNotFitError           no recipe stays within the memory that there is

The command line exits with ``exit_status``: 2 for bad usage or bad input, 1 where the honest answer is "no".
"""

from __future__ import annotations


class GlmquantError(Exception):
    """Base class; the message is meant to be shown to a person as it is."""

    exit_status = 2


class UsageError(GlmquantError):
    """The request itself cannot be met, whatever the checkpoint holds."""


class SourceError(GlmquantError):
    """The checkpoint that is read is missing something, damaged, or of no known kind."""


class UnsafeFileError(SourceError):
    """A checkpoint file would run code or points outside its own folder; nothing of it was used."""


class QuantizedSourceError(SourceError):
    """The checkpoint is quantized already, in a way that cannot be converted from."""


class HubError(GlmquantError):
    """A hub cannot be reached, refuses, or sends something else than it lists; what was fetched is kept."""


class QuantizationError(GlmquantError):
    """A weight has no sound quantized form, for example because it holds NaN."""


class ModelError(GlmquantError):
    """A model was run, and what came out are no numbers."""

    exit_status = 1


class OutOfMemoryError(GlmquantError):
    """Memory, or a GPU's, ran out during a conversion; what was done until then is kept."""


class OutputError(GlmquantError):
    """The output folder cannot be written; nothing that was there has been touched."""


class VerificationError(GlmquantError):
    """The written files differ from the plan or from their recorded hashes."""

    exit_status = 1


class DoesNotFitError(GlmquantError):
    """No recipe stays within the budget; names the smallest there is."""

    exit_status = 1
