"""Every error this package raises, as one tree.

GptossError                    code                     status
├── ConfigError                invalid_config
├── AddressInUse               address_in_use           another process listens where HTTP should
├── RequestError               invalid_request          400   the caller's fault; names the parameter
│   ├── ContextLengthExceeded  context_length_exceeded  400
│   ├── ModelNotFound          model_not_found          404
│   ├── RequestNotFound        request_not_found        404
│   ├── ExecutorNotFound       executor_not_found       404
│   ├── ResponseNotFound       response_not_found       404
│   ├── FileUnknown            file_not_found           404
│   ├── BatchUnknown           batch_not_found          404
│   ├── NotFound               not_found                404
│   ├── MethodNotAllowed       method_not_allowed       405
│   ├── BodyTimeout            body_timeout             408
│   ├── BodyTooLarge           body_too_large           413
│   ├── BundleTooLarge         bundle_too_large         413
│   └── UnsupportedMedia       unsupported_media_type   415
├── Overloaded                 overloaded               503   try again after ``retry_after_s``
│   ├── QueueFull              queue_full               429
│   ├── MemoryExhausted        memory_exhausted         503
│   ├── DeadlineExceeded       deadline_exceeded        503
│   └── NotReady               not_ready                503
├── EngineError                engine_error             500
│   ├── ModelLoadError         model_load_failed        500
│   ├── EngineLost             engine_lost              500   the engine process is gone
│   └── EngineProtocolError    engine_protocol_error    500
├── ActorError                 actor_error              500
│   ├── ActorDead              actor_dead               500
│   ├── MailboxFull            mailbox_full             503
│   └── AskTimeout             ask_timeout              503
├── JournalError               journal_error            503
│   ├── JournalCorrupt         journal_corrupt          503
│   └── JournalWriteFailed     journal_write_failed     503
├── AbortedByCrash             aborted_by_crash         500   the server process ended before the request did
└── ReplayError                replay_error
    ├── BundleError            bad_bundle
    └── UnsupportedSchema      unsupported_schema         a newer program wrote it

Each class has a stable ``code``. A journaled failure carries the code and a message written here, never the
exception, because an exception pins frames and the tensors in them.
"""

from typing import Any, ClassVar


class GptossError(Exception):
    """Base of every error of this package.

    Attributes:
        code: stable identifier, safe to match on and to journal.
        status: the HTTP status that this error maps to.
    """

    code: ClassVar[str] = "gptoss_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(GptossError):
    """A setting is unknown, has a bad value, or cannot be honoured on this machine."""

    code = "invalid_config"


class AddressInUse(GptossError):
    """Another process listens on the address that HTTP should have."""

    code = "address_in_use"


class RequestError(GptossError):
    """The caller sent something that cannot be served; ``param`` names the field at fault."""

    code = "invalid_request"
    status = 400

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthExceeded(RequestError):
    """Prompt plus requested tokens do not fit the model's context."""

    code = "context_length_exceeded"


class ModelNotFound(RequestError):
    """No model is served under the requested name."""

    code = "model_not_found"
    status = 404


class RequestNotFound(RequestError):
    """No request with this id is known."""

    code = "request_not_found"
    status = 404


class ExecutorNotFound(RequestError):
    """No executor has this name."""

    code = "executor_not_found"
    status = 404


class ResponseNotFound(RequestError):
    """No response with this id is kept."""

    code = "response_not_found"
    status = 404


class FileUnknown(RequestError):
    """No file with this id is kept."""

    code = "file_not_found"
    status = 404


class BatchUnknown(RequestError):
    """No batch with this id is known."""

    code = "batch_not_found"
    status = 404


class NotFound(RequestError):
    """No such path."""

    code = "not_found"
    status = 404


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    code = "method_not_allowed"
    status = 405


class BodyTimeout(RequestError):
    """The request body did not arrive in time."""

    code = "body_timeout"
    status = 408


class BodyTooLarge(RequestError):
    """The request body exceeds the limit."""

    code = "body_too_large"
    status = 413


class BundleTooLarge(RequestError):
    """The debug bundle that was asked for would exceed its limit."""

    code = "bundle_too_large"
    status = 413


class UnsupportedMedia(RequestError):
    """The content type or content encoding is not accepted."""

    code = "unsupported_media_type"
    status = 415


class Overloaded(GptossError):
    """The server cannot take the request now; ``retry_after_s`` says when to try again.

    ``admission`` are the numbers of the decision, where admission decided it: an ``AdmissionNote``.
    """

    code = "overloaded"
    status = 503

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.admission: Any = None


class QueueFull(Overloaded):
    """The bounded admission queue has no place left."""

    code = "queue_full"
    status = 429


class MemoryExhausted(Overloaded):
    """The request needs more KV memory than any executor has in total."""

    code = "memory_exhausted"


class DeadlineExceeded(Overloaded):
    """The request's deadline passed before it finished."""

    code = "deadline_exceeded"


class NotReady(Overloaded):
    """No executor can serve: still loading, restarting, or draining."""

    code = "not_ready"


class EngineError(GptossError):
    """The engine failed while serving."""

    code = "engine_error"


class ModelLoadError(EngineError):
    """The model cannot be found, read or run."""

    code = "model_load_failed"


class EngineLost(EngineError):
    """The engine process died, hung or closed its socket."""

    code = "engine_lost"


class EngineProtocolError(EngineError):
    """The engine process sent something that is not of the protocol."""

    code = "engine_protocol_error"


class ActorError(GptossError):
    """The actor runtime could not do what was asked."""

    code = "actor_error"


class ActorDead(ActorError):
    """The actor stopped before it handled the message."""

    code = "actor_dead"


class MailboxFull(ActorError):
    """A bounded mailbox refused the message."""

    code = "mailbox_full"
    status = 503


class AskTimeout(ActorError):
    """No reply came before the ask's deadline."""

    code = "ask_timeout"
    status = 503


class JournalError(GptossError):
    """The event journal cannot do its work."""

    code = "journal_error"
    status = 503


class JournalCorrupt(JournalError):
    """Recorded bytes fail their checksum inside the log, not merely at its torn tail."""

    code = "journal_corrupt"


class JournalWriteFailed(JournalError):
    """A write or fsync failed; the writer has stopped for good."""

    code = "journal_write_failed"


class AbortedByCrash(GptossError):
    """The server process ended before the request did; nobody is left to raise it to, so it is only recorded."""

    code = "aborted_by_crash"


class ReplayError(GptossError):
    """A bundle cannot be replayed."""

    code = "replay_error"


class BundleError(ReplayError):
    """A bundle is unreadable, incomplete or unsafe."""

    code = "bad_bundle"


class UnsupportedSchema(ReplayError):
    """A bundle's format or one of its events is of a version that this program does not know."""

    code = "unsupported_schema"


def _classes(base: type[GptossError]) -> dict[str, type[GptossError]]:
    found = {base.code: base}
    for child in base.__subclasses__():
        found |= _classes(child)
    return found


def error_from(code: str, message: str, *, param: str | None = None, retry_after_s: float = 0.0) -> GptossError:
    """The error that a journaled ``code`` stands for; an unknown code gives an ``EngineError``."""
    cls = _classes(GptossError).get(code, EngineError)
    if issubclass(cls, RequestError):
        return cls(message, param=param)
    if issubclass(cls, Overloaded):
        return cls(message, retry_after_s=retry_after_s or 1.0)
    return cls(message)
