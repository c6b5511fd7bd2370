"""Errors and warnings that torchstage raises on its own account.

    TorchstageError
    |-- OptionError (ValueError)           an option is out of range or contradicts another
    |-- BindingError (TypeError)           a batch does not fit the model's forward
    |-- MarkError (ValueError)             a manual mark cannot be honoured, or two of them contradict
    |-- PutTimeoutError (TimeoutError)     a staged batch found no room in time, with on_timeout="raise"
    |-- VerificationError                  verify=N: a staged forward or backward is not the plain one
    |-- StateError (ValueError)            a state to resume from is damaged, or of another loader
    |-- ForkedError                        this process was forked while the loader's threads ran
    |-- StageProcessError                  stage_executor="process": the process that runs the stage died
    |-- BatchOverwrittenError              the user's loader wrote into a batch that was still waiting
    `-- ChannelError                       the channel's end states; a training loop never sees one
        |-- ChannelCancelled
        `-- ChannelClosed

    TorchstageWarning (UserWarning)
    |-- EmptyStageWarning                  nothing can be staged: batches are still prefetched
    |-- FallbackWarning                    a step used the original forward; once per reason
    |-- VerificationWarning                verify=N: a step cannot be compared
    |-- RandomStreamWarning                batches are not read ahead, since reading draws from a global random stream
    |-- ResumeWarning                      a pass is resumed by reading again what was consumed
    `-- DroppedBatchWarning                a batch was dropped on purpose; once per reason

Exceptions of the user's loader, data set and model are never wrapped: they arrive with their own type and traceback,
at the position of their batch, with a note that names the batch and the graph node (see ``add_note``).
"""

import contextlib
import sys


class TorchstageError(Exception):
    """Root of all errors that torchstage raises itself."""


class OptionError(TorchstageError, ValueError):
    """An option is out of range, of the wrong type, or contradicts another one."""


class BindingError(TorchstageError, TypeError):
    """A batch does not bind to the model's forward."""


class MarkError(TorchstageError, ValueError):
    """A manual mark (`staged`, `mark_target_node`) cannot be honoured."""


class PutTimeoutError(TorchstageError, TimeoutError):
    """A staged batch found no room in the buffer within ``timeout_millis``, and ``on_timeout="raise"``."""


class StateError(TorchstageError, ValueError):
    """What `StagedDataLoader.load_state_dict` was given is no state, is damaged, or is of another loader."""


class ForkedError(TorchstageError):
    """This process was forked while the loader's threads ran: a fork copies no threads."""


class StageProcessError(TorchstageError):
    """The process that runs the stage died, with ``stage_executor="process"``."""


class BatchOverwrittenError(TorchstageError):
    """The user's loader wrote into the memory of a batch that was still waiting for its step."""


class VerificationError(TorchstageError):
    """With ``verify=N``: the staged forward or backward gave something else than the plain one.

    Attributes:
        node: name of the first operation that differs, as the plan prints it; None if it is not known.
        source: ``file:line`` of its code; empty if it is not known.
        path: path of the module whose forward has it; empty for the model itself.
    """

    def __init__(self, message: str, node: str | None = None, source: str = "", path: str = "") -> None:
        super().__init__(message)
        self.node = node
        self.source = source
        self.path = path


class ChannelError(TorchstageError):
    """Root of the channel's end states."""


class ChannelCancelled(ChannelError):
    """The channel was cancelled: nothing moves until it is resumed."""


class ChannelClosed(ChannelError):
    """The channel was closed and everything before the end has been taken."""


class TorchstageWarning(UserWarning):
    """Root of all warnings that torchstage gives."""


class EmptyStageWarning(TorchstageWarning):
    """Nothing can be staged; batches are still prefetched."""


class FallbackWarning(TorchstageWarning):
    """A step ran the original forward instead of the staged one. Same numbers, no overlap."""


class VerificationWarning(TorchstageWarning):
    """With ``verify=N``: staged steps cannot be compared with plain ones, and why."""


class RandomStreamWarning(TorchstageWarning):
    """Batches are not read ahead, since reading them draws from a global random stream."""


class ResumeWarning(TorchstageWarning):
    """A pass is resumed by reading and dropping the batches that were consumed."""


class DroppedBatchWarning(TorchstageWarning):
    """A batch was dropped because the options say so."""


def add_note(error: BaseException, note: str) -> None:
    """Attach ``note`` to ``error`` as PEP 678 does; before Python 3.11 the list is kept but not printed.

    An exception class of the user's that takes no notes loses the note and nothing else.
    """
    with contextlib.suppress(Exception):
        if sys.version_info >= (3, 11):
            error.add_note(note)
        else:
            error.__notes__ = [*getattr(error, "__notes__", []), note]
