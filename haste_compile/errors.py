"""The catalogue of errors. Each one says what was found, what was wanted, where, and what to do."""

from __future__ import annotations


class HasteError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        found: what the package met, as the user can recognise it.
        wanted: what would have been right.
        where: the option, site, file or tensor concerned.
        fix: one thing the user can do.
    """

    def __init__(self, *, found: str, wanted: str, where: str, fix: str) -> None:
        self.found, self.wanted, self.where, self.fix = found, wanted, where, fix
        super().__init__(f"{where}: found {found}; wanted {wanted}. {fix}")

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling
        return (_rebuild, (type(self), self.found, self.wanted, self.where, self.fix))


def _rebuild(kind: type[HasteError], found: str, wanted: str, where: str, fix: str) -> HasteError:
    return kind(found=found, wanted=wanted, where=where, fix=fix)


class OptionError(HasteError):
    """An option is unknown, of the wrong type or out of its range."""


class ThresholdError(OptionError):
    """A table of top-p or drift thresholds has the wrong shape or a value out of its range."""


class InputError(HasteError):
    """A tensor handed to an op has a shape, dtype, stride or device that the op does not take."""


class AutogradError(HasteError):
    """A gradient was asked for through an op that only runs forward."""


class UnsupportedSiteError(HasteError):
    """An attention site cannot be rewritten and ``strict=True`` forbids to skip it."""


class TokenOrderError(HasteError):
    """A graph's tokens cannot be put in the order asked for and ``strict=True`` forbids raster order."""


class NoAttentionSitesError(HasteError):
    """The traced graph has no attention that this backend can see."""


class GraphContractError(HasteError):
    """A graph breaks the written specification of the rewritten form: a defect in a pass."""


class StateError(HasteError):
    """Mask state and a call do not fit together."""


class ModelPathError(HasteError):
    """A model folder is missing or is not a diffusers pipeline."""


class OutputPathError(HasteError):
    """An output folder cannot be written."""


class DeviceError(HasteError):
    """A device was asked for that is not there or cannot run the kernels."""


class DependencyError(HasteError):
    """An optional package is missing or has a version that is not supported."""


class ArtifactError(HasteError):
    """A transformer cannot be exported in the form that was asked for."""


class ArtifactFileError(ArtifactError):
    """A file of an artifact is missing, incomplete or not what its manifest says."""


class ArtifactVersionError(ArtifactError):
    """An artifact was made by, or for, a version that does not run it here."""


class ArtifactTrustError(ArtifactError):
    """An artifact holds executable code and nobody vouched for it."""


class ArtifactSizeError(ArtifactError):
    """An artifact was called for another video size, batch or text length than it was exported for."""


class ProfileError(HasteError):
    """A calibration profile or its journal is damaged, of another version, or belongs to other weights."""


class BudgetError(OptionError):
    """No choice among the candidate thresholds meets a calibration budget."""
