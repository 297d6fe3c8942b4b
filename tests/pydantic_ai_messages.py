"""Messages of Pydantic AI of every kind, for hypothesis."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from pydantic_ai.messages import (
    AudioUrl,
    BinaryContent,
    CachePoint,
    Citation,
    CompactionPart,
    DocumentUrl,
    FilePart,
    ImageUrl,
    ModelMessage,
    ModelMessagesTypeAdapter,
    ModelRequest,
    ModelRequestAttempt,
    ModelResponse,
    NativeToolCallPart,
    NativeToolReturnPart,
    RetryFeedbackPart,
    RetryInfo,
    SpeechPart,
    SystemPromptPart,
    TextContent,
    TextPart,
    ThinkingPart,
    ToolAvailabilityDeltaPart,
    ToolCallPart,
    ToolReturnPart,
    UploadedFile,
    UserPromptPart,
    VideoUrl,
    WebCitationSource,
)
from pydantic_ai.usage import RequestUsage

__all__ = ["as_stored", "messages"]

WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)

times = st.integers(0, 10**6).map(lambda n: WHEN + timedelta(seconds=n))
texts = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\0\\\"'{}"), max_size=20
)
names = st.text("abc_", min_size=1, max_size=8)
optional_texts = st.none() | texts
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, json_values, max_size=3)
optional_objects = st.none() | objects
urls = st.sampled_from(["https://example.com/a.png", "https://example.com/b"])
binaries = st.builds(
    BinaryContent,
    st.binary(max_size=20),
    media_type=st.sampled_from(["image/png", "audio/wav", "application/pdf", "text/plain"]),
    identifier=st.none() | names,
    vendor_metadata=optional_objects,
)
files = (
    binaries
    | st.builds(ImageUrl, urls, media_type=st.none() | st.just("image/png"))
    | st.builds(AudioUrl, urls, media_type=st.just("audio/wav"), vendor_metadata=optional_objects)
    | st.builds(VideoUrl, urls, media_type=st.just("video/mp4"), force_download=st.booleans())
    | st.builds(DocumentUrl, urls, media_type=st.just("application/pdf"), identifier=names)
    | st.builds(
        UploadedFile, names, provider_name=st.just("openai"), media_type=st.just("text/plain")
    )
)
prompts = texts | st.lists(
    texts
    | files
    | st.builds(TextContent, texts, metadata=optional_objects)
    | st.builds(CachePoint, ttl=st.sampled_from(["5m", "1h"])),
    max_size=4,
)
results = (
    json_values
    | files
    | st.lists(files | texts, max_size=3)
    | st.dictionaries(names, files, max_size=2)
)
feedback = texts | st.lists(
    st.fixed_dictionaries(
        {"type": names, "loc": st.tuples(names), "msg": texts, "input": json_values}
    ),
    max_size=2,
)
usages = st.builds(
    RequestUsage,
    input_tokens=st.integers(0, 2**40),
    output_tokens=st.integers(0, 2**31),
    cache_read_tokens=st.integers(0, 10),
    details=st.dictionaries(names, st.integers(0, 10), max_size=2),
)

request_parts: st.SearchStrategy[Any] = (
    st.builds(SystemPromptPart, texts, timestamp=times, dynamic_ref=st.none() | names)
    | st.builds(UserPromptPart, prompts, timestamp=times)
    | st.builds(
        ToolReturnPart,
        names,
        results,
        names,
        metadata=json_values,
        timestamp=times,
        outcome=st.sampled_from(["success", "failed", "denied", "interrupted"]),
    )
    | st.builds(
        ToolReturnPart,
        names,
        feedback,
        names,
        timestamp=times,
        outcome=st.just("retried"),
        retry=st.none() | st.builds(RetryInfo, cause=st.just("model_retry")),
    )
    | st.builds(
        RetryFeedbackPart,
        feedback,
        retry=st.builds(RetryInfo, cause=st.sampled_from(["validation_error", "no_output"])),
        timestamp=times,
    )
    | st.builds(SpeechPart, speaker=st.just("user"), transcript=optional_texts)
    | st.builds(ToolAvailabilityDeltaPart, tools_added=st.lists(names, max_size=2))
    | st.builds(CompactionPart, optional_texts)
)
response_parts: st.SearchStrategy[Any] = (
    st.builds(
        TextPart,
        texts,
        id=st.none() | names,
        provider_name=st.just("test"),
        provider_details=optional_objects,
        citations=st.none()
        | st.just([Citation(sources=[WebCitationSource(url="https://example.com")])]),
    )
    | st.builds(
        ThinkingPart,
        texts,
        id=st.none() | names,
        signature=optional_texts,
        provider_name=st.just("test"),
    )
    | st.builds(ToolCallPart, names, texts | objects | st.none(), names, id=st.none() | names)
    | st.builds(NativeToolCallPart, names, objects, names, provider_name=st.just("test"))
    | st.builds(NativeToolReturnPart, names, results, names, timestamp=times)
    | st.builds(FilePart, binaries, id=st.none() | names)
    | st.builds(SpeechPart, speaker=st.just("assistant"), transcript=optional_texts, audio=binaries)
    | st.builds(CompactionPart, optional_texts, id=names, provider_name=st.just("test"))
)
requests = st.builds(
    ModelRequest,
    st.lists(request_parts, max_size=4),
    timestamp=st.none() | times,
    instructions=optional_texts,
    run_id=optional_texts,
    conversation_id=optional_texts,
    metadata=optional_objects,
    state=st.sampled_from(["complete", "interrupted"]),
)
responses = st.builds(
    ModelResponse,
    st.lists(response_parts, max_size=4),
    usage=usages,
    model_name=optional_texts,
    timestamp=times,
    provider_name=st.none() | names,
    provider_details=optional_objects,
    provider_response_id=optional_texts,
    finish_reason=st.none() | st.sampled_from(["stop", "length", "tool_call"]),
    run_id=optional_texts,
    metadata=optional_objects,
    failed_attempts=st.none()
    | st.just(
        [
            ModelRequestAttempt(
                model_name="m",
                outcome="error",
                error="E: x",
                timestamp=WHEN,
                duration=timedelta(seconds=1.5),
                usage=RequestUsage(input_tokens=1, cost=Decimal("0.1")),
            )
        ]
    ),
    state=st.sampled_from(["complete", "incomplete", "suspended", "interrupted"]),
)
messages: st.SearchStrategy[list[ModelMessage]] = st.lists(requests | responses, max_size=6)


def as_stored(given: list[ModelMessage]) -> list[ModelMessage]:
    """Return what the framework's own JSON gives back."""
    return ModelMessagesTypeAdapter.validate_json(ModelMessagesTypeAdapter.dump_json(given))
