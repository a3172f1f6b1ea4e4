"""The pool over HTTP and WebSocket."""
