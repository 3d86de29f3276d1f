"""An OpenAI-compatible server and a chat page for one model, with its gene as policy.

settings   what an operator may set, shared by the command line and the API
errors     an error in OpenAI's form
messages   conversations as clients send them, for the chat template
schema     what a client may ask, field by field
answers    an answer as JSON and as server-sent events
responses  the same in the form of the responses API
guard      who may ask: Host, Origin, key; which path is meant
http       the protocol's time limits, and errors below HTTP in the API's own form
metrics    counters for Prometheus
app        the routes
run        model, socket, signals

Needs the extra `serve`; nothing here is imported by the rest of the package.
"""

from __future__ import annotations

from .settings import ServeSettings as ServeSettings

__all__ = ["ServeSettings"]
