"""Everything that a live server folds its journal into: each record once through the books, then to every projection."""

from gptoss.telemetry.books import Books
from gptoss.telemetry.folding import Folding
from gptoss.telemetry.logs import LogWriter
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.projection import FINISHED_MAX, Projection
from gptoss.telemetry.request_view import RequestBook
from gptoss.telemetry.traces import SpanSink, Traces


class LiveViews:
    """The projections of a running server. Fold and read them on one thread.

    Args:
        step_timeout_s: see ``Projection``.
        log: writes the log lines; None for none.
        spans: takes the spans of the traces that are kept; None makes no traces.
    """

    def __init__(
        self, *, step_timeout_s: float = 60.0, log: LogWriter | None = None, spans: SpanSink | None = None
    ) -> None:
        books = Books(requests=RequestBook(finished_max=FINISHED_MAX))
        self.projection = Projection(step_timeout_s=step_timeout_s, books=books)
        self.metrics = Metrics(books)
        self._log = log
        traces = None if spans is None else Traces(spans, books)
        views = (self.projection, self.metrics, log, traces)
        self.fold = Folding(books, [view for view in views if view is not None]).fold
        """Takes one record in."""

    @property
    def newest_pos(self) -> int:
        """Position of the newest record that was folded, -1 before the first."""
        return self.projection.newest_pos

    def flush(self) -> None:
        """Let out what records that were folded have written, after each burst of them."""
        if self._log is not None:
            self._log.flush()

    def count_missed(self, records: int) -> None:
        """Say that ``records`` records never came here."""
        self.projection.count_missed(records)
        self.metrics.count_missed(records)
