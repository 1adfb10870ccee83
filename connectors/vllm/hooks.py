"""What vLLM calls of kvstore does not raise: the store may cost the engine its hits, never a request."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

Hook = TypeVar("Hook", bound=Callable[..., Any])

_log = logging.getLogger(__name__)


def guarded(default: Callable[[], Any]) -> Callable[[Hook], Hook]:
    """Make a hook answer `default()` instead of raising."""

    def decorate(hook: Hook) -> Hook:
        @functools.wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception:
                _log.exception("%s failed", hook.__name__)
                return default()

        return run  # type: ignore[return-value]

    return decorate
