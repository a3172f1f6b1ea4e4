"""OpenID Connect: callers whose tokens other services issue."""
