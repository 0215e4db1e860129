"""A request that cannot be decoded is refused in words, and no sooner than a caller without a token is."""

from __future__ import annotations

import grpc
import pytest

from esperml.client import Credentials

MALFORMED = b"\xff\xff"


@pytest.mark.parametrize(
    ("role", "runs", "code"),
    [
        (None, (), grpc.StatusCode.UNAUTHENTICATED),
        ("host", ("run-1",), grpc.StatusCode.PERMISSION_DENIED),
        ("viewer", ("run-1",), grpc.StatusCode.INVALID_ARGUMENT),
        ("admin", ("*",), grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
async def test_a_malformed_request_is_its_callers_mistake(serve, make_token, role, runs, code) -> None:
    credentials = make_token(role, *runs) if role else Credentials()
    metadata = [("authorization", f"Bearer {credentials.token}")] if role else []
    async with serve() as server, grpc.aio.insecure_channel(server.target) as channel:
        describe = channel.unary_unary("/esperml.v1.Runs/DescribeRun")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await describe(MALFORMED, metadata=metadata)
    assert caught.value.code() is code
    assert (caught.value.details() or "").startswith("request: is malformed") is (
        code is grpc.StatusCode.INVALID_ARGUMENT
    )
