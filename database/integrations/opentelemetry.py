"""Spans of SQL statements for OpenTelemetry, without what the statements are about.

A span shows the statement with its placeholders, never their values; of an error it shows the
SQLSTATE, never the server's text, which quotes the row that was refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.instrumentation.utils import is_instrumentation_enabled
from opentelemetry.trace import SpanKind, Status, StatusCode
from sqlalchemy import Engine, event

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.trace import Span, TracerProvider
    from sqlalchemy import URL, Connection
    from sqlalchemy.engine import ExceptionContext

__all__ = ["instrument"]

# An attribute of what SQLAlchemy keeps for each execution.
_SPAN = "_database_span"


def instrument(
    engine: Engine | None = None, *, tracer_provider: TracerProvider | None = None
) -> Callable[[], None]:
    """Make a span of each statement from now on.

    Statements get one span each, however often this is called. BEGIN, tenant and COMMIT travel with
    a statement, in the time of its span.

    Args:
        engine: Whose statements; None means all of this library's engines, also those made later.
        tracer_provider: Where the spans go; None is the process's provider.

    Returns:
        What ends it, when called.
    """
    tracer = trace.get_tracer("database", tracer_provider=tracer_provider)

    def start(
        connection: Connection,
        _cursor: object,
        statement: str,
        _parameters: object,
        execution: Any,
        _many: object,
    ) -> None:
        if hasattr(execution, _SPAN) or not is_instrumentation_enabled():
            return
        if "app_role" not in connection.engine.get_execution_options():
            return  # another library's engine
        operation = statement.split(maxsplit=1)[0].upper()
        attributes = {
            **_place_of(connection.engine.url),
            "db.operation.name": operation,
            "db.query.text": statement,
        }
        span = tracer.start_span(operation, kind=SpanKind.CLIENT, attributes=attributes)
        setattr(execution, _SPAN, span)

    listeners = (
        ("before_cursor_execute", start),
        ("after_cursor_execute", _end),
        ("handle_error", _end_failed),
    )
    target = Engine if engine is None else engine
    for name, listener in listeners:
        event.listen(target, name, listener)

    def end() -> None:
        for name, listener in listeners:
            if event.contains(target, name, listener):
                event.remove(target, name, listener)

    return end


def _end(
    _connection: object,
    _cursor: object,
    _statement: object,
    _parameters: object,
    execution: Any,
    _many: object,
) -> None:
    span = _span_of(execution)
    if span is not None:
        span.end()


def _end_failed(failed: ExceptionContext) -> None:
    span = _span_of(failed.execution_context)
    if span is None:
        return
    state = getattr(failed.original_exception, "sqlstate", None)
    if state:
        span.set_attribute("db.response.status_code", state)
    span.set_attribute("error.type", state or type(failed.original_exception).__qualname__)
    span.set_status(Status(StatusCode.ERROR))
    span.end()


def _span_of(execution: Any) -> Span | None:
    """Take the span of an execution; an error while its rows are read comes after its end."""
    span: Span | None = getattr(execution, _SPAN, None)
    if span is not None:
        setattr(execution, _SPAN, None)
    return span


def _place_of(url: URL) -> dict[str, str | int]:
    host = url.host or url.query.get("host")
    place: dict[str, str | int] = {"db.system.name": "postgresql"}
    if url.database:
        place["db.namespace"] = url.database
    if isinstance(host, str):
        place["server.address"] = host
    if url.port:
        place["server.port"] = url.port
    return place
