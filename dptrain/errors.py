"""Exceptions that a caller may catch; nothing else lives here."""


class DptrainError(Exception):
    """Base of every error that dptrain raises on purpose. Its text is one sentence for a person."""


class ConfigError(DptrainError, ValueError):
    """A setting that a user can correct: the text quotes the value and says what to write instead."""


class CheckpointError(DptrainError):
    """A checkpoint that cannot be written, or cannot be trusted when read."""


class MismatchError(CheckpointError, ConfigError):
    """A sound checkpoint of another model or optimizer than the one that is to go on from it."""


class TaskError(DptrainError):
    """A task (model, data, loss) that does not do what the trainer needs of it."""


class ObservationError(DptrainError):
    """The meter cannot be right in this loop: the text gives the reason and the remedy."""


class DesyncError(DptrainError):
    """Replicas disagree on a step: training on would mix values that do not belong together."""


class TaskExitError(RuntimeError):
    """The task, or a library that it uses, ended the process in the middle of the run: a crash, with a traceback."""


class AbortedError(DptrainError):
    """Another replica failed in what was done on behalf of all; its own error says why."""


class RendezvousError(DptrainError):
    """The replicas did not all come together, or cannot reach one another: the text names who is missing."""


class OutOfMemoryError(DptrainError):
    """The device has too little memory, and smaller micro-batches do not help, or come too late."""


class DivergedError(DptrainError):
    """Training went out of the numbers: too many steps in a row had a gradient that is not finite."""


class PeerLostError(AbortedError):
    """Another replica ended, or did not answer in time, in the middle of a step."""
